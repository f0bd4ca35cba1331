"""Hugging Face and Orbax folders as sharded arrays; each process reads only its shards' bytes."""

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial, reduce
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from kd_jax.config import UserError
from kd_jax.config.errors import first_line, first_lines
from kd_jax.models.architecture import Architecture
from kd_jax.models.lora import merge
from kd_jax.models.weight_table import HEAD, hf_names, shape_problems, tensor_shapes, weights
from kd_jax.parallel.processes import say
from kd_jax.weights.adapters import Adapter
from kd_jax.weights.folder import ORBAX
from kd_jax.weights.orbax import OrbaxArrays
from kd_jax.weights.safetensors import Tensor, open_folder

BLOCK_BYTES = 16 * 2**20  # read at a time by one thread
EMBEDDING = "model.embed_tokens.weight"
_WRAPPERS = {"_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
_ANCHOR = "layers.0.self_attn.o_proj.weight"  # in every family


def check_shapes(
    found: Mapping[str, tuple[int, ...]],
    expected: Mapping[str, tuple[int, ...]],
    place: Path,
    problems: Sequence[str] = (),
) -> None:
    """Raises UserError with every array that does not fit the table, and with `problems`."""
    lines = [*problems, *shape_problems(found, expected)]
    if lines:
        shown = "\n  ".join(first_lines(lines))
        raise UserError(f"{place}: the tensors do not fit config.json:\n  {shown}")


def open_tensors(folder: Path, arch: Architecture, *, tell: bool = False) -> dict[str, Tensor]:
    """Returns the architecture's tensors in a Hugging Face folder, which must hold no others.

    Args:
      tell: warn of names that are read as others.

    Raises:
      UserError: tensors are missing, unexpected or misshapen; all are listed.
    """
    tensors = _unwrapped(open_folder(folder), folder, tell)
    if arch.tie_word_embeddings and EMBEDDING not in tensors and HEAD in tensors:
        tensors[EMBEDDING] = tensors[HEAD]  # as transformers reads a model that stores only this
    table = tensor_shapes(weights(arch), arch)
    shapes = {
        name: tensor.shape
        for name, tensor in tensors.items()
        if ".rotary_emb." not in name  # saved by old versions; computed here
        and not (arch.tie_word_embeddings and name == HEAD)
    }
    check_shapes(shapes, table, folder, _head_problems(tensors, arch))
    return {name: tensors[name] for name in table}


def _unwrapped(tensors: dict[str, Tensor], folder: Path, tell: bool) -> dict[str, Tensor]:
    """Returns the tensors by Hugging Face name, without what wrappers add to the names.

    torch.compile and distributed wrappers add parts such as `_orig_mod`. PEFT, models of several
    modalities and bare decoders have another prefix before `layers`.
    """
    names = {name: ".".join(x for x in name.split(".") if x not in _WRAPPERS) for name in tensors}
    prefixes = {name.removesuffix(_ANCHOR) for name in names.values() if name.endswith(_ANCHOR)}
    if len(prefixes) == 1:
        (prefix,) = prefixes
        outer = prefix.removesuffix("model.")
        for name, plain in names.items():
            if plain == f"{outer}{HEAD}":
                names[name] = HEAD
            elif plain.startswith(prefix):
                names[name] = f"model.{plain.removeprefix(prefix)}"
    changed = [name for name, plain in names.items() if name != plain]
    if not changed or len(set(names.values())) < len(names):
        return tensors
    if tell:
        say(
            f"warning: {folder}: {len(changed)} tensors have names such as {changed[0]}, which is "
            f"read as {names[changed[0]]}"
        )
    return {names[name]: tensor for name, tensor in tensors.items()}


def _head_problems(tensors: Mapping[str, Tensor], arch: Architecture) -> list[str]:
    """Returns an error for an untied lm_head that is absent, or a tied one with other values.

    transformers unties the second with a warning, and draws the first at random.
    """
    if not arch.tie_word_embeddings and HEAD not in tensors and EMBEDDING in tensors:
        return [
            f"missing: {HEAD}, which config.json does not tie to {EMBEDDING}. If the model ties "
            "them, set tie_word_embeddings to true there"
        ]
    if not arch.tie_word_embeddings or not {HEAD, EMBEDDING} <= tensors.keys():
        return []
    head, embedding = tensors[HEAD], tensors[EMBEDDING]
    if (
        head.shape
        and head.shape == embedding.shape
        and all(
            np.array_equal(head.read(*rows), embedding.read(*rows), equal_nan=True)
            for rows in _blocks(head, 0, head.shape[0])
        )
    ):
        return []
    return [
        f"unexpected: {HEAD} differs from {EMBEDDING}, though config.json ties them. Set "
        "tie_word_embeddings to false there to use both"
    ]


def _blocks(tensor: Tensor, first: int, last: int) -> Iterator[tuple[int, int]]:
    """Yields [start, stop) of blocks of rows, each at most BLOCK_BYTES or a single row."""
    step = max(1, BLOCK_BYTES // max(1, tensor.row_bytes))
    for start in range(first, last, step):
        yield start, min(start + step, last)


def open_orbax(folder: Path, arch: Architecture) -> OrbaxArrays:
    """Returns the arrays that convert.from_hf wrote, which must be the architecture's."""
    from orbax.checkpoint import v1 as ocp

    place = (folder / ORBAX).absolute()
    try:
        arrays = OrbaxArrays(place=place, saved=ocp.metadata(place).metadata)
        shapes = arrays.shapes
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = first_line(error)
        raise UserError(f"{place}: expected what convert.from_hf wrote ({reason})") from error
    check_shapes(shapes, {path: weight.shape for path, weight in weights(arch).items()}, place)
    return arrays


def check_tensors(folder: Path, arch: Architecture) -> None:
    """Raises UserError unless the folder holds exactly this architecture's tensors."""
    if (folder / ORBAX).is_dir():
        open_orbax(folder, arch)
    else:
        open_tensors(folder, arch, tell=True)


def stored_dtypes(folder: Path, arch: Architecture) -> dict[str, np.dtype]:
    """Returns the stored dtype of each array of `weights(arch)`; mixed layers are promoted."""
    if (folder / ORBAX).is_dir():
        return open_orbax(folder, arch).dtypes
    tensors = open_tensors(folder, arch)
    return {
        path: np.dtype(
            reduce(jnp.promote_types, [tensors[name].dtype for name in hf_names(path, arch)])
        )
        for path in weights(arch)
    }


def load_arrays(
    folder: Path,
    arch: Architecture,
    abstract: Mapping[str, jax.ShapeDtypeStruct],
    *,
    adapter: Adapter | None = None,
    donated: bool = False,
) -> dict[str, jax.Array]:
    """Returns the arrays named in `abstract`, read from the folder straight into their shards.

    Args:
      folder: Hugging Face form, or the output of convert.from_hf.
      abstract: shape, dtype and NamedSharding of any of `weights(arch)`; stored values are rounded
        to the dtype.
      adapter: merged in float32 before rounding.
      donated: a program will write its results in place of the arrays.
    """
    if (folder / ORBAX).is_dir():
        if adapter is not None:
            raise UserError(f"{folder}: an adapter needs its base in Hugging Face form")
        return open_orbax(folder, arch).load(abstract)
    tensors = open_tensors(folder, arch)
    arrays = {}
    with ThreadPoolExecutor(max_workers=8) as pool:
        for path, like in abstract.items():
            layers = [_Layer(tensors[name], name, adapter) for name in hf_names(path, arch)]
            arrays[path] = _load_array(pool, layers, like, donated)
    return arrays


@dataclass(frozen=True, slots=True)
class _Layer:
    """One stored tensor, and the adapter to merge into it."""

    tensor: Tensor
    name: str
    adapter: Adapter | None

    def read_rows(self, start: int, stop: int, shards: dict[tuple, np.ndarray]) -> None:
        """Reads rows once, and copies them to each shard's rows [start, stop) by its columns."""
        dtypes = {out.dtype for out in shards.values()}
        whole = all(out.shape[1:] == self.tensor.shape[1:] for out in shards.values())
        factors = None if self.adapter is None else self.adapter.factors_of(self.name)
        if whole and factors is None and dtypes == {self.tensor.dtype}:
            (out,) = shards.values()
            self.tensor.read_rows(out, start)
            return
        rows = self.tensor.read(start, stop)
        if self.adapter is not None and factors is not None:
            A, B = factors
            # Stays float32, so that the copy below rounds once.
            rows = merge(rows.astype(np.float32), (A, B[start:stop]), self.adapter.scale)
        for columns, out in shards.items():
            out[...] = rows[(slice(None), *(slice(*span) for span in columns))]


def _load_array(
    pool: ThreadPoolExecutor, layers: list[_Layer], like: jax.ShapeDtypeStruct, donated: bool
) -> jax.Array:
    """Reads one array's shards; a row that several devices need parts of is read once."""
    stacked = len(like.shape) > len(layers[0].tensor.shape)
    # Rows -> columns -> devices that hold this part.
    groups: dict[tuple[int, int], dict[tuple, list[jax.Device]]] = defaultdict(dict)
    for device, index in like.sharding.addressable_devices_indices_map(like.shape).items():
        assert index is not None  # every device of a NamedSharding has a part
        spans = [s.indices(n)[:2] for s, n in zip(index, like.shape, strict=True)][stacked:]
        groups[spans[0]].setdefault(tuple(spans[1:]), []).append(device)
    arrays = []
    for (first, last), devices in groups.items():
        make = partial(_host_array, dtype=like.dtype, shared=not donated)
        for columns, out in _read_shards(pool, layers, first, last, devices, make).items():
            host = out if stacked else out[0]
            arrays += [jax.device_put(host, device) for device in devices[columns]]
    # Waiting limits the host to one array if devices have their own memory.
    return jax.block_until_ready(
        jax.make_array_from_single_device_arrays(like.shape, like.sharding, arrays)
    )


def _read_shards(pool, layers: list[_Layer], first: int, last: int, parts, make_array):
    """Returns [L, last - first, ...] in host memory for each part of the columns."""
    shards = {
        columns: make_array((len(layers), last - first, *(stop - start for start, stop in columns)))
        for columns in parts
    }
    jobs = []
    for i, layer in enumerate(layers):
        for start, stop in _blocks(layer.tensor, first, last):
            rows = {c: out[i, start - first : stop - first] for c, out in shards.items()}
            jobs.append(pool.submit(layer.read_rows, start, stop, rows))
    for job in jobs:
        job.result()
    return shards


def _host_array(shape: tuple[int, ...], dtype: np.dtype, shared: bool) -> np.ndarray:
    """Returns an empty array, which a CPU device takes without a copy if `shared`.

    XLA takes memory at 64-byte boundaries, and writes no results in memory that it shares.
    """
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + 128, np.uint8)
    skip = -raw.ctypes.data % 64 + (0 if shared else 16)
    return raw[skip : skip + size].view(dtype).reshape(shape)
