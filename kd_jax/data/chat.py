"""Conversations to tokens: tokenizers, chat templates and target tokens."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kd_jax.config import DataConfig, UserError
from kd_jax.config.errors import first_line
from kd_jax.data.records import Conversation, Record

# A macro, because transformers passes no functions to templates; +%} preserves the line break.
FIXED_DATE = "{% macro strftime_now(format) %}{{ fixed_date }}{% endmacro +%}"


def load_tokenizer(folder: Path) -> Any:
    """Returns the fast tokenizer of a Hugging Face folder; code of the folder is never run."""
    from transformers import AutoTokenizer  # takes seconds to import

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
        limit = tokenizer.model_max_length
        if not isinstance(limit, int | float) or isinstance(limit, bool):
            raise ValueError(f"model_max_length: expected a number, got {limit!r:.80}")
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic of tokenizers' Rust code is no Exception
        reason = first_line(error)
        if "trust_remote_code" in str(error):
            reason = (
                "it asks to run Python code of the folder, which is never done. Without auto_map "
                "in tokenizer_config.json, tokenizer.json is read"
            )
        raise UserError(
            f"{folder}: expected tokenizer files, which do not load ({reason})"
        ) from None
    if not tokenizer.is_fast:
        raise UserError(f"{folder}: expected a tokenizer.json (a fast tokenizer), got a slow one")
    tokenizer.backend_tokenizer.no_truncation()  # calls set both; fixed for the rows' key
    tokenizer.backend_tokenizer.no_padding()
    return tokenizer


def check_same_tokenizer(
    student: Any,
    teacher: Any,
    student_path: Any,
    teacher_path: Any,
    fields: str = "student.path, teacher.path",
) -> int:
    """Returns the vocabulary size that both tokenizers share; chat templates may differ.

    Raises:
      UserError: token ids or merges differ, so logits cannot be compared entry by entry.
    """
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    if student.backend_tokenizer.to_str() == teacher.backend_tokenizer.to_str():
        return max(ours.values()) + 1  # parsing both takes half a gigabyte
    differ = [t for t in ours.keys() | theirs.keys() if ours.get(t) != theirs.get(t)]
    if differ or _merges(student) != _merges(teacher):
        shown = [f"{t!r} is {ours.get(t)} and {theirs.get(t)}" for t in sorted(differ)[:3]]
        what = f"{len(differ)} tokens ({'; '.join(shown)})" if differ else "the merges"
        raise UserError(
            f"{fields}: expected one tokenizer, got {student_path} and {teacher_path}, which "
            f"differ in {what}. Use models of one family"
        )
    return max(ours.values()) + 1


def _merges(tokenizer: Any) -> Any:
    return json.loads(tokenizer.backend_tokenizer.to_str())["model"].get("merges")


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
    raise UserError("data.chat-template: neither tokenizer has a template. Set a Jinja file")


def render(
    tokenizer: Any, record: Record, template: str, date: str
) -> tuple[str, list[tuple[int, int]]]:
    """Returns the record as text, and each learned answer's (begin, end), end-of-turn included.

    An answer begins after the generation prompt. White space after the end-of-turn is excluded.
    """
    if record.text is not None:
        return record.text, list(record.answers)
    messages = record.messages

    def apply(turns, **options):
        return _apply_template(tokenizer, turns, template, date, tools=record.tools, **options)

    text = apply(messages)
    spans = []
    for i, turn in enumerate(messages):
        if turn["role"] != "assistant" or not record.learn[i]:
            continue
        after = text if i + 1 == len(messages) else apply(messages[: i + 1])
        if i:
            before = apply(messages[:i], add_generation_prompt=True)
        else:  # templates may reject an empty conversation
            prompt = apply(messages[:1], add_generation_prompt=True)[len(after) :]
            begin = after.find(prompt)
            before = after[: begin + len(prompt)] if prompt and begin >= 0 else ""
        answer = after[len(before) :].rstrip()
        if before and after.startswith(before) and not text.startswith(before + answer):
            # Qwen3's template writes an empty thought only before the last answer.
            content = turn["content"].strip()
            answer = answer[max(answer.rfind(content), 0) :]
        if not (before and after.startswith(before) and text.startswith(before + answer)):
            raise UserError(
                "data.chat-template: the template rewrites earlier turns, so the position of an "
                "answer is undefined. Use another template"
            )
        spans.append((len(before), len(before) + len(answer)))
    return text, spans


def render_prompt(tokenizer: Any, messages: Conversation, template: str, date: str) -> str:
    """Returns the conversation as text, up to the start of the assistant's next answer."""
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
    except Exception as error:  # templates may raise anything
        raise UserError(
            f"data.chat-template: the template rejects the conversation that starts with "
            f"{turns[0]['content']!r:.60} ({error})"
        ) from None


@dataclass(frozen=True, slots=True)
class Document:
    """One tokenized conversation: ids [n] int32, and the target tokens of the loss [n] bool."""

    tokens: np.ndarray
    target: np.ndarray


def tokenize(
    tokenizer: Any, records: list[Record], template: str, data: DataConfig
) -> tuple[list[Document], list[str]]:
    """Returns one document per record, tokenized as one text, and the problems of bad records.

    A token is a target if it begins inside an answer. A document's first token is never one.
    A record for which `render` raises ValueError is a problem, `place: why`, without a document.
    """
    documents = []
    problems: list[str] = []
    for first in range(0, len(records), 512):
        rendered = []
        for record in records[first : first + 512]:
            try:
                rendered.append(render(tokenizer, record, template, data.date))
            except ValueError as error:
                problems.append(f"{record.place}: {error}")
        if not rendered:
            continue
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
    return documents, problems
