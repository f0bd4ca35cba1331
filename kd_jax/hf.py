"""Hugging Face folders in and out: one name table, streamed and sharded, strict both ways."""

import hashlib
import json
import logging
import math
import os
import shutil
import struct
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.sharding import Mesh, NamedSharding
from safetensors import SafetensorError

from kd_jax.config import LINEAR_NAMES, LoraConfig, MeshConfig, UserError
from kd_jax.lora import FACTORS, is_adapter, merge, peft_name, peft_problems, peft_targets
from kd_jax.model import Architecture, Weight, read_architecture, weights
from kd_jax.sharding import RULES, Rules, make_mesh, weight_sharding

DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
INDEX = "model.safetensors.index.json"
HEADER_BYTES = 100_000_000  # the format's own limit
BLOCK_BYTES = 16 * 2**20  # read at a time by one thread
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
ORBAX = "orbax"
EXTRA_FILES = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "tokenizer.model", "chat_template.jinja", "vocab.json", "merges.txt", "added_tokens.json",
)  # fmt: skip


def resolve(path: str, field: str) -> Path:
    """Returns the local folder of a path or hub id, downloading what a hub id lacks locally."""
    folder = Path(os.path.expanduser(path))
    if folder.is_dir():
        return folder
    if folder.exists():
        raise UserError(f"{field}: expected a folder or a hub id, got {path}, which is a file")
    if path.startswith(("/", ".", "~")) or path.count("/") != 1:
        raise UserError(f"{field}: expected a folder or a hub id, got {path}, which is not there")
    from huggingface_hub import snapshot_download

    wanted = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model", "merges.txt"]
    try:
        return Path(snapshot_download(path, allow_patterns=wanted))
    except Exception as error:
        raise UserError(
            f"{field}: {path} is no local folder, and fetching it from the hub failed "
            f"({type(error).__name__}: {_first_line(error)}). "
            "Check the name, the network and your token (HF_TOKEN), or give a folder"
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    try:
        tree = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path}: expected a JSON file, which is not there") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: expected JSON, got {error}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected a JSON object, got {type(tree).__name__}")
    return tree


def load_architecture(folder: Path) -> Architecture:
    path = folder / "config.json"
    return read_architecture(read_json(path), str(path))


def fingerprint(folder: Path) -> str:
    """Returns a hash of what a folder's model or adapter is, whatever the folder's name.

    Of each megabyte of weights the first 4 KiB count: training and merging change nearly all
    values of a tensor, and so the hash, while hashing every byte would take longer than loading.
    """
    files = [folder / "config.json", folder / "adapter_config.json"]
    files += [*folder.glob("*.safetensors"), *(folder / ORBAX).rglob("*")]
    digest = hashlib.sha256()
    for path in sorted(path for path in files if path.is_file()):
        size = path.stat().st_size
        digest.update(f"{path.relative_to(folder)} {size}\n".encode())
        with open(path, "rb", buffering=0) as file:
            for start in range(0, size, 2**20):
                file.seek(start)
                digest.update(file.read(2**12))
    return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class Tensor:
    """Where one tensor lies in a safetensors file."""

    file: Path
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Returns the rows from `start` to `stop`, reading no byte of the others."""
        stop = self.shape[0] if stop is None else stop
        out = np.empty((stop - start, *self.shape[1:]), self.dtype)
        self.read_rows(out, start)
        return out

    def read_rows(self, out: np.ndarray, start: int) -> None:
        """Fills `out`, contiguous and of this tensor's dtype, with the rows from `start`."""
        self._read_into(out, self.offset + start * self.row_bytes)

    @property
    def row_bytes(self) -> int:
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    def _read_into(self, out: np.ndarray, offset: int) -> None:
        # Not a memory map: mapped pages would count as this process's memory beside the copy.
        assert out.flags.c_contiguous  # else reshape would copy, and the bytes would be lost
        view = memoryview(out.reshape(-1).view(np.uint8))
        with open(self.file, "rb", buffering=0) as file:
            file.seek(offset)
            done = 0
            while done < len(view):
                count = file.readinto(view[done:])
                if not count:
                    raise UserError(f"{self.file}: ended early; it changed while it was read")
                done += count


