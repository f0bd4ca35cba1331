"""The documents of rows: a key of each, which its tokens determine, and its target tokens."""

from typing import NamedTuple

import numpy as np
import xxhash

from kd_jax.data.rows import Rows

_BLOCK_ROWS = 1024


class Documents(NamedTuple):
    """The N documents of R rows, in the order of the rows."""

    keys: list[bytes]
    """Hash of each document's tokens and of which of them are targets, 16 bytes."""
    counts: np.ndarray
    """[N] int64: target tokens of each document."""
    first: np.ndarray
    """[R + 1] int64: row r has the documents first[r] to below first[r + 1]."""


def find_documents(rows: Rows) -> Documents:
    """Returns the documents of the rows, which it reads in blocks."""
    keys: list[bytes] = []
    counts, per_row = [np.zeros(0, np.int64)], [np.zeros(1, np.int64)]
    for start in range(0, len(rows), _BLOCK_ROWS):
        block = slice(start, start + _BLOCK_ROWS)
        segments, mask = np.asarray(rows.segment_ids[block]), np.asarray(rows.loss_mask[block])
        edges = np.pad(segments, ((0, 0), (1, 1)))
        begins = (segments > 0) & (edges[:, :-2] != segments)
        ends = (segments > 0) & (edges[:, 2:] != segments)
        starts, stops = np.flatnonzero(begins), np.flatnonzero(ends) + 1
        coded = np.asarray(rows.tokens[block]).astype("<i4") * 2 + mask
        data = memoryview(np.ascontiguousarray(coded).reshape(-1)).cast("B")
        spans = zip((4 * starts).tolist(), (4 * stops).tolist(), strict=True)
        keys += [xxhash.xxh3_128_digest(data[a:b]) for a, b in spans]
        before = np.concatenate([[0], np.cumsum(predicts_target(segments, mask))])
        counts.append(before[stops] - before[starts])
        per_row.append(begins.sum(axis=1))
    return Documents(keys, np.concatenate(counts), np.cumsum(np.concatenate(per_row)))


def predicts_target(segment_ids: np.ndarray, loss_mask: np.ndarray) -> np.ndarray:
    """Returns [..., S] bool: True where the next token is a target of the same document."""
    out = np.zeros_like(loss_mask)
    same = segment_ids[..., 1:] == segment_ids[..., :-1]
    out[..., :-1] = loss_mask[..., 1:] & same
    return out
