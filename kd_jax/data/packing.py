"""Documents to rows: packing by best fit, in windows that bound the memory."""

import bisect
import sys
import time
from collections.abc import Iterable, Iterator

import numpy as np

from kd_jax.config import DataConfig
from kd_jax.config.errors import MAX_SHOWN
from kd_jax.data.prepare import Prepared
from kd_jax.data.store import COLUMNS, Batch

WINDOW_TOKENS = 2**22
"""Tokens that are packed together."""


def pack(lengths: list[int], seq_len: int) -> list[list[int]]:
    """Returns rows of document numbers, packed by best fit, longest document first."""
    rows: list[list[int]] = []
    open_rows: list[tuple[int, int]] = []  # (room, row), sorted
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        at = bisect.bisect_left(open_rows, (lengths[i], -1))
        if at == len(open_rows):
            room, row = seq_len, len(rows)
            rows.append([])
        else:
            room, row = open_rows.pop(at)
        rows[row].append(i)
        if room > lengths[i]:
            bisect.insort(open_rows, (room - lengths[i], row))
    return rows


def fill_rows(
    tokens: np.ndarray, target: np.ndarray, lengths: np.ndarray, data: DataConfig, pad: int
) -> Batch:
    """Returns the columns of the rows, [R, S] each; segment 0 is padding.

    Args:
      tokens, target: [N] of all documents, one after the other; `lengths` [D] of each.
    """
    S = data.seq_len
    rows = pack(lengths.tolist(), S) if data.pack else [[i] for i in range(len(lengths))]
    order = np.concatenate(rows)
    sizes, counts = lengths[order], np.array([len(row) for row in rows])
    positions = _ranges(sizes)
    source = np.repeat((np.cumsum(lengths) - lengths)[order], sizes) + positions
    # Where each document begins in its row, and the row's number.
    before = np.cumsum(sizes) - sizes
    first = np.cumsum(counts) - counts
    start = before - np.repeat(before[first], counts) + np.repeat(np.arange(len(rows)) * S, counts)
    there = np.repeat(start, sizes) + positions
    out: Batch = {name: np.zeros((len(rows), S), dtype) for name, dtype in COLUMNS.items()}
    out["tokens"][:] = pad
    out["tokens"].ravel()[there] = tokens[source]
    out["segment_ids"].ravel()[there] = np.repeat(_ranges(counts) + 1, sizes)
    out["positions"].ravel()[there] = positions
    out["loss_mask"].ravel()[there] = target[source]
    return out


def _ranges(sizes: np.ndarray) -> np.ndarray:
    """Returns 0, 1, ... below each size, one after the other."""
    return np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)


def windows(parts: Iterable[Prepared], data: DataConfig, total: Prepared) -> Iterator[Prepared]:
    """Yields documents in windows that are packed together, and adds up in `total` all else."""
    window: list[Prepared] = []
    size = 0
    for part in parts:
        total.counts += part.counts
        total.ignored += part.ignored
        total.hidden += part.hidden
        total.problems = (total.problems + part.problems)[:MAX_SHOWN]
        total.long = (total.long + part.long)[:MAX_SHOWN]
        if len(part.lengths):
            window.append(part)
            size += len(part.tokens) if data.pack else len(part.lengths) * data.seq_len
        if size >= WINDOW_TOKENS:
            yield _joined(window)
            window, size = [], 0
    if window:
        yield _joined(window)


def _joined(parts: list[Prepared]) -> Prepared:
    names = ("tokens", "target", "lengths")
    tokens, target, lengths = (np.concatenate([getattr(x, n) for x in parts]) for n in names)
    return Prepared(tokens, target, lengths)


def shown(parts: Iterable[Prepared], name: str) -> Iterator[Prepared]:
    """Yields the parts, with their number of tokens on a terminal."""
    if not sys.stderr.isatty():
        yield from parts
        return
    from rich import progress
    from rich.console import Console

    columns = ("{task.description}: {task.completed:,.0f} tokens, {task.fields[speed]:,.0f}/s",)
    with progress.Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task, began = bar.add_task(name, total=None, speed=0), time.monotonic()
        for part in parts:
            done = bar.tasks[0].completed + len(part.tokens)
            bar.update(task, completed=done, speed=done / (time.monotonic() - began))
            yield part
