"""Text to fixed rows on disk, and rows to batches: chat template, loss mask, packing, order."""

import bisect
import hashlib
import json
import math
import os
import shutil
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import grain
import numpy as np

from kd_jax.config import Config, DataConfig, UserError

Conversation = list[dict[str, str]]
Batch = dict[str, np.ndarray]

ROLES = ("system", "user", "assistant")
COLUMNS = {
    "tokens": np.int32, "segment_ids": np.int32, "positions": np.int32, "loss_mask": np.bool_
}  # fmt: skip
# A macro, because transformers hands no functions to templates; +%} keeps a line break after it.
FIXED_DATE = "{% macro strftime_now(format) %}{{ fixed_date }}{% endmacro +%}"
STORE_VERSION = 1
MAX_SHOWN = 20


def load_tokenizer(folder: Path) -> Any:
    """Returns the fast tokenizer of a folder in Hugging Face form."""
    from transformers import AutoTokenizer  # seconds that other imports of this file need not pay

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{folder}: expected tokenizer files, which do not load ({reason})"
        ) from None
    if not tokenizer.is_fast:
        raise UserError(f"{folder}: expected a tokenizer.json (a fast tokenizer), got a slow one")
    tokenizer.backend_tokenizer.no_truncation()  # as every use sets it, so the rows' key is stable
    tokenizer.backend_tokenizer.no_padding()
    return tokenizer


def check_same_tokenizer(student: Any, teacher: Any, student_path: Any, teacher_path: Any) -> int:
    """Returns the vocabulary size that both tokenizers share; templates may differ.

    Raises:
      UserError: any token has another id, or merges differ: distributions over different
        vocabularies cannot be compared entry by entry.
    """
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    differ = [t for t in ours.keys() | theirs.keys() if ours.get(t) != theirs.get(t)]
    if differ or _merges(student) != _merges(teacher):
        shown = [f"{t!r} is {ours.get(t)} and {theirs.get(t)}" for t in sorted(differ)[:3]]
        what = f"{len(differ)} tokens ({'; '.join(shown)})" if differ else "the merges"
        raise UserError(
            f"student.path, teacher.path: expected one tokenizer, got {student_path} and "
            f"{teacher_path}, which differ in {what}. Take a teacher of the student's family"
        )
    return max(ours.values()) + 1


def _merges(tokenizer: Any) -> Any:
    return json.loads(tokenizer.backend_tokenizer.to_str())["model"].get("merges")


def read_conversations(path: str, split: str, limit: int | None) -> list[Conversation]:
    """Returns the conversations of a file or hub dataset, checked.

    Args:
      path: .json (array or lines), .jsonl or .parquet file, or a hub id. A record has Alpaca's
        `instruction`, `input`, `output`, or chat `messages`.
      split: of a hub dataset.
      limit: number of records to take from the start; None takes all.

    Raises:
      UserError: with file and line of each bad record.
    """
    problems = []
    conversations = []
    for place, record in islice(_records(path, split), limit):
        try:
            conversations.append(_conversation(record))
        except ValueError as error:
            problems.append(f"{place}: {error}")
    if problems:
        shown = problems[:MAX_SHOWN]
        more = len(problems) - len(shown)
        raise UserError("\n".join(shown + ([f"and {more} more"] if more else [])))
    if not conversations:
        raise UserError(f"{path}: expected records, got none")
    return conversations


def _records(path: str, split: str) -> Iterator[tuple[str, Any]]:
    """Yields the place of each record and the record; a ValueError stands for an unreadable one."""
    file = Path(path).expanduser()
    if file.suffix in (".json", ".jsonl"):
        if not file.is_file():
            raise UserError(f"data: expected a file, got {path}, which is not there")
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
        except json.JSONDecodeError as error:
            record = ValueError(f"expected JSON, got {line[:40]!r} ({error.msg})")
        yield f"{file}:{number}", record


def _array_records(file: Path, text: str) -> Iterator[tuple[str, Any]]:
    """Yields the entries of a JSON array with the line on which each begins."""
    try:
        records = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{file}:{error.lineno}: expected a JSON array ({error.msg})") from None
    decoder = json.JSONDecoder()
    at, line, counted = text.index("[") + 1, 1, 0
    for record in records:
        while text[at] in " \t\r\n,":
            at += 1
        line, counted = line + text.count("\n", counted, at), at
        yield f"{file}:{line}", record
        at = decoder.raw_decode(text, at)[1]


