"""Rows on disk as arrays to read from by row number: several sources, and rows of other lengths."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np


class Joined:
    """Columns [R, S] of several sources, one after the other, as one array to read from.

    Rows that are shorter than the longest source's have zeros behind.
    """

    def __init__(self, parts: Sequence[Any]) -> None:
        self.parts = parts
        self.starts = np.cumsum([0, *map(len, parts)])
        self.shape = (int(self.starts[-1]), max(part.shape[1] for part in parts))
        self.size, self.dtype = self.shape[0] * self.shape[1], parts[0].dtype

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> np.ndarray:
        """Returns the rows of a slice or of an array of row numbers."""
        rows = np.arange(*index.indices(len(self))) if isinstance(index, slice) else index
        out = np.zeros((*np.shape(rows), self.shape[1]), self.dtype)
        for part, start in zip(self.parts, self.starts, strict=False):
            here = (rows >= start) & (rows < start + len(part))
            out[here, : part.shape[1]] = part[rows[here] - start]
        return out

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self[:] if dtype is None else self[:].astype(dtype)


class Ragged(Joined):
    """Rows of different lengths, one after the other in `flat`, as an array [R, width]."""

    def __init__(self, flat: np.ndarray, ends: np.ndarray, width: int) -> None:
        """Takes where each row ends in `flat`, [R] int64; no row is longer than `width`."""
        self.flat, self.starts = flat, np.concatenate([[0], ends])
        self.shape, self.dtype = (len(ends), width), flat.dtype
        self.size = len(ends) * width

    def __getitem__(self, index: Any) -> np.ndarray:
        """Returns the rows of a slice or of an array of row numbers, zeros behind."""
        rows = np.arange(*index.indices(len(self))) if isinstance(index, slice) else index
        out = np.zeros((*np.shape(rows), self.shape[1]), self.dtype)
        for place, row in np.ndenumerate(rows):
            begin, end = self.starts[row : row + 2]
            out[place][: end - begin] = self.flat[begin:end]
        return out


TOKEN, BEGIN, TARGET = np.uint8(1), np.uint8(2), np.uint8(4)
"""Bits of a mark: a token, not padding; the first of its document; with a loss."""


class Marked:
    """A column [R, S] that is computed from the rows' marks, uint8, when it is read."""

    def __init__(self, marks: Any, read: Callable[[np.ndarray], np.ndarray]) -> None:
        """Takes one of the functions below as `read`."""
        self.marks, self.read = marks, read
        self.shape, self.size, self.dtype = marks.shape, marks.size, read(marks[:0]).dtype

    def __len__(self) -> int:
        return len(self.marks)

    def __getitem__(self, index: Any) -> np.ndarray:
        """Returns the rows of a slice or of an array of row numbers."""
        return self.read(np.asarray(self.marks[index]))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self[:] if dtype is None else self[:].astype(dtype)


def segment_ids(marks: np.ndarray) -> np.ndarray:
    """Returns each token's document, [..., S] int32, numbered from 1; 0 is padding."""
    numbers = np.cumsum(marks & BEGIN > 0, axis=-1, dtype=np.int32)
    return np.where(marks & TOKEN, numbers, np.int32(0))


def positions(marks: np.ndarray) -> np.ndarray:
    """Returns each token's position in its document, [..., S] int32; 0 in padding."""
    here = np.arange(marks.shape[-1], dtype=np.int32)
    begins = np.maximum.accumulate(np.where(marks & BEGIN, here, np.int32(0)), axis=-1)
    return np.where(marks & TOKEN, here - begins, np.int32(0))


def loss_mask(marks: np.ndarray) -> np.ndarray:
    """Returns [..., S] bool, True for target tokens."""
    return marks & TARGET > 0
