"""Hugging Face folders in and out: one name table, streamed and sharded, strict both ways."""

import json
import math
import os
import shutil
import struct
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from jax.sharding import Mesh

from kd_jax.config import LINEAR_NAMES, LoraConfig, MeshConfig, UserError
from kd_jax.lora import FACTORS, peft_name
from kd_jax.model import Architecture, read_architecture, weights
from kd_jax.sharding import RULES, Rules, make_mesh, weight_sharding

DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
INDEX = "model.safetensors.index.json"
ORBAX = "orbax"
EXTRA_FILES = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "tokenizer.model", "chat_template.jinja", "vocab.json", "merges.txt", "added_tokens.json",
)  # fmt: skip


def resolve(path: str, field: str) -> Path:
    """Returns the local folder of a path or hub id, downloading what a hub id lacks locally."""
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    looks_local = path.startswith(("/", ".", "~")) or path.count("/") != 1
    if looks_local or folder.exists():
        raise UserError(f"{field}: expected a folder or a hub id, got {path}, which is not there")
    from huggingface_hub import snapshot_download

    wanted = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model", "merges.txt"]
    try:
        return Path(snapshot_download(path, allow_patterns=wanted))
    except Exception as error:
        raise UserError(
            f"{field}: {path} is no local folder, and fetching it from the hub failed "
            f"({type(error).__name__}: {str(error).splitlines()[0]}). "
            "Check the name, the network and your token (HF_TOKEN), or give a folder"
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path}: expected a JSON file, which is not there") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: expected JSON, got {error}") from None


def load_architecture(folder: Path) -> Architecture:
    path = folder / "config.json"
    return read_architecture(read_json(path), str(path))


@dataclass(frozen=True, slots=True)
class Tensor:
    """Where one tensor lies in a safetensors file."""

    file: Path
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype

    def read(self, index: tuple[slice, ...] = ()) -> np.ndarray:
        """Returns the indexed part, reading no more than the rows that it touches."""
        rows = index[0] if index else slice(None)
        start, stop, _ = rows.indices(self.shape[0])
        row_bytes = math.prod(self.shape[1:]) * self.dtype.itemsize
        out = np.empty((stop - start, *self.shape[1:]), self.dtype)
        self._read_into(out, self.offset + start * row_bytes)
        return out[(slice(None), *index[1:])]

    def _read_into(self, out: np.ndarray, offset: int) -> None:
        # Not a memory map: mapped pages would count as this process's memory beside the copy.
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
            if length > size:
                raise ValueError("the header is cut off")
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
            if stop - begin != math.prod(tensor.shape) * tensor.dtype.itemsize:
                raise ValueError(f"{name} does not fill its bytes")
            tensors[name] = tensor
            end = max(end, stop)
        if size < 8 + length + end:
            raise ValueError(f"truncated: expected {8 + length + end} bytes, got {size}")
    except FileNotFoundError:
        raise UserError(f"{file}: expected a safetensors file, which is not there") from None
    except (ValueError, KeyError, TypeError, struct.error, UnicodeDecodeError) as error:
        raise UserError(f"{file}: not a whole safetensors file ({error})") from None
    return tensors


def open_folder(folder: Path, single: str = "model.safetensors") -> dict[str, Tensor]:
    """Returns every tensor of a folder in Hugging Face form, one file or sharded."""
    index_path = folder / INDEX
    if index_path.is_file():
        weight_map = read_json(index_path).get("weight_map", {})
        files = sorted(set(weight_map.values()))
        absent = [name for name in files if not (folder / name).is_file()]
        if absent:
            raise UserError(f"{index_path}: names files that are not there: {', '.join(absent)}")
        tensors: dict[str, Tensor] = {}
        for name in files:
            tensors |= read_header(folder / name)
        lost = sorted(weight_map.keys() - tensors.keys())
        if lost:
            raise UserError(f"{index_path}: names tensors that no file has: {', '.join(lost)}")
        return tensors
    if (folder / single).is_file():
        return read_header(folder / single)
    pickles = [p.name for p in folder.glob("*") if p.suffix in (".bin", ".pt", ".pth", ".ckpt")]
    if pickles:
        raise UserError(
            f"{folder}: expected safetensors, got pickled weights ({', '.join(sorted(pickles))}), "
            "which can run any code and are never loaded. Save them with "
            "save_pretrained(..., safe_serialization=True)"
        )
    raise UserError(f"{folder}: expected {single} or {INDEX}, got neither")


def hf_names(path: str, arch: Architecture) -> list[str]:
    """Returns the Hugging Face names of one array: those of all layers, or its only one."""
    if path.startswith("layers."):
        rest = path.removeprefix("layers.")
        return [f"model.layers.{i}.{rest}" for i in range(arch.num_hidden_layers)]
    return [path if path == "lm_head.weight" else f"model.{path}"]