def _load_dataset(path: str, file: Path, split: str) -> Any:
    import datasets  # seconds that JSON files need not pay

    try:
        if file.suffix == ".parquet":
            return datasets.Dataset.from_parquet(str(file))
        return datasets.load_dataset(str(file) if file.is_dir() else path, split=split)
    except Exception as error:
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        raise UserError(
            f"data: expected a .json, .jsonl or .parquet file or a dataset on the hub, got {path}, "
            f"which cannot be read ({reason})"
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


def chat_template_of(
    data: DataConfig, student_tokenizer: Any, teacher_tokenizer: Any = None
) -> str:
    """Returns data.chat_template's text, else the student's template, else the teacher's."""
    if data.chat_template is not None:
        file = Path(data.chat_template).expanduser()
        if not file.is_file():
            raise UserError(f"data.chat-template: expected a Jinja file, got {file}")
        return file.read_text(encoding="utf-8")
    for tokenizer in (student_tokenizer, teacher_tokenizer):
        if tokenizer is not None and tokenizer.chat_template is not None:
            return tokenizer.get_chat_template()
    raise UserError("data.chat-template: neither tokenizer has a chat template; give a Jinja file")


def render(
    tokenizer: Any, messages: Conversation, template: str, date: str
) -> tuple[str, list[tuple[int, int]]]:
    """Returns the conversation as text, and where in it each answer and its end-of-turn lie.

    An answer begins where the generation prompt ends. What the template writes after its
    end-of-turn (a line break, say) is not the answer's.
    """

    def apply(turns, **options):
        return _apply_template(tokenizer, turns, template, date, **options)

    text = apply(messages)
    spans = []
    for i, turn in enumerate(messages):
        if turn["role"] != "assistant":
            continue
        after = text if i + 1 == len(messages) else apply(messages[: i + 1])
        if i:
            before = apply(messages[:i], add_generation_prompt=True)
        else:  # templates need not take an empty conversation
            prompt = apply(messages[:1], add_generation_prompt=True)[len(after) :]
            begin = after.find(prompt)
            before = after[: begin + len(prompt)] if prompt and begin >= 0 else ""
        if not (before and after.startswith(before) and text.startswith(after)):
            raise UserError(
                "data.chat-template: the template rewrites earlier turns, so an answer's place in "
                "the text is not defined. Give another template"
            )
        spans.append((len(before), len(after.rstrip())))
    return text, spans


def _apply_template(
    tokenizer: Any, turns: Conversation, template: str, date: str, **options: Any
) -> str:
    try:
        return tokenizer.apply_chat_template(
            turns,
            tokenize=False,
            chat_template=FIXED_DATE + template,
            date_string=date,
            fixed_date=date,
            **options,
        )
    except Exception as error:  # templates raise as they like
        raise UserError(
            f"data.chat-template: the template refuses the conversation that begins "
            f"{turns[0]['content']!r:.60} ({error})"
        ) from None


@dataclass(frozen=True, slots=True)
class Document:
    """One tokenised conversation, [n] each; target marks tokens to be predicted."""

    tokens: np.ndarray
    target: np.ndarray


def tokenize(
    tokenizer: Any, conversations: list[Conversation], template: str, data: DataConfig
) -> list[Document]:
    """Returns one document a conversation, its ids those of the whole text at once.

    A token is a target if it begins inside an answer; the first token of a document never is.
    """
    documents = []
    for first in range(0, len(conversations), 512):
        some = conversations[first : first + 512]
        rendered = [render(tokenizer, messages, template, data.date) for messages in some]
        encoded = tokenizer(
            [text for text, _ in rendered],
            add_special_tokens=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
        )
        for (_, spans), ids, offsets in zip(
            rendered, encoded["input_ids"], encoded["offset_mapping"], strict=True
        ):
            start = np.array([begin for begin, _ in offsets], np.int64)
            target = np.full(len(ids), data.train_on == "all")
            for begin, end in spans:
                target |= (start >= begin) & (start < end)
            target[:1] = False
            documents.append(Document(np.array(ids, np.int32), target))
    return documents


def fit(
    documents: list[Document], data: DataConfig, source: str
) -> tuple[list[Document], dict[str, int]]:
    """Returns the documents that fit rows of seq_len, and counts of what happened to the others."""
    S = data.seq_len
    long = [i for i, document in enumerate(documents) if len(document.tokens) > S]
    if long and data.overlong == "error":
        shown = ", ".join(f"{i + 1} ({len(documents[i].tokens)})" for i in long[:MAX_SHOWN])
        more = f" and {len(long) - MAX_SHOWN} more" if len(long) > MAX_SHOWN else ""
        raise UserError(
            f"{source}: {len(long)} conversations are longer than data.seq-len {S}: {shown}{more} "
            "(number, tokens). Raise data.seq-len or let data.overlong truncate or drop them"
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
    """Returns rows of document numbers; longest first, each goes where it leaves least room."""
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
    """Returns the columns of the packed rows, [R, S] each; segment 0 is padding."""
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
    """The rows of a data set, memory-mapped, [R, S] each; `counts` says how they came about.

    segment_ids number a row's documents from 1, and 0 is padding; positions restart in each;
    loss_mask marks the tokens that are to be predicted; key is a hash of all that they came from.
    """

    tokens: np.ndarray
    segment_ids: np.ndarray
    positions: np.ndarray
    loss_mask: np.ndarray
    counts: dict[str, int]
    key: str

    def __len__(self) -> int:
        return len(self.tokens)


def make_rows(
    data: DataConfig,
    tokenizer: Any,
    template: str,
    *,
    path: str | None = None,
    split: str | None = None,
    max_conversations: int | None = None,
) -> Rows:
    """Returns the rows of `path` (data.path if None) from the row store, made at the first use."""
    if path is None:
        path, split, max_conversations = data.path, data.split, data.max_conversations
    source = _source_hash(path, split or "")
    options = (data.seq_len, data.train_on, data.overlong, data.pack, data.date, max_conversations)
    vocabulary = (tokenizer.backend_tokenizer.to_str(), tokenizer.special_tokens_map)
    recipe = [STORE_VERSION, vocabulary, template, source, options]
    key = hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:20]
    folder = Path(data.cache_dir).expanduser() / key
    if (rows := _open_store(folder)) is not None:
        return rows
    conversations = read_conversations(path, split or "", max_conversations)
    documents = tokenize(tokenizer, conversations, template, data)
    documents, counts = fit(documents, data, path)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    columns = fill_rows(documents, data, pad)
    counts |= {
        "rows": len(columns["tokens"]),
        "tokens": int((columns["segment_ids"] > 0).sum()),
        "target_tokens": int(columns["loss_mask"].sum()),
    }
    _write_store(folder, columns, counts)
    return Rows(**columns, counts=counts, key=key)


def _source_hash(path: str, split: str) -> str:
    """Returns the contents' hash of a file or folder; a hub id is taken by its name."""
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
    """Returns the stored rows, or None where the store is absent or damaged."""
    try:
        counts = json.loads((folder / "meta.json").read_text())
        columns = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in COLUMNS}
    except (OSError, ValueError, EOFError):
        return None
    shapes = {column.shape for column in columns.values()}
    return Rows(**columns, counts=counts, key=folder.name) if len(shapes) == 1 else None


