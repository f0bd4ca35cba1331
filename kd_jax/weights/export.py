"""Exports: Hugging Face, PEFT and Orbax folders, each written whole or not at all."""

import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
import numpy as np
from safetensors import SafetensorError

from kd_jax.config import Config, MeshConfig, UserError
from kd_jax.config.errors import first_line
from kd_jax.models.architecture import Architecture
from kd_jax.models.lora import merge
from kd_jax.models.table import FACTORS, abstract_weights, hf_names, trained_weights, weights
from kd_jax.parallel.mesh import Layout, make_mesh
from kd_jax.weights.adapters import peft_name
from kd_jax.weights.folder import ORBAX, load_architecture
from kd_jax.weights.load import (
    check_shapes,
    load_arrays,
    open_orbax,
    open_tensors,
    stored_dtypes,
)
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
    """Yields a folder beside `out`; it is renamed to `out`, or removed if the block raises."""
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
    """Removes a folder, retrying while threads of a failed write still create files in it."""
    for _ in range(50):
        shutil.rmtree(folder, ignore_errors=True)
        time.sleep(0.1)
        if not folder.exists():
            return


def copy_extra_files(source: Path, out: Path) -> None:
    """Copies the files of tokenizer and generation that are there."""
    for name in EXTRA_FILES:
        if (source / name).is_file():
            shutil.copy(source / name, out / name)


def copy_config(source: Path, out: Path) -> None:
    shutil.copy(source / "config.json", out / "config.json")
    copy_extra_files(source, out)


def save_model(out: Path, tensors: Iterable[tuple[str, np.ndarray]], max_shard_bytes: int) -> None:
    """Writes tensors in shards of at most `max_shard_bytes`, with an index if there are several.

    Args:
      out: an existing folder.
      tensors: Hugging Face names and values, drawn one by one; one shard is held in memory.
    """
    from safetensors.numpy import save_file

    shards: list[list[str]] = []
    total = 0
    for shard in _shards(tensors, max_shard_bytes):
        shards.append(list(shard))
        total += sum(tensor.nbytes for tensor in shard.values())
        save_file(shard, out / f"shard-{len(shards)}", metadata={"format": "pt"})
        shard.clear()  # before the next one is filled
    if len(shards) == 1:
        os.rename(out / "shard-1", out / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        os.rename(out / f"shard-{number}", out / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (out / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _shards(
    tensors: Iterable[tuple[str, np.ndarray]], max_bytes: int
) -> Iterator[dict[str, np.ndarray]]:
    """Yields the tensors in groups of at most `max_bytes`, or of one tensor."""
    shard: dict[str, np.ndarray] = {}
    filled = 0
    for name, tensor in tensors:
        if shard and filled + tensor.nbytes > max_bytes:
            yield shard
            shard, filled = {}, 0
        shard[name] = np.ascontiguousarray(tensor)
        filled += tensor.nbytes
    yield shard


def export_merged(
    source: Path,
    config: Config,
    trained: OrbaxArrays,
    out: Path,
    *,
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Writes the source model with the trained weights, in Hugging Face form and its dtypes.

    Args:
      config: of the run.
      trained: the run's LoRA factors, which are merged, or whole weights.
    """
    arch = load_architecture(source)
    _check_trained(trained, config, arch, source)
    tensors = _merged_tensors(source, arch, trained, config.lora.alpha / config.lora.rank)
    with new_folder(out) as folder:
        save_model(folder, tensors, max_shard_bytes)
        copy_config(source, folder)


def _check_trained(trained: OrbaxArrays, config: Config, arch: Architecture, source: Path) -> None:
    """Raises UserError unless the run's arrays are those of the source as it is now."""
    expected = {path: w.shape for path, w in trained_weights(config, arch).items()}
    check_shapes(trained.shapes, expected, source)


def _merged_tensors(
    source: Path, arch: Architecture, trained: OrbaxArrays, scale: float
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields Hugging Face names and values; at most one stacked array is held at a time."""
    read, dtypes = _open_source(source, arch)
    for path in weights(arch):
        if path in trained.shapes:
            values = _cast(trained, path, arch, dtypes(path))
        else:
            values = _merge(trained, path, read(path), scale)
        yield from zip(hf_names(path, arch), values, strict=True)


def _open_source(source: Path, arch: Architecture):
    """Returns functions of a path: the array's tensors, read one by one, and their dtypes."""
    table = weights(arch)
    if (source / ORBAX).is_dir():
        saved = open_orbax(source, arch)
        return (
            lambda path: (np.array(x) for x in table[path].split(saved.read(path))),
            lambda path: [saved.dtypes[path]] * len(hf_names(path, arch)),
        )
    tensors = open_tensors(source, arch)
    return (
        lambda path: (tensors[name].read() for name in hf_names(path, arch)),
        lambda path: [tensors[name].dtype for name in hf_names(path, arch)],
    )


def _cast(
    trained: OrbaxArrays, path: str, arch: Architecture, dtypes: list[np.dtype]
) -> Iterator[np.ndarray]:
    """Yields copies of a trained array's tensors in the source's dtypes."""
    layers = weights(arch)[path].split(trained.read(path))
    for layer, dtype in zip(layers, dtypes, strict=True):
        yield layer.astype(dtype)


def _merge(
    trained: OrbaxArrays, path: str, tensors: Iterator[np.ndarray], scale: float
) -> Iterator[np.ndarray]:
    """Yields the source's tensors with the LoRA factors that belong to them."""
    factors = [f"{path.removesuffix('weight')}{factor}" for factor in FACTORS]
    if factors[0] not in trained.shapes:
        yield from tensors
        return
    A, B = map(trained.read, factors)
    for layer, tensor in enumerate(tensors):
        yield merge(tensor, (A[layer], B[layer]), scale)


def export_adapter(source: Path, config: Config, trained: OrbaxArrays, out: Path) -> None:
    """Writes a run's LoRA factors as a folder that `peft.PeftModel.from_pretrained` loads."""
    from safetensors.numpy import save_file

    arch, lora = load_architecture(source), config.lora
    _check_trained(trained, config, arch, source)
    adapter_config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": config.student.path,
        "r": lora.rank,
        "lora_alpha": int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": list(lora.target_modules),
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