def check_names(tensors: dict[str, Tensor], arch: Architecture, folder: Path) -> None:
    """Raises UserError with every tensor that is missing, unexpected or misshapen."""
    table: dict[str, tuple[int, ...]] = {}
    for path, weight in weights(arch).items():
        shape = weight.shape[1:] if path.startswith("layers.") else weight.shape
        table |= dict.fromkeys(hf_names(path, arch), shape)
    problems = [f"missing: {name} {list(table[name])}" for name in sorted(table.keys() - tensors)]
    for name in sorted(tensors.keys() - table.keys()):
        if not _is_redundant(name, arch):
            problems.append(f"unexpected: {name} {list(tensors[name].shape)}")
    for name in sorted(table.keys() & tensors.keys()):
        if tensors[name].shape != table[name]:
            got = list(tensors[name].shape)
            problems.append(f"misshapen: {name}: expected {list(table[name])}, got {got}")
    if problems:
        lines = "\n  ".join(problems)
        raise UserError(f"{folder}: the tensors do not fit config.json:\n  {lines}")


def _is_redundant(name: str, arch: Architecture) -> bool:
    """Tells whether a tensor repeats what the model has: a tied head, old rotary buffers."""
    tied_head = arch.tie_word_embeddings and name == "lm_head.weight"
    return tied_head or name.endswith("rotary_emb.inv_freq")


def check_source(folder: Path, arch: Architecture) -> None:
    """Raises UserError unless the folder's files hold exactly this architecture's tensors."""
    if not (folder / ORBAX).is_dir():
        check_names(open_folder(folder), arch, folder)


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
    fixed: dict[str, tuple[Any, ...]] = {
        "peft_type": ("LORA",), "use_dora": (False, None), "bias": ("none", None),
        "modules_to_save": (None, []), "rank_pattern": ({}, None), "alpha_pattern": ({}, None),
        "fan_in_fan_out": (False, None),
    }  # fmt: skip
    problems = [
        f"{key}: expected {values[0]!r}, got {config.get(key)!r}"
        for key, values in fixed.items()
        if config.get(key) not in values
    ]
    tensors = open_folder(folder, single="adapter_model.safetensors")
    shapes = {}
    for path_, weight in weights(arch).items():
        if path_.endswith("_proj.weight"):
            for name in hf_names(path_, arch):
                shapes[name.removesuffix(".weight")] = weight.shape[1:]
    rank = config.get("r", 0)
    factors = {}
    wanted = {peft_name(module, factor): module for module in shapes for factor in FACTORS}
    problems += [f"unexpected: {name}" for name in sorted(tensors.keys() - wanted.keys())]
    for module in sorted({wanted[name] for name in tensors.keys() & wanted.keys()}):
        pair = [tensors.get(peft_name(module, factor)) for factor in FACTORS]
        num_out, num_in = shapes[module]
        expected = ((rank, num_in), (num_out, rank))
        got = tuple(None if t is None else t.shape for t in pair)
        if got != expected:
            problems.append(f"{module}: expected factors {expected}, got {got}")
        else:
            factors[module] = tuple(t.read().astype(np.float32) for t in pair if t is not None)
    if problems:
        raise UserError(f"{path}: this adapter cannot be loaded:\n  " + "\n  ".join(problems))
    rank_scaled = bool(config.get("use_rslora"))
    scale = config["lora_alpha"] / (math.sqrt(rank) if rank_scaled else rank)
    targets = tuple(n for n in LINEAR_NAMES if any(m.endswith(n) for m in factors))
    lora = LoraConfig(rank=rank, alpha=scale * rank, target_modules=targets)
    return Adapter(factors, lora, scale)  # type: ignore[arg-type]


def stack_adapter(adapter: Adapter, arch: Architecture) -> dict[str, np.ndarray]:
    """Returns the factors stacked over layers, by their dotted paths in a model."""
    stacked = {}
    for path in weights(arch):
        module = path.removesuffix(".weight")
        names = [name.removesuffix(".weight") for name in hf_names(path, arch)]
        present = [name in adapter.factors for name in names]
        if not any(present):
            continue
        if not all(present):
            raise UserError(f"adapter: {module} has factors in some layers only; merge it instead")
        for k, factor in enumerate(FACTORS):
            stacked[f"{module}.{factor}"] = np.stack([adapter.factors[n][k] for n in names])
    return stacked


def merge(weight: np.ndarray, factors: tuple[np.ndarray, np.ndarray], scale: float) -> np.ndarray:
    """Returns weight + scale B A, summed in float32 and rounded to the weight's dtype.

    Entries that the adapter leaves alone keep their bits, the sign of zero too.
    """
    A, B = factors
    delta = scale * (B.astype(np.float32) @ A.astype(np.float32))
    merged = (weight.astype(np.float32) + delta).astype(weight.dtype)
    return np.where(delta == 0, weight, merged)


