"""Hugging Face folders as arrays: one name table, streamed and sharded, strict both ways."""

import logging
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from kd_jax.config import LoraConfig, UserError
from kd_jax.config.errors import first_line
from kd_jax.config.run import LINEAR_NAMES
from kd_jax.disk import ORBAX, Tensor, open_folder, read_json
from kd_jax.models.architecture import Architecture, Weight, weights
from kd_jax.models.lora import FACTORS, merge, peft_name, peft_problems, peft_targets
from kd_jax.parallel.mesh import Layout

BLOCK_BYTES = 16 * 2**20  # read at a time by one thread
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def hf_names(path: str, arch: Architecture) -> list[str]:
    """Returns the Hugging Face names of one array: those of all layers, or its only one."""
    if path.startswith("layers."):
        rest = path.removeprefix("layers.")
        return [f"model.layers.{i}.{rest}" for i in range(arch.num_hidden_layers)]
    return [path if path == HEAD else f"model.{path}"]


def open_tensors(folder: Path, arch: Architecture) -> dict[str, Tensor]:
    """Returns a folder's tensors once they are known to be exactly this architecture's.

    Raises:
      UserError: tensors are missing, unexpected or misshapen; all are listed.
    """
    tensors = open_folder(folder)
    table: dict[str, tuple[int, ...]] = {}
    for path, weight in weights(arch).items():
        shape = weight.shape[1:] if path.startswith("layers.") else weight.shape
        table |= dict.fromkeys(hf_names(path, arch), shape)
    redundant = {name for name in tensors if _is_redundant(name, tensors, arch)}
    shapes = {name: tensors[name].shape for name in tensors.keys() - redundant}
    check_shapes(shapes, table, folder, _head_problems(tensors, arch))
    return {name: tensors[name] for name in table}


def check_shapes(
    shapes: Mapping[str, tuple[int, ...]],
    expected: Mapping[str, tuple[int, ...]],
    place: Path,
    problems: Sequence[str] = (),
) -> None:
    lines = [f"missing: {n} {list(expected[n])}" for n in sorted(expected.keys() - shapes)]
    lines += [f"unexpected: {n} {list(shapes[n])}" for n in sorted(shapes.keys() - expected)]
    for name in sorted(expected.keys() & shapes.keys()):
        want, got = list(expected[name]), list(shapes[name])
        if got != want:
            lines.append(f"misshapen: {name}: expected {want}, got {got}")
    lines += problems
    if lines:
        raise UserError(f"{place}: the tensors do not fit config.json:\n  " + "\n  ".join(lines))


def _is_redundant(name: str, tensors: Mapping[str, Tensor], arch: Architecture) -> bool:
    """Tells whether a tensor repeats what the model has: a tied head, old rotary buffers."""
    tied_head = arch.tie_word_embeddings and name == HEAD
    return tied_head or name.endswith("rotary_emb.inv_freq")


def _head_problems(tensors: Mapping[str, Tensor], arch: Architecture) -> list[str]:
    """Returns what is wrong where a tied head is stored with other values than the embedding's.

    transformers unties such a model with a warning.
    """
    head, embedding = tensors.get(HEAD), tensors.get(EMBEDDING)
    if not arch.tie_word_embeddings or head is None or embedding is None:
        return []
    if head.shape == embedding.shape and _same_values(head, embedding):
        return []
    return [
        f"unexpected: {HEAD} differs from {EMBEDDING}, though config.json ties them. Set "
        "tie_word_embeddings to false there to use both"
    ]


