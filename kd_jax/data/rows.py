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
from kd_jax.data.arrays import Joined, Ragged
from kd_jax.data.chat import describe_template
from kd_jax.data.files import (
    Listing,
    hash_source,
    list_files,
    list_sources,
    read_raw,
    slice_of,
)
from kd_jax.data.hidden import describe_hidden
from kd_jax.data.packing import choose_rows, fill_rows, join_rows, shown, windows
from kd_jax.data.pool import prepare_all
from kd_jax.data.prepare import EMPTY, Job, Prepared, chunks
from kd_jax.data.prompts import TeacherPrompt, check_prompt
from kd_jax.data.records import describe_ignored
from kd_jax.data.store import (
    COLUMNS,
    STORED,
    TEACHER,
    TEACHER_ENDS,
    columns_of,
    open_store,
    writing,
)
from kd_jax.data.templates import Template, need_template

STORE_VERSION = 7


_ROUNDED = 128
"""The teacher's own rows and the shortest rows have a multiple of it."""


@dataclass(frozen=True, slots=True)
class Rows:
    """A data set in rows, [R, S] arrays to read from by row number, int32 and `loss_mask` bool."""

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
    teacher: "Rows | None" = None
    """Rows of the same documents, in the same order, with the teacher's own prompt; each row has
    the same target tokens in the same order. None: the teacher sees these rows."""

    def __len__(self) -> int:
        return len(self.tokens)


def make_rows(
    data: DataConfig,
    tokenizer: Any,
    template: Template | None,
    *,
    fraction: float = 0.0,
    held_out: bool = False,
    prompt: TeacherPrompt | None = None,
) -> Rows:
    """Returns the rows of data.path from the row store, which it fills if needed.

    Args:
      fraction: share of the records that are held out, by the hash of their content.
      held_out: return the held-out records' rows; otherwise those of the others.
      prompt: the teacher's own, as prompts.read_prompt returns it.

    Raises:
      UserError: lists file and line of each bad record, unless these are skipped; or the prompt
        takes teacher_messages, and no record has any.
    """
    sources = list_sources(data.path)
    parts = [
        _rows_of_source(
            dataclasses.replace(data, path=path), tokenizer, template, fraction, held_out, prompt
        )
        for path, _ in sources
    ]
    # Stores of before have no such count; they have some.
    without = not any(part.counts.get("teacher_messages", 1) for part in parts)
    drawn = held_out and fraction > 0  # a few records, by chance without
    if prompt is not None and prompt.messages and without and not drawn:
        raise UserError(
            f"{data.path}: expected records with teacher_messages, as teacher.messages says, got "
            "none"
        )
    return blend_rows(parts, sources) if len(parts) > 1 else parts[0]


def _rows_of_source(
    data: DataConfig,
    tokenizer: Any,
    template: Template | None,
    fraction: float,
    held_out: bool,
    prompt: TeacherPrompt | None,
) -> Rows:
    """Returns make_rows of one source."""
    vocabulary = (tokenizer.backend_tokenizer.to_str(), tokenizer.special_tokens_map)
    options = (
        data.seq_len, data.train_on, data.overlong, data.pack, data.date, data.max_conversations,
        data.on_bad_record, fraction, held_out and fraction > 0,
    )  # fmt: skip
    source = hash_source(data.path, data.split)
    recipe = [STORE_VERSION, vocabulary, template, source, options, *([prompt] if prompt else [])]
    key = hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:20]
    folder = Path(data.cache_dir).expanduser() / key
    notes: tuple[str, ...] = ()
    stored = open_store(folder)
    if stored is None:
        if folder.exists():
            notes = (f"warning: the row store {folder} is damaged: the rows are made again",)
        check_prompt(tokenizer, template, data.date, prompt)
        stored = _fill_store(folder, Job(tokenizer, template, data, fraction, held_out, prompt))
    columns, meta = stored
    listing = list_files(data.path, data.split)
    notes += tuple(_listing_notes(data.path, listing))
    notes += tuple(_renamed(note, meta.get("path", data.path), data.path) for note in meta["notes"])
    begin, end = meta["records"]
    files = listing.files or (f"{data.path} {data.split}",)
    origin = (tuple(map(os.path.realpath, files)), begin, end)
    return Rows(
        **columns_of(columns),
        counts=meta["counts"],
        key=key,
        notes=notes,
        origins=(origin,),
        teacher=_teacher_rows(columns, meta, key),
    )


