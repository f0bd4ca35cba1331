"""The row store: columns on disk, written in parts, with checksums."""

import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from kd_jax.config import UserError
from kd_jax.data.arrays import Marked, loss_mask, positions, segment_ids

Batch = dict[str, np.ndarray]

COLUMNS = {
    "tokens": np.int32, "segment_ids": np.int32, "positions": np.int32, "loss_mask": np.bool_
}  # fmt: skip
"""Of rows, and of a batch of them."""
STORED = {"tokens": np.int32, "marks": np.uint8}
"""Of rows on disk; arrays.py says what the marks are."""
TEACHER = "teacher_"
"""Stands before the names of the teacher's arrays in a store and in a batch."""
# The teacher's own rows, without padding; `ends` has the end of each row.
TEACHER_STORED = {f"{TEACHER}{name}": dtype for name, dtype in STORED.items()}
TEACHER_ENDS = f"{TEACHER}ends"
_STALE_SECONDS = 24 * 3600


def open_store(folder: Path) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """Returns the memory-mapped columns and the metadata; None if absent or damaged.

    STORED are [R, S], and where the teacher has rows of its own TEACHER_STORED [N], TEACHER_ENDS
    [R].
    """
    try:
        meta = json.loads((folder / "meta.json").read_text())
        names = dtypes_of("teacher_seq_len" in meta)
        columns = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in names}
        with ThreadPoolExecutor(len(columns)) as pool:
            sums = dict(zip(columns, pool.map(_hash_column, columns.values()), strict=True))
        whole = sums == meta["xxh3"] and all(
            len({columns[name].shape for name in some if name in columns}) <= 1
            for some in (STORED, TEACHER_STORED)
        )
    except (OSError, ValueError, EOFError, KeyError, TypeError, RecursionError):
        return None
    return (columns, meta) if whole else None


def dtypes_of(teacher: bool) -> dict[str, Any]:
    """Returns the columns' dtypes by name; `teacher`: it has rows of its own."""
    return STORED | (TEACHER_STORED | {TEACHER_ENDS: np.int64} if teacher else {})


def columns_of(stored: dict[str, Any]) -> dict[str, Any]:
    """Returns COLUMNS of rows in the form of STORED, as arrays to read from by row number."""
    reads = {"segment_ids": segment_ids, "positions": positions, "loss_mask": loss_mask}
    marked = {name: Marked(stored["marks"], read) for name, read in reads.items()}
    return {"tokens": stored["tokens"], **marked}


def _hash_column(column: Any) -> str:
    """Returns the hash of a column's bytes, read without mapping them all."""
    with open(column.filename, "rb", buffering=0) as stream:
        stream.seek(column.offset)
        return hashlib.file_digest(stream, xxhash.xxh3_128).hexdigest()


class StoreWriter:
    """Writes columns a part at a time; `finish` makes the store appear as a whole."""

    def __init__(self, folder: Path, seq_len: int, teacher: bool = False) -> None:
        self.folder, self.seq_len = folder, seq_len
        self.dtypes = dtypes_of(teacher)
        self.counts = dict.fromkeys(self.dtypes, 0)
        self.beside = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}.tmp")
        self.beside.mkdir(parents=True)
        self.files = {name: (self.beside / f"{name}.npy").open("wb") for name in self.dtypes}
        self.sums = {name: xxhash.xxh3_128() for name in self.dtypes}
        for name in self.dtypes:
            self._write_header(name)

    @property
    def num_rows(self) -> int:
        return self.counts["tokens"]

    def _write_header(self, name: str) -> None:
        """Writes the header for the rows so far; its size does not depend on their number."""
        self.files[name].seek(0)
        shape: tuple[int, ...] = (self.counts[name],)
        shape, descr = shape + (self.seq_len,) * (name in STORED), np.dtype(self.dtypes[name]).str
        header = {"descr": descr, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(self.files[name], header)

    def append(self, columns: Batch) -> None:
        """Writes columns of rows after those so far: [R, S], or the teacher's [N]."""
        for name, file in self.files.items():
            self.counts[name] += len(columns[name])
            data = np.ascontiguousarray(columns[name]).data
            file.write(data)
            self.sums[name].update(data)

    def finish(self, meta: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Writes the metadata and renames the folder; returns what `open_store` would."""
        for name, file in self.files.items():
            self._write_header(name)
            file.flush()
            os.fsync(file.fileno())
            file.close()
        meta = {**meta, "xxh3": {name: digest.hexdigest() for name, digest in self.sums.items()}}
        (self.beside / "meta.json").write_text(json.dumps(meta))
        if (found := open_store(self.folder)) is not None:  # another process was first
            return found
        shutil.rmtree(self.folder, ignore_errors=True)
        os.rename(self.beside, self.folder)
        files = {name: self.folder / f"{name}.npy" for name in self.dtypes}
        return {name: np.load(file, mmap_mode="r") for name, file in files.items()}, meta


@contextmanager
def writing(folder: Path, seq_len: int, teacher: bool = False) -> Iterator[StoreWriter]:
    """Yields a writer of a store, and removes what it left if it did not finish.

    Raises:
      UserError: the folder cannot be written.
    """
    writer = None
    try:
        for left in folder.parent.glob(f".{folder.name}.*.tmp"):  # by a killed process
            if left.stat().st_mtime < time.time() - _STALE_SECONDS:
                shutil.rmtree(left, ignore_errors=True)
        writer = StoreWriter(folder, seq_len, teacher)
        yield writer
    except OSError as error:
        raise UserError(f"data.cache-dir: {folder} cannot be written ({error})") from None
    finally:
        if writer is not None:
            for file in writer.files.values():
                with suppress(OSError):  # of a full disk once more, in place of the message
                    file.close()
            shutil.rmtree(writer.beside, ignore_errors=True)