def load_arrays(
    folder: Path,
    arch: Architecture,
    mesh: Mesh,
    dtype: str,
    *,
    adapter: Adapter | None = None,
    rules: Rules = RULES,
) -> dict[str, jax.Array]:
    """Returns every array of `weights(arch)`, read shard by shard from the folder.

    Args:
      folder: Hugging Face form, or what convert.from_hf wrote.
      dtype: of the result; stored values are rounded to it.
      adapter: merged in float32 before that rounding.
    """
    if (folder / ORBAX).is_dir():
        if adapter is not None:
            raise UserError(f"{folder}: an adapter needs its base in Hugging Face form")
        return _load_orbax(folder, arch, mesh, dtype, rules)
    tensors = open_folder(folder)
    check_names(tensors, arch, folder)
    arrays: dict[str, jax.Array] = {}
    with ThreadPoolExecutor(max_workers=4) as pool:
        for path, weight in weights(arch).items():
            names = hf_names(path, arch)
            sharding = weight_sharding(mesh, weight.dims, weight.shape, rules)
            stacked = path.startswith("layers.")

            def read_shard(index, names=names, stacked=stacked):
                if not stacked:
                    return _read(tensors[names[0]], names[0], index, dtype, adapter)
                names = names[index[0]]
                jobs = [
                    pool.submit(_read, tensors[name], name, index[1:], dtype, adapter)
                    for name in names
                ]
                first = jobs[0].result()
                out = _aligned((len(names), *first.shape), first.dtype)
                for i, job in enumerate(jobs):
                    out[i] = job.result()
                    jobs[i] = None
                return out

            arrays[path] = jax.make_array_from_callback(weight.shape, sharding, read_shard)
    return arrays


def _read(tensor: Tensor, name: str, index, dtype: str, adapter: Adapter | None) -> np.ndarray:
    part = tensor.read(index)
    module = name.removesuffix(".weight")
    if adapter is not None and module in adapter.factors:
        A, B = adapter.factors[module]
        rows, columns = index
        part = merge(part.astype(np.float32), (A[:, columns], B[rows]), adapter.scale)
    return part.astype(jax.numpy.dtype(dtype), copy=False)


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Returns an empty array at a 64-byte boundary, which a CPU device takes without a copy."""
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + 64, np.uint8)
    skip = -raw.ctypes.data % 64
    return raw[skip : skip + size].view(dtype).reshape(shape)


def _load_orbax(folder, arch, mesh, dtype, rules):
    from orbax.checkpoint import v1 as ocp

    abstract = {
        path: jax.ShapeDtypeStruct(
            weight.shape, dtype, sharding=weight_sharding(mesh, weight.dims, weight.shape, rules)
        )
        for path, weight in weights(arch).items()
    }
    try:
        return ocp.load((folder / ORBAX).absolute(), abstract)
    except (ValueError, KeyError, FileNotFoundError) as error:
        raise UserError(f"{folder / ORBAX}: cannot be loaded: {error}") from error


def save_orbax(source: Path, out: Path) -> None:
    """Writes a Hugging Face folder as config.json, tokenizer files and one Orbax checkpoint."""
    from orbax.checkpoint import v1 as ocp

    arch = load_architecture(source)
    tensors = open_folder(source)
    check_names(tensors, arch, source)
    dtype = tensors[hf_names("norm.weight", arch)[0]].dtype.name
    mesh = make_mesh(MeshConfig(fsdp=-1, data=1), jax.device_count())
    with new_folder(out) as folder:
        ocp.save((folder / ORBAX).absolute(), load_arrays(source, arch, mesh, dtype))
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
        yield beside
        os.rename(beside, out)
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error})") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)


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
        save_model(folder, sorted(place), get, max_shard_bytes)
        shutil.copy(source / "config.json", folder / "config.json")
        copy_extra_files(source, folder)


def _reader(source: Path, arch: Architecture, place: dict[str, tuple[str, int | None]]):
    """Returns how to read one tensor of the source by its Hugging Face name, and its dtype."""
    if not (source / ORBAX).is_dir():
        tensors = open_folder(source)
        check_names(tensors, arch, source)
        return (lambda name: tensors[name].read()), (lambda name: tensors[name].dtype)
    from orbax.checkpoint import v1 as ocp

    folder = (source / ORBAX).absolute()
    saved = ocp.metadata(folder).metadata
    arrays = ocp.load(folder, {p: np.empty(x.shape, x.dtype) for p, x in saved.items()})

    def read(name: str) -> np.ndarray:
        path, layer = place[name]
        return arrays[path] if layer is None else arrays[path][layer]

    return read, lambda name: arrays[place[name][0]].dtype


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
        "lora_alpha": config.alpha,
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
