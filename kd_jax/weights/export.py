"""Exports: Hugging Face, PEFT and Orbax folders, each written atomically."""

import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors import SafetensorError

from kd_jax.config import Config, MeshConfig, UserError
from kd_jax.config.errors import first_line
from kd_jax.data.templates import Template
from kd_jax.models.architecture import Architecture
from kd_jax.models.lora import merge
from kd_jax.models.weight_table import FACTORS, abstract_weights, hf_names, trained_weights, weights
from kd_jax.parallel.mesh import Layout, make_mesh
from kd_jax.weights.adapters import peft_name
from kd_jax.weights.chat_files import OTHERS, save_chat
from kd_jax.weights.files import removed_if_empty
from kd_jax.weights.folder import ORBAX, load_architecture
from kd_jax.weights.load import check_shapes, load_arrays, open_orbax, open_tensors, stored_dtypes
from kd_jax.weights.orbax import OrbaxArrays, absl_silent
from kd_jax.weights.safetensors import INDEX

EXTRA_FILES = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "tokenizer.model", "chat_template.jinja", "vocab.json", "merges.txt", "added_tokens.json",
)  # fmt: skip


def save_orbax(source: Path, out: Path) -> None:
    """Writes a Hugging Face folder as config.json, tokenizer files and one Orbax checkpoint."""
    from orbax.checkpoint import v1 as ocp

    arch = load_architecture(source)
    layout = Layout(make_mesh(MeshConfig(fsdp=-1, data=1), jax.device_count()))
    abstract = abstract_weights(weights(arch), layout, stored_dtypes(source, arch))
    with new_folder(out) as folder:
        arrays = load_arrays(source, arch, abstract)
        try:
            with absl_silent():
                ocp.save((folder / ORBAX).absolute(), arrays)
        except ValueError as error:  # tensorstore's error for a full disk
            raise OSError(first_line(error)) from error
        copy_config(source, folder)


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Yields a temporary folder; it is renamed to `out`, or removed if the block raises."""
    if out.exists():
        raise UserError(f"--out: expected a folder that is not there yet, got {out}")
    beside = out.parent / f".{out.name}.{os.getpid()}.tmp"
    with removed_if_empty(out.parent):
        try:
            beside.mkdir(parents=True)
            yield beside
            os.rename(beside, out)
        except (OSError, SafetensorError) as error:
            raise UserError(f"--out: {out} cannot be written ({error})") from error
        finally:
            _remove(beside)


def _remove(folder: Path) -> None:
    """Removes a folder, retrying while threads of a failed write still create files in it."""
    for _ in range(50):
        if not folder.exists():
            return
        shutil.rmtree(folder, ignore_errors=True)
        time.sleep(0.1)


def copy_extra_files(source: Path, out: Path) -> None:
    """Copies tokenizer and generation files, where they exist."""
    for name in EXTRA_FILES:
        if (source / name).is_file():
            shutil.copy(source / name, out / name)
    if (source / OTHERS).is_dir():
        shutil.copytree(source / OTHERS, out / OTHERS)


def copy_config(source: Path, out: Path) -> None:
    shutil.copy(source / "config.json", out / "config.json")
    copy_extra_files(source, out)


def save_model(
    out: Path, sizes: Mapping[str, int], get: Callable[[str], np.ndarray], max_shard_bytes: int
) -> None:
    """Writes tensors in shards of at most `max_shard_bytes`, with an index if there are several.

    Args:
      out: an existing folder.
      sizes: bytes of each tensor by Hugging Face name.
      get: returns one tensor; called once for each, shard by shard.
    """
    from huggingface_hub import split_state_dict_into_shards_factory
    from safetensors.numpy import save_file

    split = split_state_dict_into_shards_factory(
        dict(sizes),
        get_storage_size=lambda size: size,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_bytes,
    )
    for file, names in split.filename_to_tensors.items():
        tensors = {name: np.ascontiguousarray(get(name)) for name in names}
        save_file(tensors, out / file, metadata={"format": "pt"})
        del tensors  # before the next shard is read
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (out / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def export_merged(
    source: Path,
    config: Config,
    trained: OrbaxArrays,
    out: Path,
    *,
    max_shard_bytes: int = 5 * 10**9,
    template: Template | None = None,
) -> None:
    """Writes the source model with the trained weights, in Hugging Face form and its dtypes.

    Args:
      config: of the run.
      template: the run's chat template; None: the source's files.
      trained: the run's LoRA factors, which are merged, or whole weights.
    """
    arch = load_architecture(source)
    _check_trained(trained, config, arch, source)
    table = weights(arch)
    place = {
        name: (path, layer) for path in table for layer, name in enumerate(hf_names(path, arch))
    }
    read, dtype_of = _open_source(source, arch, place)
    whole = _keep_last(trained.read)
    merged = _merged(trained, config.lora.alpha / config.lora.rank)

    def get(name: str) -> np.ndarray:
        path, layer = place[name]
        if path in trained.shapes:
            return table[path].split(whole(path))[layer].astype(dtype_of(name))
        return merged(path, layer, read(name))

    sizes = {
        name: math.prod(table[path].layer_shape) * dtype_of(name).itemsize
        for name, (path, _) in place.items()
    }
    with new_folder(out) as folder:
        save_model(folder, sizes, get, max_shard_bytes)
        copy_config(source, folder)
        if template is not None:
            save_chat(source, folder, template, config.data.date)


def _merged(trained: OrbaxArrays, scale: float) -> Callable[[str, int, np.ndarray], np.ndarray]:
    """Returns a function of path, layer and tensor that adds the layer's LoRA factors, if any."""
    factors = _keep_last(lambda stem: [trained.read(f"{stem}{factor}") for factor in FACTORS])

    def add(path: str, layer: int, tensor: np.ndarray) -> np.ndarray:
        stem = path.removesuffix("weight")
        if f"{stem}{FACTORS[0]}" not in trained.shapes:
            return tensor
        A, B = factors(stem)
        return merge(tensor, (A[layer], B[layer]), scale)

    return add


