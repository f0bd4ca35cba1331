"""Documents to rows of fixed length: truncation, packing and the row store on disk."""

import bisect
import hashlib
import json
import os
import shutil
import uuid
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kd_jax.config import DataConfig, UserError
from kd_jax.data.answers import describe_hidden
from kd_jax.data.chat import Document, describe_template, tokenize
from kd_jax.data.records import MAX_SHOWN, first_of, read_records
from kd_jax.data.templates import Template

Batch = dict[str, np.ndarray]

COLUMNS = {
    "tokens": np.int32, "segment_ids": np.int32, "positions": np.int32, "loss_mask": np.bool_
}  # fmt: skip
STORE_VERSION = 2


def fit(
    documents: list[Document], data: DataConfig, source: str
) -> tuple[list[Document], dict[str, int]]:
    """Returns the documents for rows of seq_len, and how many were truncated or dropped."""
    S = data.seq_len
    long = [i for i, document in enumerate(documents) if len(document.tokens) > S]
    if long and data.overlong == "error":
        shown = ", ".join(f"{i + 1} ({len(documents[i].tokens)})" for i in long[:MAX_SHOWN])
        more = f" and {len(long) - MAX_SHOWN} more" if len(long) > MAX_SHOWN else ""
        raise UserError(
            f"{source}: {len(long)} conversations are longer than data.seq-len {S}: {shown}{more} "
            "(number, tokens). Raise data.seq-len, or set data.overlong to truncate or drop"
        )
    drop = data.overlong == "drop"
    kept = [
        Document(d.tokens[:S], d.target[:S]) for d in documents if not (drop and len(d.tokens) > S)
    ]
    useful = [document for document in kept if document.target.any()]
    if not useful:
        raise UserError(
            f"{source}: no token with a loss is left in rows of {S} tokens "
            f"({len(long)} of {len(documents)} conversations are longer). Raise data.seq-len"
        )
    return useful, {
        "conversations": len(documents),
        "truncated": 0 if drop else len(long),
        "dropped": len(long) if drop else 0,
        "without_target": len(kept) - len(useful),
    }


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
        bisect.insort(open_rows, (room - lengths[i], row))
    return rows


def fill_rows(documents: list[Document], data: DataConfig, pad: int) -> Batch:
    """Returns the columns of the rows, [R, S] each; segment 0 is padding."""
    lengths = [len(document.tokens) for document in documents]
    rows = pack(lengths, data.seq_len) if data.pack else [[i] for i in range(len(documents))]
    out: Batch = {
        name: np.zeros((len(rows), data.seq_len), dtype) for name, dtype in COLUMNS.items()
    }
    out["tokens"][:] = pad
    for r, row in enumerate(rows):
        at = 0
        for segment, i in enumerate(row, start=1):
            here = (r, slice(at, at + lengths[i]))
            out["tokens"][here] = documents[i].tokens
            out["segment_ids"][here] = segment
            out["positions"][here] = np.arange(lengths[i])
            out["loss_mask"][here] = documents[i].target
            at += lengths[i]
    return out


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
    """Conversations, truncated and dropped ones, rows and tokens."""
    key: str
    """Hash of the source, the tokenizer and the options."""
    notes: tuple[str, ...] = ()
    """Lines to print before the rows are used."""

    def __len__(self) -> int:
        return len(self.tokens)


