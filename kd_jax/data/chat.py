"""Conversations to tokens: tokenizers, chat templates and target tokens."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kd_jax.config import DataConfig, UserError
from kd_jax.config.errors import first_line
from kd_jax.data.answers import Rendered, check_learnable, render, show_all
from kd_jax.data.encode import Encoded, encode, ids_of
from kd_jax.data.forms import form_of
from kd_jax.data.prompts import TeacherPrompt, check_targets, render_teacher
from kd_jax.data.records import Conversation, Record
from kd_jax.data.templates import (
    TEMPLATE_FILE,
    Shown,
    Template,
    apply_template,
    check_template,
    choose,
    need_template,
    read_template,
)
from kd_jax.data.vocabulary import check_ids, check_vocab

_BATCH_RECORDS = 256


def _tokenizer_class(folder: Path) -> Any:
    """Returns the transformers class that loads a folder's tokenizer.

    AutoTokenizer imports torch where it is installed, in 2 s and 0.2 GB. For a Llama model whose
    tokenizer is of the generic class it returns that class, which needs no torch.
    """
    generic = ("PreTrainedTokenizerFast", "TokenizersBackend")
    if (
        _entry(folder / "config.json", "model_type") == "llama"
        and _entry(folder / "tokenizer_config.json", "tokenizer_class") in generic
        and _entry(folder / "tokenizer_config.json", "auto_map") is None
    ):
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast
    from transformers import AutoTokenizer

    return AutoTokenizer


def _entry(file: Path, key: str) -> Any:
    """Returns a JSON object's entry; None without one, or where the file cannot be read."""
    try:
        return json.loads(file.read_bytes())[key]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def load_tokenizer(folder: Path) -> Any:
    """Returns the fast tokenizer of a Hugging Face folder; code of the folder is never run."""
    check_ids(folder / "tokenizer.json")
    try:
        tokenizer = _tokenizer_class(folder).from_pretrained(
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
        elif (folder / "tokenizer.model").is_file() and not (folder / "tokenizer.json").is_file():
            reason += (
                ". There is no tokenizer.json, and tokenizer.model needs sentencepiece, or, where "
                "it is Llama 3's, tiktoken. Install it, or give a folder with tokenizer.json"
            )
        raise UserError(
            f"{folder}: expected tokenizer files, which do not load ({reason})"
        ) from None
    if not tokenizer.is_fast:
        raise UserError(f"{folder}: expected a tokenizer.json (a fast tokenizer), got a slow one")
    check_vocab(tokenizer, folder)
    if tokenizer.chat_template is None and (folder / TEMPLATE_FILE).is_file():
        tokenizer.chat_template = read_template(folder / TEMPLATE_FILE, str(folder))
    tokenizer.backend_tokenizer.no_truncation()  # calls set both; fixed for the rows' key
    tokenizer.backend_tokenizer.no_padding()
    return tokenizer


def chat_template_of(
    data: DataConfig, student_tokenizer: Any, teacher_tokenizer: Any = None
) -> Template | None:
    """Returns data.chat_template's text, else the student's template, else the teacher's."""
    if data.chat_template is not None:
        return read_template(Path(data.chat_template).expanduser())
    for tokenizer in (student_tokenizer, teacher_tokenizer):
        if tokenizer is not None and tokenizer.chat_template is not None:
            return check_template(tokenizer.chat_template, str(tokenizer.name_or_path))
    return None


def saved_template(workdir: Path, data: DataConfig) -> Template | None:
    """Returns the template that a run is trained with; None: as its student's tokenizer has it."""
    file = workdir / TEMPLATE_FILE
    if file.is_file():
        return read_template(file, str(file))
    return chat_template_of(data, None)


def render_prompt(
    tokenizer: Any, messages: Conversation, template: Template | None, date: str
) -> str:
    """Returns the conversation as text, up to the start of the assistant's next answer."""
    chosen, special = choose(need_template(template), None), tokenizer.special_tokens_map
    try:
        return apply_template(special, messages, chosen, date, prompt=True)[0]
    except ValueError as error:
        raise UserError(f"data.chat-template: {error}") from None


def describe_template(tokenizer: Any, template: Template, date: str) -> list[str]:
    """Returns a warning for each part of an answer that the student will not learn."""
    form = form_of(tokenizer.special_tokens_map, choose(template, None), date)
    return [f"warning: the chat template: {text}" for text in form.warnings]


def end_of_turn(tokenizer: Any, template: Template, date: str) -> tuple[list[int], str]:
    """Returns the end of turn as tokens and as text; empty if there is none."""
    form = form_of(tokenizer.special_tokens_map, choose(template, None), date)
    text = (form.end or form.last_end).strip()
    return ids_of(tokenizer, text).tolist(), text


@dataclass(frozen=True, slots=True)
class Document:
    """One tokenized conversation: ids [n] int32, and the target tokens of the loss [n] bool."""

    record: Record
    """The record that it was made from."""
    tokens: np.ndarray
    target: np.ndarray
    hidden: frozenset[str] = frozenset()
    """Keys of hidden.HIDDEN: what the record has and the template does not show."""
    teacher: tuple[np.ndarray, np.ndarray] | None = None
    """Ids and target tokens of the conversation with the teacher's own prompt, as above; the target
    tokens are the same."""


def tokenize(
    tokenizer: Any,
    records: list[Record],
    template: Template | None,
    data: DataConfig,
    prompt: TeacherPrompt | None = None,
) -> tuple[list[Document], list[str]]:
    """Returns one document per record, tokenized as one text, and the problems of bad records.

    A token is a target if any of its characters is in an answer, as in transformers' mask of
    {% generation %}: some tokenizers' first token holds the blank before. A document's first token
    is never one. A record for which `render` raises ValueError is a problem, `place: why`, without
    a document.

    Args:
      prompt: the teacher's own, with which each document has a second text.
    """
    documents = []
    problems: list[str] = []
    for first in range(0, len(records), _BATCH_RECORDS):
        placed: list[Record] = []
        sides: list[tuple[Rendered, ...]] = []
        batch = records[first : first + _BATCH_RECORDS]
        shown = show_all(tokenizer, batch, template, data.date)
        for record, text in zip(batch, shown, strict=True):
            try:
                sides.append(_render_sides(tokenizer, record, template, data, prompt, text))
                placed.append(record)
            except ValueError as error:
                problems.append(f"{record.place}: {error}")
        encoded = [_encode(tokenizer, side) for side in zip(*sides, strict=True)]
        for record, (one, *_), (student, *teachers) in zip(
            placed, sides, zip(*encoded, strict=True), strict=True
        ):
            ids, target = student
            target[:] |= data.train_on == "all"
            for _, mask in (student, *teachers):
                mask[:1] = False
            try:
                for other, mask in teachers:
                    check_targets(tokenizer, ids[target], other[mask])
            except ValueError as error:
                problems.append(f"{record.place}: {error}")
                continue
            teacher = teachers[0] if teachers else None
            documents.append(Document(record, ids, target, frozenset(one.hidden), teacher))
    return documents, problems


def _encode(tokenizer: Any, side: Sequence[Rendered]) -> list[Encoded]:
    """Returns each text's ids between its begin and end, and its targets."""
    texts = encode(tokenizer, [one.text for one in side], [one.spans for one in side])
    out = []
    for one, (ids, target) in zip(side, texts, strict=True):
        learns_end = any(end == len(one.text) for _, end in one.spans)
        begin, end = np.array(one.begin, np.int32), np.array(one.end, np.int32)
        parts = [np.zeros(len(begin), bool), target, np.full(len(end), learns_end)]
        out.append((np.concatenate([begin, ids, end]), np.concatenate(parts)))
    return out


def _render_sides(
    tokenizer: Any,
    record: Record,
    template: Template | None,
    data: DataConfig,
    prompt: TeacherPrompt | None,
    shown: Shown | None,
) -> tuple[Rendered, ...]:
    """Returns the record as the student and, with a prompt of its own, the teacher see it."""
    one = render(tokenizer, record, template, data.date, shown)
    if data.train_on == "assistant":
        check_learnable(one, record)
    if prompt is None:
        return (one,)
    return one, render_teacher(tokenizer, record, prompt, template, data.date, one)