def _renamed(note: str, old: str, new: str) -> str:
    """Returns a line about data that were at `old` when they were stored and are at `new` now."""
    for start in ("", "warning: "):
        if note.startswith(start + old):
            return start + new + note.removeprefix(start + old)
    return note


def _teacher_rows(columns: dict[str, Any], meta: dict[str, Any], key: str) -> Rows | None:
    if (width := meta.get("teacher_seq_len")) is None:
        return None
    ends = np.asarray(columns[TEACHER_ENDS])
    own = {name: Ragged(columns[f"{TEACHER}{name}"], ends, width) for name in STORED}
    return Rows(**columns_of(own), counts={}, key=key)


def shortest_rows(rows: Rows) -> int:
    """Returns the tokens of the shortest rows that hold the same documents.

    A row's attention costs its length for each token, however short its documents are.
    """
    width = rows.tokens.shape[1]
    if rows.teacher is not None or any(rows.counts[name] for name in ("truncated", "cut")):
        return width
    longest = max(int(rows.positions[i : i + 256].max()) for i in range(0, len(rows), 256)) + 1
    return min(width, -(-longest // _ROUNDED) * _ROUNDED)


def blend_rows(parts: Sequence[Rows], sources: Sequence[tuple[str, float | None]]) -> Rows:
    """Returns the rows of several sources as one data set; without weights, all rows are alike."""
    counts = sum((Counter(part.counts) for part in parts), Counter())
    weights = [weight for _, weight in sources if weight is not None]
    key = hashlib.sha256(json.dumps([[part.key for part in parts], weights]).encode())
    lines = [f"{path}: {describe_rows(x)}" for (path, _), x in zip(sources, parts, strict=True)]

    def join(some: Sequence[Rows]) -> dict[str, Any]:
        return {name: Joined([getattr(part, name) for part in some]) for name in COLUMNS}

    columns, teachers = join(parts), [part.teacher for part in parts if part.teacher is not None]
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
        teacher=Rows(**join(teachers), counts={}, key=key.hexdigest()[:20]) if teachers else None,
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
    data, prompt, total = job.data, job.prompt, Prepared(EMPTY)
    pad = job.tokenizer.pad_token_id
    begin, end = slice_of(data.path, data.split)
    last = end if data.max_conversations is None else begin + data.max_conversations
    end = last if end is None or last is None else min(end, last)
    parts = prepare_all(job, chunks(read_raw(data.path, data.split, begin, end)))
    counts = {"tokens": 0, "target_tokens": 0}
    longest = 0
    with writing(folder, data.seq_len, teacher=prompt is not None) as writer:
        for window in windows(shown(parts, data.path), data, total):
            rows = choose_rows(window, data, prompt.seq_len if prompt else None)
            columns, lengths = join_rows(window.flat, rows)
            columns = fill_rows(columns, lengths, data.seq_len, 0 if pad is None else pad)
            if window.teacher is not None:
                teacher, lengths = join_rows(window.teacher, rows)
                teacher |= {"ends": writer.counts[f"{TEACHER}tokens"] + np.cumsum(lengths)}
                columns |= {f"{TEACHER}{name}": x for name, x in teacher.items()}
                longest = max(longest, int(lengths.max()))
            writer.append(columns)
            counts["tokens"] += len(window.flat.tokens)
            counts["target_tokens"] += int(window.flat.target.sum())
        counts["rows"] = writer.num_rows
        _check(total, job, writer.num_rows)
        notes = _notes(total, job, (begin, end))
        counts |= {name: total.counts[name] for name in ("conversations", *_LEFT_OUT)}
        meta: dict[str, Any] = {"counts": counts, "notes": notes, "records": [begin, end]}
        meta["path"] = data.path
        if prompt is not None:
            counts["teacher_messages"] = total.counts["teacher_messages"]
            counts["teacher_tokens"] = writer.counts[f"{TEACHER}tokens"]
            meta["teacher_seq_len"] = prompt.seq_len or -(-longest // _ROUNDED) * _ROUNDED
        return writer.finish(meta)


def _check(total: Prepared, job: Job, num_rows: int) -> None:
    """Raises UserError if records are bad or too long, or none is left."""
    counts, data, prompt = total.counts, job.data, job.prompt
    bad = first_lines(total.problems, counts["bad"])
    if bad and data.on_bad_record == "error":
        raise UserError("\n".join(bad))
    if not counts["conversations"]:
        side = "for evaluation" if job.held_out else "beside those for evaluation"
        where = f" {side} (eval.fraction {job.fraction:g})" if job.fraction else ""
        raise UserError("\n".join([f"{data.path}: expected records{where}, got none", *bad]))
    sizes = {"data.seq-len": data.seq_len, "teacher.seq-len": prompt and prompt.seq_len}
    short = [name for name in sizes if counts[name]]
    limits, fields = " or ".join(f"{name} {sizes[name]}" for name in short), " and ".join(short)
    if total.long and data.overlong == "error":
        shown = ", ".join(first_lines(total.long, counts["long"])).replace(", and", " and")
        raise UserError(
            f"{data.path}: {counts['long']} conversations are longer than {limits}: {shown} "
            f"(place, tokens). Raise {fields}, or set data.overlong to truncate or drop"
        )
    if not num_rows and short:
        raise UserError(
            f"{data.path}: no token with a loss is left within {limits} ({counts['long']} of "
            f"{counts['conversations']} conversations are longer). Raise {fields}"
        )
    if not num_rows:
        raise UserError(
            f"{data.path}: expected a token with a loss, got none in {counts['conversations']} "
            "conversations. Give answers that are not empty and have a weight"
        )


def _notes(total: Prepared, job: Job, taken: tuple[int, int | None]) -> list[str]:
    """Returns lines about what is not used or not learned."""
    notes, data = [], job.data
    if total.counts["chats"]:
        notes += describe_template(job.tokenizer, need_template(job.template), data.date)
    if taken[1] is not None and "[" in data.split:
        notes.append(f"{data.path}: {data.split} is records {taken[0] + 1:,} to {taken[1]:,}")
    notes += [f"warning: {data.path}: {line}" for line in describe_ignored(total.ignored)]
    notes += describe_hidden(total.hidden, data.path)
    if count := total.counts["bad"]:
        skipped = f"{count:,} bad records are skipped (data.on-bad-record skip):"
        notes += [f"warning: {data.path}: {skipped}", *first_lines(total.problems, count)]
    return notes


def _listing_notes(path: str, listing: Listing) -> list[str]:
    """Returns lines about a folder's other files, which the stored rows do not depend on."""
    notes = [f"warning: {path}: {line}" for line in listing.missing]
    if unread := listing.unread:
        shown = ", ".join(unread[:3]) + (", ..." if len(unread) > 3 else "")
        notes.append(f"{path}: {len(unread):,} other files are not read ({shown})")
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
    if rows.teacher is not None:
        size = rows.teacher.tokens.size
        summary += (
            f"; the teacher's own rows of {rows.teacher.tokens.shape[1]:,} tokens are "
            f"{counts['teacher_tokens'] / size:.0%} filled"
        )
    return "\n".join([summary, *rows.notes])
