"""Documents to rows: packing by best fit, in windows that bound the memory."""

import bisect
import sys
import time
from collections.abc import Iterable, Iterator

import numpy as np

from kd_jax.config import DataConfig
from kd_jax.config.errors import MAX_SHOWN
from kd_jax.data.arrays import BEGIN, TARGET, TOKEN
from kd_jax.data.prepare import Flat, Prepared
from kd_jax.data.store import Batch

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


def choose_rows(window: Prepared, data: DataConfig, teacher_seq_len: int | None) -> list[list[int]]:
    """Returns the numbers of the documents in each row, the same for student and teacher.

    A teacher with a prompt of its own has rows of `teacher_seq_len` tokens; None: about as many
    more than the student's as its documents have, or the longest. A document takes the larger of
    its shares of the two rows.
    """
    if not data.pack:
        return [[i] for i in range(len(window.flat.lengths))]
    sizes = window.flat.lengths
    if window.teacher is not None:
        teacher_sizes = window.teacher.lengths
        room = teacher_seq_len
        if room is None:
            total, teacher_total = int(sizes.sum()), int(teacher_sizes.sum())
            room = max(int(teacher_sizes.max()), -(-data.seq_len * teacher_total // total))
        sizes = np.maximum(sizes, -(-teacher_sizes * data.seq_len // room))
    return pack(sizes.tolist(), data.seq_len)


def join_rows(flat: Flat, rows: list[list[int]]) -> tuple[Batch, np.ndarray]:
    """Returns store.STORED of rows without padding, [N] each, and the rows' lengths [R]."""
    order = np.concatenate(rows)
    sizes, counts = flat.lengths[order], np.array([len(row) for row in rows])
    positions = _ranges(sizes)
    source = np.repeat((np.cumsum(flat.lengths) - flat.lengths)[order], sizes) + positions
    marks = TOKEN | BEGIN * (positions == 0) | TARGET * flat.target[source]
    lengths = np.add.reduceat(sizes, np.cumsum(counts) - counts)
    return {"tokens": flat.tokens[source].astype(np.int32), "marks": marks}, lengths


def fill_rows(columns: Batch, lengths: np.ndarray, seq_len: int, pad: int) -> Batch:
    """Returns the columns of rows of `lengths` tokens, [R, S] each; mark 0 is padding."""
    there = np.repeat(np.arange(len(lengths)) * seq_len, lengths) + _ranges(lengths)
    out: Batch = {name: np.zeros((len(lengths), seq_len), x.dtype) for name, x in columns.items()}
    out["tokens"][:] = pad
    for name, x in columns.items():
        out[name].ravel()[there] = x
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
        if len(part.flat.lengths):
            window.append(part)
            size += len(part.flat.tokens) if data.pack else len(part.flat.lengths) * data.seq_len
        if size >= WINDOW_TOKENS:
            yield _joined(window)
            window, size = [], 0
    if window:
        yield _joined(window)


def _joined(parts: list[Prepared]) -> Prepared:
    def join(flats: Iterable[Flat]) -> Flat:
        return Flat(*(np.concatenate(column) for column in zip(*flats, strict=True)))

    teachers = [part.teacher for part in parts if part.teacher is not None]
    return Prepared(join(x.flat for x in parts), teacher=join(teachers) if teachers else None)


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
            done = bar.tasks[0].completed + len(part.flat.tokens)
            bar.update(task, completed=done, speed=done / (time.monotonic() - began))
            yield part