def _same_values(a: Tensor, b: Tensor) -> bool:
    """Compares two tensors of one shape, some rows at a time."""
    step = max(1, BLOCK_BYTES // max(1, a.row_bytes))
    for start in range(0, a.shape[0], step):
        stop = min(start + step, a.shape[0])
        if not np.array_equal(a.read(start, stop), b.read(start, stop), equal_nan=True):
            return False
    return True


def check_source(folder: Path, arch: Architecture) -> None:
    """Raises UserError unless the folder holds exactly this architecture's tensors."""
    if (folder / ORBAX).is_dir():
        orbax_leaves(folder, arch)
    else:
        open_tensors(folder, arch)


@dataclass(frozen=True, slots=True)
class Adapter:
    """A PEFT LoRA adapter: factors by Hugging Face module name, and the scale of B A."""

    factors: dict[str, tuple[np.ndarray, np.ndarray]]
    config: LoraConfig
    scale: float


def load_adapter(folder: Path, arch: Architecture) -> Adapter:
    """Reads a PEFT folder; anything but plain LoRA on the seven projections is refused."""
    path = folder / "adapter_config.json"
    config = read_json(path)
    tensors = open_folder(folder, single="adapter_model.safetensors")
    shapes = {
        name.removesuffix(".weight"): weight.shape[1:]
        for array, weight in weights(arch).items()
        if array.endswith("_proj.weight")
        for name in hf_names(array, arch)
    }
    problems = peft_problems(config)
    modules = sorted(peft_targets(config, shapes, problems))
    wanted = {peft_name(module, factor) for module in modules for factor in FACTORS}
    problems += [f"missing: {name}" for name in sorted(wanted - tensors.keys())]
    problems += [f"unexpected: {name}" for name in sorted(tensors.keys() - wanted)]
    rank = config.get("r")
    for module in modules:
        num_out, num_in = shapes[module]
        for factor, shape in zip(FACTORS, ((rank, num_in), (num_out, rank)), strict=True):
            found = tensors.get(peft_name(module, factor))
            if found is not None and found.shape != shape:
                got = list(found.shape)
                problems.append(f"misshapen: {module}.{factor}: expected {list(shape)}, got {got}")
    if not modules:
        problems.append("target_modules, layers_to_transform: no projection is left to adapt")
    if problems:
        raise UserError(f"{path}: this adapter cannot be loaded:\n  " + "\n  ".join(problems))
    assert isinstance(rank, int)
    factors = {
        m: tuple(tensors[peft_name(m, factor)].read().astype(np.float32) for factor in FACTORS)
        for m in modules
    }
    alpha = config["lora_alpha"] * (math.sqrt(rank) if config.get("use_rslora") else 1)
    targets = tuple(n for n in LINEAR_NAMES if any(m.endswith(f".{n}") for m in modules))
    lora = LoraConfig(rank=rank, alpha=alpha, target_modules=targets)
    return Adapter(factors, lora, alpha / rank)  # type: ignore[arg-type]


def stack_adapter(adapter: Adapter, arch: Architecture) -> dict[str, np.ndarray]:
    """Returns the factors stacked over layers, by their dotted paths in a model."""
    stacked, partly = {}, []
    for path in weights(arch):
        module = path.removesuffix(".weight")
        names = [name.removesuffix(".weight") for name in hf_names(path, arch)]
        absent = [str(i) for i, name in enumerate(names) if name not in adapter.factors]
        if len(absent) == len(names):
            continue
        if absent:
            partly.append(f"{module}: none in layers {', '.join(absent)}")
            continue
        for k, factor in enumerate(FACTORS):
            stacked[f"{module}.{factor}"] = np.stack([adapter.factors[n][k] for n in names])
    if partly:
        raise UserError(
            "student.adapter: expected factors in every layer to go on from, got some layers only:"
            "\n  " + "\n  ".join(partly) + "\nMerge the adapter into its base with peft first"
        )
    return stacked


def load_arrays(
    folder: Path,
    arch: Architecture,
    layout: Layout,
    dtype: str | None,
    *,
    adapter: Adapter | None = None,
) -> dict[str, jax.Array]:
    """Returns every array of `weights(arch)`, read from the folder straight into its shards.

    Args:
      folder: Hugging Face form, or what convert.from_hf wrote.
      dtype: of the result; stored values are rounded to it. None keeps what is stored.
      adapter: merged in float32 before that rounding.
    """
    if (folder / ORBAX).is_dir():
        if adapter is not None:
            raise UserError(f"{folder}: an adapter needs its base in Hugging Face form")
        return _load_orbax(folder, arch, layout, dtype)
    tensors = open_tensors(folder, arch)
    arrays: dict[str, jax.Array] = {}
    with ThreadPoolExecutor(max_workers=8) as pool:
        for path, weight in weights(arch).items():
            names = hf_names(path, arch)
            stored = [tensors[name].dtype for name in names]
            out = np.dtype(reduce(jnp.promote_types, stored) if dtype is None else jnp.dtype(dtype))
            layers = [_Layer(tensors[name], *_factors(name, adapter)) for name in names]
            sharding = layout.sharding(weight.dims, weight.shape)
            arrays[path] = _load_array(pool, layers, weight, sharding, out)
    return arrays


@dataclass(frozen=True, slots=True)
class _Layer:
    """One stored tensor, and the low-rank factors that are merged into it."""

    tensor: Tensor
    factors: tuple[np.ndarray, np.ndarray] | None
    scale: float

    def read_rows(self, start: int, stop: int, shards: dict[tuple, np.ndarray]) -> None:
        """Reads rows once, into each shard's own rows [start, stop) by its columns."""
        dtypes = {out.dtype for out in shards.values()}
        whole = all(out.shape[1:] == self.tensor.shape[1:] for out in shards.values())
        if whole and self.factors is None and dtypes == {self.tensor.dtype}:
            (out,) = shards.values()
            self.tensor.read_rows(out, start)
            return
        rows = self.tensor.read(start, stop)
        if self.factors is not None:
            A, B = self.factors
            # The sum is rounded to the result's dtype below, once.
            rows = merge(rows.astype(np.float32), (A, B[start:stop]), self.scale)
        for columns, out in shards.items():
            out[...] = rows[(slice(None), *(slice(*span) for span in columns))]


def _factors(name: str, adapter: Adapter | None):
    if adapter is None:
        return None, 0.0
    return adapter.factors.get(name.removesuffix(".weight")), adapter.scale


def _load_array(
    pool: ThreadPoolExecutor,
    layers: list[_Layer],
    weight: Weight,
    sharding: NamedSharding,
    dtype: np.dtype,
) -> jax.Array:
    """Reads one array's shards; a row that several devices want parts of is read once."""
    stacked = len(weight.shape) > len(layers[0].tensor.shape)
    groups: dict[tuple[int, int], dict[tuple, list[jax.Device]]] = defaultdict(dict)
    for device, index in sharding.addressable_devices_indices_map(weight.shape).items():
        assert index is not None  # every device of a NamedSharding has a part
        spans = [s.indices(n)[:2] for s, n in zip(index, weight.shape, strict=True)][stacked:]
        groups[spans[0]].setdefault(tuple(spans[1:]), []).append(device)
    arrays = []
    for (first, last), devices in groups.items():
        shards = {
            columns: _aligned(
                (len(layers), last - first, *(stop - start for start, stop in columns)), dtype
            )
            for columns in devices
        }
        step = max(1, BLOCK_BYTES // layers[0].tensor.row_bytes)
        jobs = []
        for i, layer in enumerate(layers):
            for start in range(first, last, step):
                stop = min(start + step, last)
                parts = {c: out[i, start - first : stop - first] for c, out in shards.items()}
                jobs.append(pool.submit(layer.read_rows, start, stop, parts))
        for job in jobs:
            job.result()
        for columns, out in shards.items():
            host = out if stacked else out[0]
            arrays += [jax.device_put(host, device) for device in devices[columns]]
    # Waiting keeps the host from holding more than one array where devices have their own memory.
    return jax.block_until_ready(
        jax.make_array_from_single_device_arrays(weight.shape, sharding, arrays)
    )


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Returns an empty array at a 64-byte boundary, which a CPU device takes without a copy."""
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + 64, np.uint8)
    skip = -raw.ctypes.data % 64
    return raw[skip : skip + size].view(dtype).reshape(shape)


def orbax_leaves(folder: Path, arch: Architecture) -> dict[str, Any]:
    """Returns shape and dtype of what convert.from_hf wrote, once they fit the architecture."""
    from orbax.checkpoint import v1 as ocp

    place = (folder / ORBAX).absolute()
    try:
        saved = ocp.metadata(place).metadata
        shapes = {path: leaf.shape for path, leaf in saved.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = first_line(error)
        raise UserError(f"{place}: expected what convert.from_hf wrote ({reason})") from error
    check_shapes(shapes, {path: w.shape for path, w in weights(arch).items()}, place)
    return saved


def _load_orbax(folder, arch, layout, dtype):
    saved = orbax_leaves(folder, arch)
    abstract = {
        path: jax.ShapeDtypeStruct(
            weight.shape,
            saved[path].dtype if dtype is None else dtype,
            sharding=layout.sharding(weight.dims, weight.shape),
        )
        for path, weight in weights(arch).items()
    }
    return read_orbax(folder, abstract)


def read_orbax(folder: Path, abstract: dict[str, Any]) -> dict[str, Any]:
    from orbax.checkpoint import v1 as ocp

    place = (folder / ORBAX).absolute()
    try:
        with absl_silent():
            return ocp.load(place, abstract)
    except Exception as error:  # Orbax raises no narrower class for a damaged file
        reason = first_line(error.__cause__ or error)
        raise UserError(f"{place}: cannot be read ({reason})") from error


@contextmanager
def absl_silent() -> Iterator[None]:
    """Keeps Orbax from printing the traceback of what it raises as well."""
    logger = logging.getLogger("absl")
    before, logger.disabled = logger.disabled, True
    yield
    logger.disabled = before  # but not after an error: threads of the failed call still print