def read_header(file: Path) -> dict[str, Tensor]:
    """Returns the tensors of a safetensors file, by name, after checking the file's length."""
    try:
        size = file.stat().st_size
        with open(file, "rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > min(size - 8, HEADER_BYTES):
                raise ValueError(f"its header is said to have {length} bytes")
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        tensors = {}
        end = 0
        for name, entry in header.items():
            if entry["dtype"] not in DTYPES:
                known = ", ".join(DTYPES)
                raise ValueError(f"{name} has dtype {entry['dtype']}, expected one of {known}")
            begin, stop = entry["data_offsets"]
            tensor = Tensor(file, 8 + length + begin, tuple(entry["shape"]), DTYPES[entry["dtype"]])
            if begin < 0 or stop - begin != math.prod(tensor.shape) * tensor.dtype.itemsize:
                raise ValueError(f"{name} does not fill its bytes")
            tensors[name] = tensor
            end = max(end, stop)
        if size < 8 + length + end:
            raise ValueError(f"truncated: expected {8 + length + end} bytes, got {size}")
    except FileNotFoundError:
        raise UserError(f"{file}: expected a safetensors file, which is not there") from None
    except (
        *(OSError, ValueError, KeyError, TypeError, AttributeError, struct.error, RecursionError),
    ) as error:
        raise UserError(f"{file}: expected a whole safetensors file ({error})") from None
    return tensors


def open_folder(folder: Path, single: str = "model.safetensors") -> dict[str, Tensor]:
    """Returns every tensor of a folder in Hugging Face form, one file or sharded."""
    if (folder / single).is_file():  # before an index, as in transformers
        return read_header(folder / single)
    if (folder / INDEX).is_file():
        return _open_shards(folder)
    pickles = [p.name for p in folder.glob("*") if p.suffix in (".bin", ".pt", ".pth", ".ckpt")]
    if pickles:
        raise UserError(
            f"{folder}: expected safetensors, got pickled weights ({', '.join(sorted(pickles))}), "
            "which can run any code and are never loaded. Save them with "
            "save_pretrained(..., safe_serialization=True)"
        )
    others = ", ".join(sorted(p.name for p in folder.glob("*.safetensors"))) or "neither"
    raise UserError(f"{folder}: expected {single} or {INDEX}, got {others}")


def _open_shards(folder: Path) -> dict[str, Tensor]:
    """Returns every tensor of the files that the index names, each from the file it gives."""
    path = folder / INDEX
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(f, str) for f in weight_map.values()):
        raise UserError(f"{path}: expected weight_map to give each tensor's file")
    files = sorted(set(weight_map.values()))
    absent = [name for name in files if not (folder / name).is_file()]
    if absent:
        raise UserError(f"{path}: names files that are not there: {', '.join(absent)}")
    tensors: dict[str, Tensor] = {}
    for file in files:
        found = read_header(folder / file).items()
        tensors |= {name: t for name, t in found if weight_map.get(name, file) == file}
    lost = [f"{name} ({weight_map[name]})" for name in sorted(weight_map.keys() - tensors.keys())]
    if lost:
        raise UserError(f"{path}: names tensors that their files do not have: {', '.join(lost)}")
    return tensors


def hf_names(path: str, arch: Architecture) -> list[str]:
    """Returns the Hugging Face names of one array: those of all layers, or its only one."""
    if path.startswith("layers."):
        rest = path.removeprefix("layers.")
        return [f"model.layers.{i}.{rest}" for i in range(arch.num_hidden_layers)]
    return [path if path == HEAD else f"model.{path}"]


def open_model(folder: Path, arch: Architecture) -> dict[str, Tensor]:
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
    _check_shapes(shapes, table, folder, _head_problems(tensors, arch))
    return {name: tensors[name] for name in table}


