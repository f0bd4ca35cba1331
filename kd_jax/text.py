"""Records to tokens: reading files, chat templates, and which tokens are to be predicted."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from kd_jax.config import DataConfig, UserError
from kd_jax.config.errors import first_line

Conversation = list[dict[str, str]]

ROLES = ("system", "user", "assistant")
MAX_SHOWN = 20
# A macro, because transformers hands no functions to templates; +%} keeps a line break after it.
FIXED_DATE = "{% macro strftime_now(format) %}{{ fixed_date }}{% endmacro +%}"


def load_tokenizer(folder: Path) -> Any:
    """Returns the fast tokenizer of a folder in Hugging Face form."""
    from transformers import AutoTokenizer  # seconds that other imports of this file need not pay

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        reason = first_line(error)
        raise UserError(
            f"{folder}: expected tokenizer files, which do not load ({reason})"
        ) from None
    if not tokenizer.is_fast:
        raise UserError(f"{folder}: expected a tokenizer.json (a fast tokenizer), got a slow one")
    tokenizer.backend_tokenizer.no_truncation()  # as every use sets it, so the rows' key is stable
    tokenizer.backend_tokenizer.no_padding()
    return tokenizer


def check_same_tokenizer(
    student: Any,
    teacher: Any,
    student_path: Any,
    teacher_path: Any,
    fields: str = "student.path, teacher.path",
) -> int:
    """Returns the vocabulary size that both tokenizers share; templates may differ.

    Raises:
      UserError: any token has another id, or merges differ: distributions over different
        vocabularies cannot be compared entry by entry.
    """
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    if student.backend_tokenizer.to_str() == teacher.backend_tokenizer.to_str():
        return max(ours.values()) + 1  # parsing both would take half a gigabyte
    differ = [t for t in ours.keys() | theirs.keys() if ours.get(t) != theirs.get(t)]
    if differ or _merges(student) != _merges(teacher):
        shown = [f"{t!r} is {ours.get(t)} and {theirs.get(t)}" for t in sorted(differ)[:3]]
        what = f"{len(differ)} tokens ({'; '.join(shown)})" if differ else "the merges"
        raise UserError(
            f"{fields}: expected one tokenizer, got {student_path} and {teacher_path}, which "
            f"differ in {what}. Take models of one family"
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


def check_path(path: str, field: str) -> None:
    """Raises UserError where a path names a file that is not there; hub ids are not looked up."""
    file = Path(path).expanduser()
    if file.suffix in (".json", ".jsonl", ".parquet") and not file.is_file():
        raise UserError(f"{field}: expected a file, got {path}, which is not there")


def _records(path: str, split: str) -> Iterator[tuple[str, Any]]:
    """Yields the place of each record and the record; a ValueError stands for an unreadable one."""
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
        reason = f"{type(error).__name__}: {first_line(error)}"
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
        answer = after[len(before) :].rstrip()
        if before and after.startswith(before) and not text.startswith(before + answer):
            # Qwen3's writes an empty thought before the last answer of a conversation alone.
            content = turn["content"].strip()
            answer = answer[max(answer.rfind(content), 0) :]
        if not (before and after.startswith(before) and text.startswith(before + answer)):
            raise UserError(
                "data.chat-template: the template rewrites earlier turns, so an answer's place in "
                "the text is not defined. Give another template"
            )
        spans.append((len(before), len(before) + len(answer)))
    return text, spans


def render_prompt(tokenizer: Any, messages: Conversation, template: str, date: str) -> str:
    """Returns the conversation as text up to where the assistant's answer begins."""
    return _apply_template(tokenizer, messages, template, date, add_generation_prompt=True)


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
