"""Rows of fixed length: packing, the row store and a summary."""

import dataclasses
import hashlib
import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kd_jax.config import DataConfig, UserError
from kd_jax.config.errors import first_lines
from kd_jax.data.answers import describe_hidden
from kd_jax.data.chat import describe_template
from kd_jax.data.files import hash_source, list_files, list_sources, read_raw, slice_of
from kd_jax.data.packing import fill_rows, shown, windows
from kd_jax.data.pool import prepare_all
from kd_jax.data.prepare import EMPTY, Job, Prepared, chunks
from kd_jax.data.records import describe_ignored
from kd_jax.data.store import COLUMNS, open_store, writing
from kd_jax.data.templates import Template, need_template

STORE_VERSION = 4


class Joined:
    """Columns [R, S] of several sources, one after the other, as one array to read from."""

    def __init__(self, parts: Sequence[np.ndarray]) -> None:
        self.parts = parts
        self.starts = np.cumsum([0, *map(len, parts)])
        self.shape = (int(self.starts[-1]), parts[0].shape[1])
        self.size, self.dtype = self.shape[0] * self.shape[1], parts[0].dtype

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> np.ndarray:
        """Returns the rows of a slice or of an array of row numbers."""
        rows = np.arange(*index.indices(len(self))) if isinstance(index, slice) else index
        out = np.empty((*np.shape(rows), self.shape[1]), self.dtype)
        for part, start in zip(self.parts, self.starts, strict=False):
            here = (rows >= start) & (rows < start + len(part))
            out[here] = part[rows[here] - start]
        return out

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self[:] if dtype is None else self[:].astype(dtype)


@dataclass(frozen=True, slots=True)
class Rows:
    """A data set in rows, [R, S] memory-mapped arrays, or several sources' one after the other."""

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
    origins: tuple[tuple[tuple[str, ...], int, int | None], ...] = ()
    """(files, begin, end) of each source: its records [begin, end)."""
    sources: tuple[tuple[str, float, int], ...] = ()
    """(path, weight, rows) of each source of a blend; () for one source."""

    def __len__(self) -> int:
        return len(self.tokens)


def make_rows(
    data: DataConfig,
    tokenizer: Any,
    template: Template | None,
    *,
    fraction: float = 0.0,
    held_out: bool = False,
) -> Rows:
    """Returns the rows of data.path from the row store, which it fills if needed.

    Args:
      fraction: share of the records that are held out, by the hash of their content.
      held_out: return the held-out records' rows; otherwise those of the others.

    Raises:
      UserError: lists file and line of each bad record, unless these are skipped.
    """
    sources = list_sources(data.path)
    if len(sources) > 1:
        parts = [
            make_rows(
                dataclasses.replace(data, path=path), tokenizer, template,
                fraction=fraction, held_out=held_out,
            )
            for path, _ in sources
        ]  # fmt: skip
        return blend_rows(parts, sources)
    vocabulary = (tokenizer.backend_tokenizer.to_str(), tokenizer.special_tokens_map)
    options = (
        data.seq_len, data.train_on, data.overlong, data.pack, data.date, data.max_conversations,
        data.on_bad_record, fraction, held_out and fraction > 0,
    )  # fmt: skip
    source = hash_source(data.path, data.split)
    recipe = [STORE_VERSION, vocabulary, template, source, options]
    key = hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:20]
    folder = Path(data.cache_dir).expanduser() / key
    notes: tuple[str, ...] = ()
    stored = open_store(folder)
    if stored is None:
        if folder.exists():
            notes = (f"warning: the row store {folder} is damaged: the rows are made again",)
        stored = _fill_store(folder, Job(tokenizer, template, data, fraction, held_out))
    columns, meta = stored
    notes += tuple(meta["notes"])
    begin, end = meta["records"]
    files = list_files(data.path, data.split).files or (f"{data.path} {data.split}",)
    origin = (tuple(map(os.path.realpath, files)), begin, end)
    return Rows(**columns, counts=meta["counts"], key=key, notes=notes, origins=(origin,))


def blend_rows(parts: Sequence[Rows], sources: Sequence[tuple[str, float | None]]) -> Rows:
    """Returns the rows of several sources as one data set; without weights, all rows are alike."""
    counts = sum((Counter(part.counts) for part in parts), Counter())
    weights = [weight for _, weight in sources if weight is not None]
    key = hashlib.sha256(json.dumps([[part.key for part in parts], weights]).encode())
    lines = [f"{path}: {describe_rows(x)}" for (path, _), x in zip(sources, parts, strict=True)]
    columns: dict[str, Any] = {
        name: Joined([getattr(part, name) for part in parts]) for name in COLUMNS
    }
    return Rows(
        **columns,
        counts={name: counts[name] for name in parts[0].counts},
        key=key.hexdigest()[:20],
        notes=tuple(lines),
        origins=tuple(origin for part in parts for origin in part.origins),
        sources=tuple(
            (path, 0.0 if weight is None else weight, len(part))
            for (path, weight), part in zip(sources, parts, strict=True)
        ),
    )


def overlap(rows: Rows, others: Rows) -> str:
    """Returns the first file of which both have the same records, or ""."""
    for files, begin, end in rows.origins:
        for other_files, other_begin, other_end in others.origins:
            shared = [file for file in files if file in other_files]
            apart = files == other_files and (
                (end is not None and end <= other_begin)
                or (other_end is not None and other_end <= begin)
            )
            if shared and not apart:
                return shared[0]
    return ""


def _fill_store(folder: Path, job: Job) -> tuple[dict[str, Any], dict[str, Any]]:
    data, total = job.data, Prepared(*EMPTY)
    pad = job.tokenizer.pad_token_id
    begin, end = slice_of(data.path, data.split)
    last = end if data.max_conversations is None else begin + data.max_conversations
    end = last if end is None or last is None else min(end, last)
    parts = prepare_all(job, chunks(read_raw(data.path, data.split, begin, end)))
    counts = {"tokens": 0, "target_tokens": 0}
    with writing(folder, data.seq_len) as writer:
        for window in windows(shown(parts, data.path), data, total):
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
    counts = total.counts
    bad = first_lines(total.problems, counts["bad"])
    if bad and data.on_bad_record == "error":
        raise UserError("\n".join(bad))
    if not counts["conversations"]:
        raise UserError("\n".join([f"{data.path}: expected records, got none", *bad]))
    if total.long and data.overlong == "error":
        shown = ", ".join(first_lines(total.long, counts["long"])).replace(", and", " and")
        raise UserError(
            f"{data.path}: {counts['long']} conversations are longer than data.seq-len "
            f"{data.seq_len}: {shown} (place, tokens). Raise data.seq-len, or set data.overlong to "
            "truncate or drop"
        )
    if not num_rows:
        raise UserError(
            f"{data.path}: no token with a loss is left in rows of {data.seq_len} tokens "
            f"({counts['long']} of {counts['conversations']} conversations are longer). Raise "
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
    if count := total.counts["bad"]:
        skipped = f"{count:,} bad records are skipped (data.on-bad-record skip):"
        notes += [f"warning: {data.path}: {skipped}", *first_lines(total.problems, count)]
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