def _check_shapes(
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
        _orbax_leaves(folder, arch)
    else:
        open_model(folder, arch)


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
    mesh: Mesh,
    dtype: str | None,
    *,
    adapter: Adapter | None = None,
    rules: Rules = RULES,
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
        return _load_orbax(folder, arch, mesh, dtype, rules)
    tensors = open_model(folder, arch)
    arrays: dict[str, jax.Array] = {}
    with ThreadPoolExecutor(max_workers=8) as pool:
        for path, weight in weights(arch).items():
            names = hf_names(path, arch)
            stored = [tensors[name].dtype for name in names]
            out = np.dtype(reduce(jnp.promote_types, stored) if dtype is None else jnp.dtype(dtype))
            layers = [_Layer(tensors[name], *_factors(name, adapter)) for name in names]
            sharding = weight_sharding(mesh, weight.dims, weight.shape, rules)
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


def _orbax_leaves(folder: Path, arch: Architecture) -> dict[str, Any]:
    """Returns shape and dtype of what convert.from_hf wrote, once they fit the architecture."""
    from orbax.checkpoint import v1 as ocp

    place = (folder / ORBAX).absolute()
    try:
        saved = ocp.metadata(place).metadata
        shapes = {path: leaf.shape for path, leaf in saved.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = _first_line(error)
        raise UserError(f"{place}: expected what convert.from_hf wrote ({reason})") from error
    _check_shapes(shapes, {path: w.shape for path, w in weights(arch).items()}, place)
    return saved


def _load_orbax(folder, arch, mesh, dtype, rules):
    saved = _orbax_leaves(folder, arch)
    abstract = {
        path: jax.ShapeDtypeStruct(
            weight.shape,
            saved[path].dtype if dtype is None else dtype,
            sharding=weight_sharding(mesh, weight.dims, weight.shape, rules),
        )
        for path, weight in weights(arch).items()
    }
    return _read_orbax(folder, abstract)


def _read_orbax(folder: Path, abstract: dict[str, Any]) -> dict[str, Any]:
    from orbax.checkpoint import v1 as ocp

    place = (folder / ORBAX).absolute()
    try:
        with _absl_silent():
            return ocp.load(place, abstract)
    except Exception as error:  # Orbax raises no narrower class for a damaged file
        reason = _first_line(error.__cause__ or error)
        raise UserError(f"{place}: cannot be read ({reason})") from error


@contextmanager
def _absl_silent() -> Iterator[None]:
    """Keeps Orbax from printing the traceback of what it raises as well."""
    logger = logging.getLogger("absl")
    before, logger.disabled = logger.disabled, True
    yield
    logger.disabled = before  # but not after an error: threads of the failed call still print


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def save_orbax(source: Path, out: Path) -> None:
    """Writes a Hugging Face folder as config.json, tokenizer files and one Orbax checkpoint."""
    from orbax.checkpoint import v1 as ocp

    arch = load_architecture(source)
    check_source(source, arch)
    mesh = make_mesh(MeshConfig(fsdp=-1, data=1), jax.device_count())
    with new_folder(out) as folder:
        arrays = load_arrays(source, arch, mesh, None)
        try:
            with _absl_silent():
                ocp.save((folder / ORBAX).absolute(), arrays)
        except ValueError as error:  # a full disk, in tensorstore's words
            raise OSError(_first_line(error)) from error
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
    _check_shapes({path: value.shape for path, value in trained.items()}, expected, source)


def _reader(source: Path, arch: Architecture, place: dict[str, tuple[str, int | None]]):
    """Returns how to read one tensor of the source by its Hugging Face name, and its dtype."""
    if not (source / ORBAX).is_dir():
        tensors = open_model(source, arch)
        return (lambda name: tensors[name].read()), (lambda name: tensors[name].dtype)
    from orbax.checkpoint import v1 as ocp

    saved = _orbax_leaves(source, arch)
    held: dict[str, np.ndarray] = {}  # the array last read; names come array by array

    def read(name: str) -> np.ndarray:
        path, layer = place[name]
        if path not in held:
            held.clear()
            abstract = dict.fromkeys(saved, ocp.PLACEHOLDER)
            abstract[path] = np.empty(saved[path].shape, saved[path].dtype)
            held[path] = _read_orbax(source, abstract)[path]
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
