"""Models to disk: Hugging Face and PEFT folders, and the Orbax form; never half a folder."""

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import jax
import numpy as np
from safetensors import SafetensorError

from kd_jax.config import LoraConfig, MeshConfig, UserError
from kd_jax.config.errors import first_line
from kd_jax.models.architecture import Architecture
from kd_jax.models.lora import merge
from kd_jax.models.table import FACTORS, hf_names, is_adapter, weights
from kd_jax.parallel.mesh import Layout, make_mesh
from kd_jax.weights.adapters import peft_name
from kd_jax.weights.folder import ORBAX, load_architecture
from kd_jax.weights.load import check_source, load_arrays, open_tensors
from kd_jax.weights.names import check_shapes
from kd_jax.weights.orbax import absl_silent, orbax_leaves, read_orbax
from kd_jax.weights.safetensors import INDEX

EXTRA_FILES = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "tokenizer.model", "chat_template.jinja", "vocab.json", "merges.txt", "added_tokens.json",
)  # fmt: skip


def save_orbax(source: Path, out: Path) -> None:
    """Writes a Hugging Face folder as config.json, tokenizer files and one Orbax checkpoint."""
    from orbax.checkpoint import v1 as ocp

    arch = load_architecture(source)
    check_source(source, arch)
    layout = Layout(make_mesh(MeshConfig(fsdp=-1, data=1), jax.device_count()))
    with new_folder(out) as folder:
        arrays = load_arrays(source, arch, layout, None)
        try:
            with absl_silent():
                ocp.save((folder / ORBAX).absolute(), arrays)
        except ValueError as error:  # a full disk, in tensorstore's words
            raise OSError(first_line(error)) from error
        shutil.copy(source / "config.json", folder / "config.json")
        copy_extra_files(source, folder)


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Yields a folder beside `out` that becomes `out` when the block ends well, else vanishes."""
    if out.exists():
        raise UserError(f"--out: expected a folder that is not there yet, got {out}")
    beside = out.parent / f".{out.name}.{os.getpid()}.tmp"
    try:
        beside.mkdir(parents=True)
        try:
            yield beside
            os.rename(beside, out)
        except BaseException:
            _remove(beside)
            raise
    except (OSError, SafetensorError) as error:
        raise UserError(f"--out: {out} cannot be written ({error})") from error


def _remove(folder: Path) -> None:
    """Removes a folder in which threads of a failed write may go on creating files for a while."""
    for _ in range(50):
        shutil.rmtree(folder, ignore_errors=True)
        time.sleep(0.1)
        if not folder.exists():
            return


def copy_extra_files(source: Path, out: Path) -> None:
    """Copies the tokenizer's and generation's files."""
    for name in EXTRA_FILES:
        if (source / name).is_file():
            shutil.copy(source / name, out / name)


def save_model(
    out: Path, names: list[str], get: Callable[[str], np.ndarray], max_shard_bytes: int
) -> None:
    """Writes tensors in shards of at most `max_shard_bytes`, with an index if there are several.

    Args:
      out: an existing folder.
      get: returns one tensor by its Hugging Face name; called once for each, shard by shard.
    """
    from safetensors.numpy import save_file

    shards: list[list[str]] = [[]]
    filled, total = 0, 0
    pending: dict[str, np.ndarray] = {}

    def flush():
        file = out / f"shard-{len(shards)}"
        save_file(pending, file, metadata={"format": "pt"})
        pending.clear()

    for name in names:
        tensor = np.ascontiguousarray(get(name))
        if pending and filled + tensor.nbytes > max_shard_bytes:
            flush()
            shards.append([])
            filled = 0
        pending[name] = tensor
        shards[-1].append(name)
        filled += tensor.nbytes
        total += tensor.nbytes
    flush()
    if len(shards) == 1:
        os.rename(out / "shard-1", out / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        os.rename(out / f"shard-{number}", out / file)
        weight_map |= dict.fromkeys(shard, file)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (out / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def export_merged(
    source: Path,
    arch: Architecture,
    trained: dict[str, np.ndarray],
    scale: float,
    out: Path,
    *,
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Writes the source model with what was trained, in the source's dtype and Hugging Face form.

    Args:
      trained: a checkpoint's arrays by dotted path: low-rank factors or whole weights.
    """
    _check_trained(trained, arch, source)
    place = {
        name: (path, layer if path.startswith("layers.") else None)
        for path in weights(arch)
        for layer, name in enumerate(hf_names(path, arch))
    }
    read, dtype_of = _reader(source, arch, place)

    def get(name: str) -> np.ndarray:
        path, layer = place[name]
        if path in trained:
            value = trained[path] if layer is None else trained[path][layer]
            return np.asarray(value).astype(dtype_of(name))
        module = path.removesuffix(".weight")
        value = read(name)
        if f"{module}.lora_A" in trained:
            A, B = (np.asarray(trained[f"{module}.{factor}"][layer]) for factor in FACTORS)
            value = merge(value, (A, B), scale)
        return value

    with new_folder(out) as folder:
        save_model(folder, list(place), get, max_shard_bytes)
        shutil.copy(source / "config.json", folder / "config.json")
        copy_extra_files(source, folder)


