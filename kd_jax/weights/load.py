"""Hugging Face folders as arrays: one name table, streamed and sharded, strict both ways."""

import math
from collections import defaultdict
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
from jax.sharding import NamedSharding

from kd_jax.config import UserError
from kd_jax.models.architecture import Architecture
from kd_jax.models.lora import merge
from kd_jax.models.table import HEAD, Weight, hf_names, weights
from kd_jax.weights.adapters import Adapter
from kd_jax.weights.folder import ORBAX
from kd_jax.weights.names import EMBEDDING, check_shapes
from kd_jax.weights.orbax import orbax_leaves
from kd_jax.weights.safetensors import Tensor, open_folder

BLOCK_BYTES = 16 * 2**20  # read at a time by one thread


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


def load_arrays(folder, arch, abstract, *, adapter=None):
    if not abstract:
        return {}
    one = next(iter(abstract.values()))
    if (folder / ORBAX).is_dir():
        if adapter is not None:
            raise UserError(f"{folder}: an adapter needs its base in Hugging Face form")
        orbax_leaves(folder, arch)
        return read_orbax(folder, abstract)
    tensors = open_tensors(folder, arch)
    arrays = {}
    with ThreadPoolExecutor(max_workers=8) as pool:
        for path, weight in weights(arch).items():
            names = hf_names(path, arch)
            layers = [_Layer(tensors[name], *_factors(name, adapter)) for name in names]
            x = abstract[path]
            arrays[path] = _load_array(pool, layers, weight, x.sharding, np.dtype(x.dtype))
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
