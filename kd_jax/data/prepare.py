"""Raw records to tokenized documents of at most seq_len tokens."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import xxhash

from kd_jax.config import DataConfig
from kd_jax.data.chat import Document, tokenize
from kd_jax.data.prompts import TeacherPrompt
from kd_jax.data.readers import Raw
from kd_jax.data.records import Record, make_record

Chunk = list[tuple[str, Raw]]
"""Raw records with their places."""

Piece = tuple[np.ndarray, np.ndarray]
"""Ids and target tokens of a document or of a part of it."""
_CHUNK_RECORDS = 512
_CHUNK_BYTES = 2**20


@dataclass(frozen=True, slots=True)
class Job:
    """Inputs of the preparation of records."""

    tokenizer: Any
    template: Any
    data: DataConfig
    fraction: float = 0.0
    """Share of the records that are held out, by the hash of their content."""
    held_out: bool = False
    """Take the held-out records; otherwise the others."""
    prompt: TeacherPrompt | None = None
    """The teacher's own; None: it sees the student's."""


class Flat(NamedTuple):
    """Documents, one after the other."""

    tokens: np.ndarray
    target: np.ndarray
    lengths: np.ndarray


EMPTY = Flat(np.zeros(0, np.int32), np.zeros(0, bool), np.zeros(0, np.int64))


def join(pieces: list[Piece]) -> Flat:
    if not pieces:
        return EMPTY
    tokens, target = (np.concatenate(column) for column in zip(*pieces, strict=True))
    return Flat(tokens, target, np.array([len(x) for x, _ in pieces]))


@dataclass(slots=True)
class Prepared:
    """Documents, and what became of the records."""

    flat: Flat
    counts: Counter[str] = field(default_factory=Counter)
    """`conversations` and, of these, `long` ones that were `truncated` or `dropped`, by the fields
    that they exceed too, texts that were `cut`, those `without_target`, and `chats`; and `bad`
    records."""
    ignored: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Records by (key, reason) of what is not used."""
    hidden: Counter[str] = field(default_factory=Counter)
    """Records by key of hidden.HIDDEN: what the template does not show."""
    problems: list[str] = field(default_factory=list)
    """`place: why` of each bad record."""
    long: list[str] = field(default_factory=list)
    """`place (tokens)` of each document that is longer than a row."""
    teacher: Flat | None = None
    """The same documents with the teacher's own prompt."""


def chunks(raw: Iterable[tuple[str, Raw]]) -> Iterator[Chunk]:
    """Yields the raw records in lists of bounded size."""
    chunk: Chunk = []
    size = 0
    for place, record in raw:
        chunk.append((place, record))
        size += len(record) if isinstance(record, bytes) else _CHUNK_BYTES // _CHUNK_RECORDS
        if len(chunk) == _CHUNK_RECORDS or size >= _CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def prepare(job: Job, chunk: Chunk) -> Prepared:
    """Returns a chunk's records as documents; bad records are problems."""
    records: list[Record] = []
    problems: list[str] = []
    num_held_out = 0
    for place, raw in chunk:
        try:
            record = make_record(place, raw, job.prompt is not None and job.prompt.messages)
            if job.fraction and is_held_out(record, job.fraction) != job.held_out:
                num_held_out += 1
                continue
            records.append(record)
        except ValueError as error:
            problems.append(f"{place}: {error}")
    documents, unplaced = tokenize(job.tokenizer, records, job.template, job.data, job.prompt)
    out = fit(documents, job.data, job.prompt)
    out.problems = problems + unplaced
    out.counts["bad"] = len(out.problems)
    out.counts["conversations"] = len(chunk) - num_held_out - len(out.problems)
    out.counts["chats"] = sum(bool(record.messages) for record in records)
    out.hidden = Counter(chain.from_iterable(document.hidden for document in documents))
    out.ignored = Counter(chain.from_iterable(record.ignored for record in records))
    if job.data.train_on == "all":
        why = "data.train-on all gives every token a loss"
        out.ignored["weight", why] = sum(not all(record.learn) for record in records)
    return out


def is_held_out(record: Record, fraction: float) -> bool:
    """Returns True for a held-out record; its content decides, so that equal ones go together."""
    content = json.dumps([record.messages, record.tools, record.text], sort_keys=True)
    return xxhash.xxh3_64_intdigest(content.encode()) < fraction * 2**64


def fit(
    documents: list[Document], data: DataConfig, prompt: TeacherPrompt | None = None
) -> Prepared:
    """Returns the documents for rows of seq_len; long ones truncated or dropped, text cut."""
    S = data.seq_len
    counts: Counter[str] = Counter()
    long: list[str] = []
    kept: list[Piece] = []
    others: list[Piece] = []
    teacher_seq_len = None if prompt is None else prompt.seq_len
    if prompt is not None:
        counts["teacher_messages"] = sum(x.record.own is not None for x in documents)
    for document in documents:
        size, record = len(document.tokens), document.record
        is_plain = record.answers[:1] == ((0, len(record.text or "")),)
        excess = _excess(document, S, teacher_seq_len)
        if excess and not is_plain:
            long.append(f"{record.place} ({next(iter(excess.values())):,})")
            counts.update(["long", *excess])
            counts["dropped" if data.overlong == "drop" else "truncated"] += 1
            if data.overlong == "drop":
                continue
        elif size > S:
            counts["cut"] += 1
        if document.teacher is not None:
            student, other = _cut_both(document, S, teacher_seq_len)
            if student[1].any():
                kept.append(student)
                others.append(other)
            counts["without_target"] += not student[1].any()
            continue
        stop = size if is_plain else min(size, S)
        pieces = [slice(start, min(start + S, stop)) for start in range(0, stop, S)]
        document.target[:stop:S] = False  # nothing precedes the first token of a piece
        useful = [x for x in pieces if document.target[x].any()]
        counts["without_target"] += not useful
        kept += [(document.tokens[x], document.target[x]) for x in useful]
    teacher = None if prompt is None else join(others)
    return Prepared(join(kept), counts, long=long, teacher=teacher)


def _excess(document: Document, seq_len: int, teacher_seq_len: int | None) -> dict[str, int]:
    """Returns the tokens of each side that is longer than its row, by the field that limits it."""
    excess = {"data.seq-len": len(document.tokens)} if len(document.tokens) > seq_len else {}
    size = 0 if document.teacher is None else len(document.teacher[0])
    if teacher_seq_len is not None and size > teacher_seq_len:
        excess["teacher.seq-len"] = size
    return excess


def _cut_both(document: Document, seq_len: int, teacher_seq_len: int | None) -> tuple[Piece, Piece]:
    """Returns both sides cut to their rows, and to the target tokens that both then have."""
    assert document.teacher is not None
    sides = [
        (ids[:limit], target[:limit])
        for (ids, target), limit in (
            ((document.tokens, document.target), seq_len),
            (document.teacher, teacher_seq_len),
        )
    ]
    count = min(int(target.sum()) for _, target in sides)
    out = []
    for ids, target in sides:
        places = np.flatnonzero(target)
        stop = len(ids) if len(places) == count else int(places[count])
        out.append((ids[:stop], target[:stop]))
    return out[0], out[1]
