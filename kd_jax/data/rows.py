"""Rows of fixed length: packing, the row store and a summary."""

import bisect
import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kd_jax.config import DataConfig, UserError
from kd_jax.data.answers import describe_hidden
from kd_jax.data.chat import describe_template
from kd_jax.data.files import hash_files, list_files, read_raw, slice_of
from kd_jax.data.pool import prepare_all
from kd_jax.data.prepare import EMPTY, Job, Prepared, chunks
from kd_jax.data.records import MAX_SHOWN, describe_ignored, first_of
from kd_jax.data.store import COLUMNS, Batch, open_store, writing
from kd_jax.data.templates import Template, need_template

STORE_VERSION = 3
WINDOW_TOKENS = 2**22
"""Tokens that are packed together; they bound the memory."""


@dataclass(frozen=True, slots=True)
class Rows:
    """A data set in rows, [R, S] memory-mapped arrays."""

    tokens: np.ndarray
    segment_ids: np.ndarray
    """Document of each token, numbered from 1 in every row; 0 is padding."""
    positions: np.ndarray
    """Position of each token in its document."""
    loss_mask: np.ndarray
    """True for target tokens."""
    counts: dict[str, int]
    """Records, truncated and dropped ones, rows and tokens."""
    key: str
    """Hash of the source, the tokenizer and the options."""
    notes: tuple[str, ...] = ()
    """Lines to print before the rows are used."""

    def __len__(self) -> int:
        return len(self.tokens)


# Packing.


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


def _windows(parts: Iterable[Prepared], data: DataConfig, total: Prepared) -> Iterator[Prepared]:
    """Yields documents in windows that are packed together, and adds up in `total` all else."""
    window: list[Prepared] = []
    size = 0
    for part in parts:
        total.counts += part.counts
        total.ignored += part.ignored
        total.hidden += part.hidden
        total.problems += part.problems
        total.long += part.long
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


# Rows.


def make_rows(data: DataConfig, tokenizer: Any, template: Template | None) -> Rows:
    """Returns the rows of data.path from the row store, which it fills if needed.

    Raises:
      UserError: lists file and line of each bad record, unless these are skipped.
    """
    vocabulary = (tokenizer.backend_tokenizer.to_str(), tokenizer.special_tokens_map)
    options = (
        data.seq_len, data.train_on, data.overlong, data.pack, data.date, data.max_conversations,
        data.on_bad_record,
    )  # fmt: skip
    source = hash_files(data.path, data.split)
    recipe = [STORE_VERSION, vocabulary, template, source, options]
    key = hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:20]
    folder = Path(data.cache_dir).expanduser() / key
    notes: tuple[str, ...] = ()
    stored = open_store(folder)
    if stored is None:
        if folder.exists():
            notes = (f"warning: the row store {folder} is damaged: the rows are made again",)
        stored = _fill_store(folder, Job(tokenizer, template, data))
    columns, meta = stored
    notes += tuple(meta["notes"])
    return Rows(**columns, counts=meta["counts"], key=key, notes=notes)


def _fill_store(folder: Path, job: Job) -> tuple[Batch, dict[str, Any]]:
    data, total = job.data, Prepared(*EMPTY)
    pad = job.tokenizer.pad_token_id
    begin, end = slice_of(data.path, data.split)
    last = end if data.max_conversations is None else begin + data.max_conversations
    end = last if end is None or last is None else min(end, last)
    parts = prepare_all(job, chunks(read_raw(data.path, data.split, begin, end)))
    counts = {"tokens": 0, "target_tokens": 0}
    with writing(folder, data.seq_len) as writer:
        for window in _windows(parts, data, total):
            flat = (window.tokens, window.target, window.lengths)
            writer.append(fill_rows(*flat, data, 0 if pad is None else pad))
            counts["tokens"] += len(window.tokens)
            counts["target_tokens"] += int(window.target.sum())
        counts["rows"] = writer.num_rows
        _check(total, data, writer.num_rows)
        notes = _notes(total, job, (begin, end))
        counts |= {name: total.counts[name] for name in ("conversations", *_LEFT_OUT)}
        return writer.finish({"counts": counts, "notes": notes, "records": [begin, end]})


def _check(total: Prepared, data: DataConfig, num_rows: int) -> None:
    """Raises UserError if records are bad or too long, or none is left."""
    counts, bad = total.counts, first_of(total.problems)
    if bad and data.on_bad_record == "error":
        raise UserError("\n".join(bad))
    if not counts["conversations"]:
        raise UserError("\n".join([f"{data.path}: expected records, got none", *bad]))
    if total.long and data.overlong == "error":
        more = f" and {len(total.long) - MAX_SHOWN} more" if len(total.long) > MAX_SHOWN else ""
        raise UserError(
            f"{data.path}: {len(total.long)} conversations are longer than data.seq-len "
            f"{data.seq_len}: {', '.join(total.long[:MAX_SHOWN])}{more} (place, tokens). Raise "
            "data.seq-len, or set data.overlong to truncate or drop"
        )
    if not num_rows:
        raise UserError(
            f"{data.path}: no token with a loss is left in rows of {data.seq_len} tokens "
            f"({len(total.long)} of {counts['conversations']} conversations are longer). Raise "
            "data.seq-len"
        )


def _notes(total: Prepared, job: Job, taken: tuple[int, int | None]) -> list[str]:
    """Returns lines about what is not used or not learned."""
    notes, data = [], job.data
    if total.counts["chats"]:
        notes += describe_template(job.tokenizer, need_template(job.template), data.date)
    if taken[1] is not None and "[" in data.split:
        notes.append(f"{data.path}: {data.split} is records {taken[0] + 1:,} to {taken[1]:,}")
    if unread := list_files(data.path, data.split).unread:
        shown = ", ".join(unread[:3]) + (", ..." if len(unread) > 3 else "")
        notes.append(f"{data.path}: {len(unread):,} other files are not read ({shown})")
    notes += [f"warning: {data.path}: {line}" for line in describe_ignored(total.ignored)]
    notes += describe_hidden(total.hidden, data.path)
    if count := len(total.problems):
        skipped = f"{count:,} bad records are skipped (data.on-bad-record skip):"
        notes += [f"warning: {data.path}: {skipped}", *first_of(total.problems)]
    return notes


_LEFT_OUT = {
    "truncated": "truncated",
    "dropped": "dropped as too long",
    "cut": "texts cut into rows",
    "without_target": "left out (no loss token left)",
}


def describe_rows(rows: Rows) -> str:
    """Returns a summary of the rows for the terminal, and their notes."""
    counts = rows.counts
    filled = counts["tokens"] / rows.tokens.size
    left_out = "".join(f", {counts[n]:,} {text}" for n, text in _LEFT_OUT.items() if counts[n])
    summary = (
        f"{counts['conversations']:,} conversations{left_out}: {len(rows):,} rows of "
        f"{rows.tokens.shape[1]:,} tokens, {filled:.0%} filled, "
        f"{counts['target_tokens']:,} tokens with a loss"
    )
    return "\n".join([summary, *rows.notes])