def make_rows(
    data: DataConfig,
    tokenizer: Any,
    template: Template | None,
    *,
    path: str | None = None,
    split: str | None = None,
    max_conversations: int | None = None,
) -> Rows:
    """Returns the rows of `path` (None: data.path) from the row store, which it fills if needed."""
    if path is None:
        path, split, max_conversations = data.path, data.split, data.max_conversations
    source = _source_hash(path, split or "")
    options = (
        data.seq_len, data.train_on, data.overlong, data.pack, data.date, max_conversations,
        data.on_bad_record,
    )  # fmt: skip
    vocabulary = (tokenizer.backend_tokenizer.to_str(), tokenizer.special_tokens_map)
    recipe = [STORE_VERSION, vocabulary, template, source, options]
    key = hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:20]
    folder = Path(data.cache_dir).expanduser() / key
    if (rows := _open_store(folder)) is not None:
        return rows
    records, bad = read_records(path, split or "", max_conversations, data.on_bad_record)
    documents, unplaced = tokenize(tokenizer, records, template, data)
    if unplaced and data.on_bad_record == "error":
        raise UserError("\n".join(first_of(unplaced)))
    hidden = Counter(key for document in documents for key in sorted(document.hidden))
    notes = (*_skipped(path, bad + unplaced), *describe_hidden(hidden, path))
    if template is not None and any(record.messages for record in records):
        notes = (*describe_template(tokenizer, template, data.date), *notes)
    documents, counts = fit(documents, data, path)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    columns = fill_rows(documents, data, pad)
    counts |= {
        "rows": len(columns["tokens"]),
        "tokens": int((columns["segment_ids"] > 0).sum()),
        "target_tokens": int(columns["loss_mask"].sum()),
    }
    _write_store(folder, columns, counts, notes)
    return Rows(**columns, counts=counts, key=key, notes=notes)


def _skipped(path: str, problems: list[str]) -> tuple[str, ...]:
    if not problems:
        return ()
    head = f"warning: {path}: {len(problems):,} bad records are skipped (data.on-bad-record skip):"
    return (head, *first_of(problems))


def _source_hash(path: str, split: str) -> str:
    """Returns the content hash of a file or folder, or the name of a hub dataset."""
    place = Path(path).expanduser()
    if place.is_dir():
        files = sorted(file for file in place.rglob("*") if file.is_file())
        hashes = [f"{file.relative_to(place)} {_source_hash(str(file), '')}" for file in files]
        return "\n".join([split, *hashes])
    if not place.is_file():
        return f"{path} {split}"
    with place.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _open_store(folder: Path) -> Rows | None:
    """Returns the stored rows, or None if the store is absent or damaged."""
    try:
        meta = json.loads((folder / "meta.json").read_text())
        counts, notes = meta["counts"], tuple(meta["notes"])
        columns = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in COLUMNS}
    except (OSError, ValueError, EOFError, KeyError, TypeError):
        return None
    if len({column.shape for column in columns.values()}) != 1:
        return None
    return Rows(**columns, counts=counts, key=folder.name, notes=notes)


def _write_store(
    folder: Path, columns: Batch, counts: dict[str, int], notes: tuple[str, ...]
) -> None:
    beside = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}.tmp")
    try:
        beside.mkdir(parents=True)
        for name, column in columns.items():
            np.save(beside / f"{name}.npy", column)
        (beside / "meta.json").write_text(json.dumps({"counts": counts, "notes": notes}))
        if _open_store(folder) is None:  # otherwise another process was first
            shutil.rmtree(folder, ignore_errors=True)
            os.rename(beside, folder)
    except OSError as error:
        if _open_store(folder) is None:
            raise UserError(f"data.cache-dir: {folder} cannot be written ({error})") from None
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def describe_rows(rows: Rows) -> str:
    """Returns a summary of the rows for the terminal, and their notes."""
    counts = rows.counts
    filled = counts["tokens"] / rows.tokens.size
    left_out = "".join(
        f", {counts[name]:,} {text}"
        for name, text in (
            ("truncated", "truncated"),
            ("dropped", "dropped as too long"),
            ("without_target", "left out (no loss token left)"),
        )
        if counts[name]
    )
    summary = (
        f"{counts['conversations']:,} conversations{left_out}: {len(rows):,} rows of "
        f"{rows.tokens.shape[1]:,} tokens, {filled:.0%} filled, "
        f"{counts['target_tokens']:,} tokens with a loss"
    )
    return "\n".join([summary, *rows.notes])