def _check_trained(trained: OrbaxArrays, config: Config, arch: Architecture, source: Path) -> None:
    """Raises UserError unless the checkpoint has exactly the arrays that the run trains."""
    expected = {path: weight.shape for path, weight in trained_weights(config, arch).items()}
    check_shapes(trained.shapes, expected, source)


def _open_source(source: Path, arch: Architecture, place: Mapping[str, tuple[str, int]]):
    """Returns functions that give one tensor of the source, and its dtype, by name."""
    if not (source / ORBAX).is_dir():
        tensors = open_tensors(source, arch)
        return (lambda name: tensors[name].read()), (lambda name: tensors[name].dtype)
    saved = open_orbax(source, arch)
    whole, dtypes, table = _keep_last(saved.read), saved.dtypes, weights(arch)

    def read(name: str) -> np.ndarray:
        path, layer = place[name]
        return table[path].split(whole(path))[layer].copy()

    return read, lambda name: dtypes[place[name][0]]


def _keep_last(read: Callable[[str], Any]) -> Callable[[str], Any]:
    """Returns `read` with a cache of one result, which is dropped before the next is read."""
    held: dict[str, Any] = {}

    def get(key: str) -> Any:
        if key not in held:
            held.clear()
            held[key] = read(key)
        return held[key]

    return get


def export_adapter(
    source: Path,
    config: Config,
    trained: OrbaxArrays,
    out: Path,
    *,
    template: Template | None = None,
) -> None:
    """Writes a run's LoRA factors as a folder that `peft.PeftModel.from_pretrained` loads."""
    from safetensors.numpy import save_file

    arch, lora = load_architecture(source), config.lora
    _check_trained(trained, config, arch, source)
    adapter_config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": os.path.expanduser(config.student.path),
        "r": lora.rank,
        "lora_alpha": int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": list(dict.fromkeys(path.split(".")[-2] for path in trained.shapes)),
        "bias": "none",
        "inference_mode": True,
    }
    tensors = {
        peft_name(name): value
        for path in trained.shapes
        for name, value in zip(hf_names(path, arch), trained.read(path), strict=True)
    }
    with new_folder(out) as folder:
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        text = json.dumps(adapter_config, indent=2) + "\n"
        (folder / "adapter_config.json").write_text(text)
        copy_extra_files(source, folder)
        if template is not None:
            save_chat(source, folder, template, config.data.date)