def _check_trained(trained: Mapping[str, np.ndarray], arch: Architecture, source: Path) -> None:
    """Raises UserError unless every trained array belongs to the source as it is now."""
    table = weights(arch)
    expected = {path: weight.shape for path, weight in table.items() if path in trained}
    for path in filter(is_adapter, trained):
        module, factor = path.rsplit(".", 1)
        if f"{module}.weight" in table:
            L, num_out, num_in = table[f"{module}.weight"].shape
            rank = trained[path].shape[1 if factor == "lora_A" else -1]
            expected[path] = (L, rank, num_in) if factor == "lora_A" else (L, num_out, rank)
    check_shapes({path: value.shape for path, value in trained.items()}, expected, source)


def _reader(source: Path, arch: Architecture, place: dict[str, tuple[str, int | None]]):
    """Returns how to read one tensor of the source by its Hugging Face name, and its dtype."""
    if not (source / ORBAX).is_dir():
        tensors = open_tensors(source, arch)
        return (lambda name: tensors[name].read()), (lambda name: tensors[name].dtype)
    from orbax.checkpoint import v1 as ocp

    saved = orbax_leaves(source, arch)
    held: dict[str, np.ndarray] = {}  # the array last read; names come array by array

    def read(name: str) -> np.ndarray:
        path, layer = place[name]
        if path not in held:
            held.clear()
            abstract = dict.fromkeys(saved, ocp.PLACEHOLDER)
            abstract[path] = np.empty(saved[path].shape, saved[path].dtype)
            held[path] = read_orbax(source, abstract)[path]
        return held[path] if layer is None else held[path][layer]

    return read, lambda name: saved[place[name][0]].dtype


def export_adapter(
    source: Path,
    source_name: str,
    arch: Architecture,
    trained: dict[str, np.ndarray],
    config: LoraConfig,
    out: Path,
) -> None:
    """Writes low-rank factors as the folder that `peft.PeftModel.from_pretrained` loads."""
    from safetensors.numpy import save_file

    _check_trained(trained, arch, source)
    tensors = {}
    for path, value in trained.items():
        module, factor = path.rsplit(".", 1)
        for layer, name in enumerate(hf_names(module, arch)):
            tensors[peft_name(name, factor)] = np.ascontiguousarray(value[layer])
    adapter_config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": source_name,
        "r": config.rank,
        "lora_alpha": int(config.alpha) if config.alpha == int(config.alpha) else config.alpha,
        "lora_dropout": config.dropout,
        "target_modules": list(config.target_modules),
        "bias": "none",
        "inference_mode": True,
    }
    with new_folder(out) as folder:
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        text = json.dumps(adapter_config, indent=2) + "\n"
        (folder / "adapter_config.json").write_text(text)
        copy_extra_files(source, folder)
