"""Safetensors files: headers, and tensors read by rows."""

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from kd_jax.config import UserError
from kd_jax.weights.files import check_file, is_there, read_json
from kd_jax.weights.kinds import describe_folder

DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
INDEX = "model.safetensors.index.json"


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


def read_header(file: Path) -> dict[str, Tensor]:
    """Returns a file's tensors by name, once the safetensors library has accepted the file."""
    check_file(file, "a safetensors file")
    try:
        with safe_open(file, framework="numpy"), open(file, "rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(length))
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{file}: expected a whole safetensors file ({error})") from None
    header.pop("__metadata__", None)
    others = [
        f"{name} ({entry['dtype']})"
        for name, entry in header.items()
        if entry["dtype"] not in DTYPES
    ]
    if others:
        shown = ", ".join(others[:3]) + (" ..." if len(others) > 3 else "")
        raise UserError(
            f"{file}: expected dtypes {', '.join(DTYPES)}, got {shown}. Others, such as "
            "those of quantized weights, are not read: give the model in one of these"
        )
    return {
        name: Tensor(
            file,
            8 + length + entry["data_offsets"][0],
            tuple(entry["shape"]),
            DTYPES[entry["dtype"]],
        )
        for name, entry in header.items()
    }


def open_folder(folder: Path, single: str = "model.safetensors") -> dict[str, Tensor]:
    """Returns a Hugging Face folder's tensors by name, from one file or from shards."""
    if is_there(folder / single):  # before an index, as in transformers
        return read_header(folder / single)
    if is_there(folder / INDEX):
        return _open_shards(folder)
    pickles = [p.name for p in folder.glob("*") if p.suffix in (".bin", ".pt", ".pth", ".ckpt")]
    if pickles:
        raise UserError(
            f"{folder}: expected safetensors, got pickled weights ({', '.join(sorted(pickles))}), "
            "which can run any code and are never loaded. Save them with "
            "save_pretrained(..., safe_serialization=True)"
        )
    raise UserError(f"{folder}: expected {single} or {INDEX}, {describe_folder(folder)}")


def _open_shards(folder: Path) -> dict[str, Tensor]:
    """Returns the tensors of all shards in the index, each from the file that the index gives."""
    path = folder / INDEX
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(f, str) for f in weight_map.values()):
        raise UserError(f"{path}: expected weight_map to give each tensor's file")
    files = sorted(set(weight_map.values()))
    outside = [name for name in files if name.startswith("/") or ".." in name.split("/")]
    if outside:
        raise UserError(f"{path}: expected files of this folder, got {', '.join(outside)}")
    absent = [name for name in files if not is_there(folder / name)]
    if absent:
        raise UserError(f"{path}: names files that are not there: {', '.join(absent):.500}")
    tensors: dict[str, Tensor] = {}
    for file in files:
        found = read_header(folder / file).items()
        tensors |= {name: t for name, t in found if weight_map.get(name, file) == file}
    lost = [f"{name} ({weight_map[name]})" for name in sorted(weight_map.keys() - tensors.keys())]
    if lost:
        raise UserError(f"{path}: names tensors that their files do not have: {', '.join(lost)}")
    return tensors
