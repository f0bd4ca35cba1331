"""Values of rows from a teacher's cache, read ahead of the step."""

from collections.abc import Sequence

import numpy as np
import tensorstore as ts

from kd_jax.data.documents import Documents, predicts_target
from kd_jax.data.rows import Rows
from kd_jax.data.store import TEACHER, Batch
from kd_jax.teachers.manifest import Cache, part_folder
from kd_jax.teachers.storage import Field, numpy_dtype, open_array, reading

Span = tuple[int, int]
"""First token and one past the last, in all parts' tokens."""


class CachedRows:
    """The teacher's values of rows; a function of row numbers (data.batches.ReadTeacher)."""

    def __init__(self, cache: Cache, rows: Rows, documents: Documents, places: np.ndarray) -> None:
        """Takes the documents of the rows and where each begins, [N], all of them in the cache."""
        assert (places >= 0).all()
        self.cache, self.rows, self.place = cache, rows, f"teacher.cache: {cache.path}"
        self.documents, self.places = documents, places
        self.arrays = [
            {name: self._open(number, name) for name in cache.fields}
            for number in range(len(cache.parts))
        ]

    def of_rows(self, rows: Rows) -> "CachedRows":
        """Returns the same documents' values at the places that they have in other rows."""
        return CachedRows(self.cache, rows, self.documents, self.places)

    def __call__(self, row_ids: np.ndarray, row_mask: np.ndarray) -> Batch:
        """Returns `teacher_NAME` [..., B, S, ...] of rows `row_ids`, [..., B]; 0 outside the mask.

        Raises:
          UserError: the cache cannot be read, or was damaged after the start.
        """
        numbers = np.where(row_mask, row_ids, -1).ravel()
        there = np.flatnonzero(numbers >= 0)
        own = numbers[there]
        masks = predicts_target(self.rows.segment_ids[own], self.rows.loss_mask[own])
        spans = [self._spans(row) for row in own]
        out = {}
        for name, field in self.cache.fields.items():
            shape = (numbers.size, self.rows.tokens.shape[1], *field.shape)
            dense = np.zeros(shape, numpy_dtype(field.dtype))
            futures = [[self._read(name, span) for span in some] for some in spans]
            for i, mask, parts in zip(there, masks, futures, strict=True):
                if parts:
                    dense[i, mask] = self._join(parts)
            out[f"{TEACHER}{name}"] = dense.reshape(*row_ids.shape, *dense.shape[1:])
        return out

    def _open(self, number: int, name: str) -> ts.TensorStore:
        field = self.cache.fields[name]
        store = self.cache.store / part_folder(number)
        with reading(self.place):
            array = open_array(store, f"{name}/", field, 0, None)
            form = Field(array.shape[1:], array.dtype.name)
            if (array.shape[0], form) != (self.cache.parts[number].tokens, field):
                raise ValueError(f"{name}: {array.shape[0]:,} tokens of {form}, not of {field}")
        return array

    def _spans(self, row: int) -> list[Span]:
        """Returns a row's tokens in the cache; documents that follow each other are one span."""
        first, last = self.documents.first[row : row + 2]
        spans: list[Span] = []
        for start, count in zip(
            self.places[first:last].tolist(),
            self.documents.counts[first:last].tolist(),
            strict=True,
        ):
            follows = spans and spans[-1][1] == start and start not in self.cache.starts
            if follows:
                spans[-1] = (spans[-1][0], start + count)
            elif count:
                spans.append((start, start + count))
        return spans

    def _read(self, name: str, span: Span):
        part = int(np.searchsorted(self.cache.starts, span[0], side="right")) - 1
        first = int(self.cache.starts[part])
        return self.arrays[part][name][span[0] - first : span[1] - first].read()

    def _join(self, futures: Sequence) -> np.ndarray:
        with reading(self.place):
            return np.concatenate([future.result() for future in futures])
