"""Safetensors files: headers, and tensors read by rows."""

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

from kd_jax.config import UserError
from kd_jax.weights.files import read_json

DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
INDEX = "model.safetensors.index.json"
HEADER_BYTES = 100_000_000  # the format's limit


@dataclass(frozen=True, slots=True)
class Tensor:
    """File, byte offset, shape and dtype of one stored tensor."""

    file: Path
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Returns rows [start, stop); the bytes of other rows are not read."""
        stop = self.shape[0] if stop is None else stop
        out = np.empty((stop - start, *self.shape[1:]), self.dtype)
        self.read_rows(out, start)
        return out

    def read_rows(self, out: np.ndarray, start: int) -> None:
        """Fills `out`, contiguous and of the tensor's dtype, with the rows from `start` on."""
        # No memory map: its pages would count as this process's memory, beside the copy.
        assert out.flags.c_contiguous  # reshape must return a view
        view = memoryview(out.reshape(-1).view(np.uint8))
        with open(self.file, "rb", buffering=0) as file:
            file.seek(self.offset + start * self.row_bytes)
            done = 0
            while done < len(view):
                count = file.readinto(view[done:])
                if not count:
                    raise UserError(f"{self.file}: ended early; it changed while it was read")
                done += count

    @property
    def row_bytes(self) -> int:
        return math.prod(self.shape[1:]) * self.dtype.itemsize


# Raised while a malformed header is parsed.
_MALFORMED = (
    OSError, ValueError, KeyError, TypeError, AttributeError, struct.error, RecursionError,
)  # fmt: skip


def read_header(file: Path) -> dict[str, Tensor]:
    """Returns a file's tensors by name, once its header and length are checked."""
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
    except _MALFORMED as error:
        raise UserError(f"{file}: expected a whole safetensors file ({error})") from None
    return tensors


def open_folder(folder: Path, single: str = "model.safetensors") -> dict[str, Tensor]:
    """Returns a Hugging Face folder's tensors by name, from one file or from shards."""
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
    """Returns the tensors of all shards in the index, each from the file that the index gives."""
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