def _write_store(folder: Path, columns: Batch, counts: dict[str, int]) -> None:
    beside = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}.tmp")
    try:
        beside.mkdir(parents=True)
        for name, column in columns.items():
            np.save(beside / f"{name}.npy", column)
        (beside / "meta.json").write_text(json.dumps(counts))
        if _open_store(folder) is None:  # else another process was first
            shutil.rmtree(folder, ignore_errors=True)
            os.rename(beside, folder)
    except OSError as error:
        if _open_store(folder) is None:
            raise UserError(f"data.cache-dir: {folder} cannot be written ({error})") from None
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def describe(rows: Rows) -> str:
    """Returns what became of the conversations, for people."""
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
    return (
        f"{counts['conversations']:,} conversations{left_out}: {len(rows):,} rows of "
        f"{rows.tokens.shape[1]:,} tokens, {filled:.0%} filled, "
        f"{counts['target_tokens']:,} tokens with a loss"
    )


def num_steps(rows: Rows, config: Config) -> int:
    """Returns the run's optimizer steps, from `steps` or from `epochs` over the rows."""
    if config.steps is not None:
        return config.steps
    assert config.epochs is not None
    return math.ceil(config.epochs * len(rows) / config.data.batch_size)


def batches(
    rows: Rows, *, seed: int, start_step: int, batch_size: int, accumulation_steps: int
) -> Iterator[Batch]:
    """Yields the batch of each step from `start_step` on, [A, B / A, S] arrays, without end.

    The batch is a function of seed and step alone: every pass over the rows has its own order.
    """
    order = grain.MapDataset.range(len(rows)).seed(seed).shuffle().repeat()

    def take(step: int) -> Batch:
        picked = [order[step * batch_size + i] for i in range(batch_size)]
        return _batch(rows, np.array(picked), accumulation_steps)

    steps = grain.MapDataset.range(start_step, 2**31).map(take)
    yield from steps.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4))


def _batch(rows: Rows, picked: np.ndarray, accumulation_steps: int) -> Batch:
    shape = (accumulation_steps, -1, rows.tokens.shape[1])
    return {name: getattr(rows, name)[picked].reshape(shape) for name in COLUMNS}


def eval_batches(rows: Rows, batch_size: int) -> Iterator[Batch]:
    """Yields every row once, in order, [B, S] arrays; the last batch is filled with empty rows."""
    for first in range(0, len(rows), batch_size):
        some = {name: np.array(getattr(rows, name)[first : first + batch_size]) for name in COLUMNS}
        missing = batch_size - len(some["tokens"])
        yield {name: np.pad(x, ((0, missing), (0, 0))) for name, x in some.items()}
