"""Reads files and hub datasets into checked records."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from kd_jax.config import UserError
from kd_jax.config.errors import first_line

Conversation = list[dict[str, Any]]
ROLES = ("system", "user", "assistant")
MAX_SHOWN = 20


@dataclass(frozen=True, slots=True)
class Record:
    """One checked record: a conversation for the chat template, or text that is used as it is."""

    place: str
    """`file:line` or `file, record n`, for messages."""
    messages: Conversation
    """Turns as chat templates take them; [] for text."""
    learn: tuple[bool, ...] = ()
    """One per turn: False leaves an assistant's turn without a loss."""
    tools: list[Any] | None = None
    """Tool descriptions for the template."""
    text: str | None = None
    """Plain text, or prompt and completion, without a template."""
    answers: tuple[tuple[int, int], ...] = ()
    """[begin, end) characters of `text` with a loss."""


def read_records(
    path: str, split: str, limit: int | None, on_bad_record: str = "error"
) -> tuple[list[Record], list[str]]:
    """Returns the checked records of a file or hub dataset, and the problems of bad ones.

    Args:
      path: .json (array or lines), .jsonl or .parquet file, or a hub id. A record has Alpaca's
        `instruction`, `input`, `output`, or chat `messages`.
      split: split of a hub dataset.
      limit: read only the first records; None: all.
      on_bad_record: data.on_bad_record.

    Raises:
      UserError: lists file and line of each bad record, unless these are skipped.
    """
    problems = []
    records = []
    for place, raw in islice(_records(path, split), limit):
        try:
            messages = _conversation(raw)
            records.append(Record(place, messages, (True,) * len(messages)))
        except ValueError as error:
            problems.append(f"{place}: {error}")
    if problems and on_bad_record == "error":
        raise UserError("\n".join(first_of(problems)))
    if not records:
        raise UserError("\n".join([f"{path}: expected records, got none", *first_of(problems)]))
    return records, problems


def first_of(problems: list[str]) -> list[str]:
    """Returns the first problems, and a line that counts the others."""
    more = len(problems) - MAX_SHOWN
    return problems[:MAX_SHOWN] + ([f"and {more} more"] if more > 0 else [])


def check_path(path: str, field: str) -> None:
    """Raises UserError if `path` names a missing file; hub ids are not looked up."""
    file = Path(path).expanduser()
    if file.suffix in (".json", ".jsonl", ".parquet") and not file.is_file():
        raise UserError(f"{field}: expected a file, got {path}, which is not there")


def _records(path: str, split: str) -> Iterator[tuple[str, Any]]:
    """Yields (place, record); a record that cannot be parsed is a ValueError."""
    file = Path(path).expanduser()
    if file.suffix in (".json", ".jsonl"):
        check_path(path, "data")
        yield from _json_records(file)
        return
    for index, record in enumerate(_load_dataset(path, file, split)):
        yield f"{path}, record {index + 1}", record


def _json_records(file: Path) -> Iterator[tuple[str, Any]]:
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot be read ({error})") from None
    if text.lstrip().startswith("["):
        yield from _array_records(file, text)
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:  # of a long number, of deep nesting
            record = ValueError(f"expected JSON, got {line[:40]!r} ({first_line(error)})")
        yield f"{file}:{number}", record


def _array_records(file: Path, text: str) -> Iterator[tuple[str, Any]]:
    """Yields (file:line, entry) for each entry of a JSON array."""
    try:
        records = json.loads(text)
    except (ValueError, RecursionError) as error:
        line = getattr(error, "lineno", 1)
        raise UserError(f"{file}:{line}: expected a JSON array ({first_line(error)})") from None
    decoder = json.JSONDecoder()
    at, line, counted = text.index("[") + 1, 1, 0
    for record in records:
        while text[at] in " \t\r\n,":
            at += 1
        line, counted = line + text.count("\n", counted, at), at
        yield f"{file}:{line}", record
        at = decoder.raw_decode(text, at)[1]


def _load_dataset(path: str, file: Path, split: str) -> Any:
    import datasets  # takes seconds to import

    try:
        if file.suffix == ".parquet":
            return datasets.Dataset.from_parquet(str(file))
        return datasets.load_dataset(str(file) if file.is_dir() else path, split=split)
    except Exception as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(
            f"data: expected a .json, .jsonl or .parquet file or a hub dataset, got {path}, which "
            f"cannot be read ({reason})"
        ) from None


def _conversation(record: Any) -> Conversation:
    if isinstance(record, ValueError):
        raise record
    if not isinstance(record, dict):
        raise ValueError(f"expected an object, got {type(record).__name__}")
    if "messages" in record:
        return _messages(record["messages"])
    missing = [name for name in ("instruction", "output") if name not in record]
    if missing:
        got = ", ".join(sorted(map(str, record))) or "no fields"
        raise ValueError(f"expected messages, or instruction and output, got {got}")
    extra = record.get("input") or ""
    for name, value in (("instruction", record["instruction"]), ("input", extra)):
        if not isinstance(value, str):
            raise ValueError(f"{name}: expected text, got {value!r}")
    question = record["instruction"] + (f"\n\n{extra}" if extra else "")
    turns = [{"role": "user", "content": question}]
    return _messages([*turns, {"role": "assistant", "content": record["output"]}])


def _messages(messages: Any) -> Conversation:
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"messages: expected a list of turns, got {messages!r:.60}")
    turns = []
    for number, turn in enumerate(messages, start=1):
        if not isinstance(turn, dict) or not {"role", "content"} <= turn.keys():
            raise ValueError(f"turn {number}: expected role and content, got {turn!r:.60}")
        if turn["role"] not in ROLES:
            raise ValueError(
                f"turn {number}: expected role {'|'.join(ROLES)}, got {turn['role']!r}"
            )
        if not isinstance(turn["content"], str):
            raise ValueError(f"turn {number}: expected text, got {turn['content']!r:.60}")
        if turn["role"] == "assistant" and not turn["content"].strip():
            raise ValueError(f"turn {number}: expected an answer, got an empty one")
        turns.append({"role": turn["role"], "content": turn["content"]})
    if all(turn["role"] != "assistant" for turn in turns):
        raise ValueError("expected a turn of the assistant, got none")
    return turns
