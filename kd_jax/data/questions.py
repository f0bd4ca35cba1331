"""Prompts of any data: each conversation up to its last answer, as tokens."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np

from kd_jax.config import DataConfig, UserError
from kd_jax.config.errors import first_lines
from kd_jax.data.encode import ids_of, prompt_ids
from kd_jax.data.fields import RESULT_ROLES, SYSTEM_ROLES, decoded, is_empty, parse, role_of
from kd_jax.data.files import list_sources, read_raw, slice_of
from kd_jax.data.forms import form_of
from kd_jax.data.readers import Raw
from kd_jax.data.records import Conversation, Record, make_record
from kd_jax.data.templates import Template, apply_template, choose, need_template
from kd_jax.data.turns import as_taken

_STAND_IN = "-"  # for the answer of a record that has none
_ANSWER = {"role": "assistant", "content": _STAND_IN}


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt, and the answer that the data have."""

    index: int
    """Number of the record in the data, from 0."""
    place: str
    """`file:line` or `file, record n`, for messages."""
    tokens: np.ndarray
    """The prompt, up to the start of the answer, [n] int32."""
    answer: str
    """The record's own last answer; "" if it has none."""
    messages: Conversation
    """Turns before the answer, as `answered` writes them; [] for text."""
    learn: tuple[bool, ...] = ()
    """One per turn before the answer, as in Record."""
    tools: list[Any] | None = None
    text: str | None = None
    """A prompt of text, which has no chat template."""
    ignored: tuple[tuple[str, str], ...] = ()
    """(key, reason) of each key of the record that is not used."""

    def answered(self, text: str) -> dict[str, Any]:
        """Returns the record of this prompt with another answer, in a form that training reads."""
        if self.text is not None:
            return {"prompt": self.text, "completion": text}
        turns = [
            turn if learn or turn["role"] != "assistant" else {**turn, "weight": 0}
            for turn, learn in zip(self.messages, self.learn, strict=True)
        ]
        record: dict[str, Any] = {"messages": [*turns, {"role": "assistant", "content": text}]}
        return record | ({"tools": self.tools} if self.tools else {})


def read_questions(
    data: DataConfig,
    tokenizer: Any,
    template: Template | None,
    system: str | None = None,
    *,
    keep_system: bool = True,
) -> tuple[list[Question], str]:
    """Returns the prompts of the data in order, and a line about records without one, or "".

    Args:
      system: message at the start of every conversation, in place of its own.
      keep_system: it stays in Question.messages; otherwise they are the record's own turns.

    Raises:
      UserError: lists file and line of each bad record; or no record has a prompt.
    """
    questions: list[Question] = []
    problems: list[str] = []
    count = without = 0
    for index, (place, raw) in enumerate(_raw_records(data)):
        count += 1
        try:
            record, has_answer = _record(place, raw)
            asked = _with_system(record, system)
            question = _question(tokenizer, template, data.date, index, asked, has_answer)
        except ValueError as error:
            problems.append(f"{place}: {error}")
            continue
        if question is None:
            without += 1
            continue
        if not keep_system:
            last = len(question.messages) + len(record.messages) - len(asked.messages)
            turns, learn = record.messages[:last], record.learn[:last]
            question = replace(question, messages=turns, learn=learn)
        questions.append(replace(question, ignored=record.ignored))
    if problems and data.on_bad_record == "error":
        raise UserError("\n".join(first_lines(problems)))
    if not questions:
        what = f"{count:,} records without one, such as plain text" if count else "no records"
        raise UserError(
            f"{data.path}: expected records with a prompt (messages, instruction, or prompt), got "
            f"{what}"
        )
    line = f"{data.path}: {without:,} records have no prompt and are left out"
    return questions, line if without else ""


def _raw_records(data: DataConfig) -> Iterator[tuple[str, Raw]]:
    for path, _ in list_sources(data.path):
        begin, end = slice_of(path, data.split)
        yield from islice(read_raw(path, data.split, begin, end), data.max_conversations)


def _record(place: str, raw: Raw) -> tuple[Record, bool]:
    """Returns a record, and whether its last answer is its own."""
    tree = parse(raw) if isinstance(raw, bytes) else raw
    if not isinstance(tree, dict):
        return make_record(place, tree), True
    changed = _with_answer(tree)
    return make_record(place, changed), changed is tree


def _with_answer(tree: dict[str, Any]) -> dict[str, Any]:
    """Returns a raw record with a stand-in for the answer that it lacks, or the record itself."""
    for key in ("messages", "conversations"):
        turns = decoded(tree.get(key))
        if isinstance(turns, list) and turns and isinstance(turns[-1], dict):
            role = role_of(turns[-1].get("role", turns[-1].get("from")))
            lacks = role in ("user", *RESULT_ROLES) and "chosen" not in tree
            return {**tree, key: [*turns, _ANSWER]} if lacks else tree
    if "instruction" in tree and _lacks(tree, "output", "chosen"):
        return {**tree, "output": _STAND_IN}
    if "prompt" in tree and _lacks(tree, "completion", "chosen"):
        return {**tree, "completion": [_ANSWER]}
    return tree


def _lacks(tree: dict[str, Any], *keys: str) -> bool:
    return all(is_empty(tree.get(key)) for key in keys)


def _with_system(record: Record, system: str | None) -> Record:
    if system is None:
        return record
    if not record.messages:
        raise ValueError("expected messages, which a system message can precede, got text")
    own = record.messages[0]["role"] in SYSTEM_ROLES
    turns = [{"role": "system", "content": system}, *record.messages[own:]]
    return replace(record, messages=turns, learn=(True, *record.learn[own:]))


def _question(
    tokenizer: Any, template: Template | None, date: str, index: int, record: Record, own: bool
) -> Question | None:
    """Returns a record's prompt; None if it has none.

    Raises:
      ValueError: the template rejects it.
    """
    if record.text is not None:
        begin, end = record.answers[0]
        if begin == 0:
            return None
        prompt = record.text[:begin]
        tokens = prompt_ids(tokenizer, prompt)
        answer = record.text[begin:end] if own else ""
        return Question(index, record.place, tokens, answer, [], text=prompt)
    roles = [turn["role"] for turn in record.messages]
    last = len(roles) - 1 - roles[::-1].index("assistant")
    if last == 0:
        return None
    turns = record.messages[:last]
    special = tokenizer.special_tokens_map
    chosen = choose(need_template(template), record.tools)
    form = form_of(special, chosen, date, bool(record.tools))
    taken = [as_taken(turn, form.parts) for turn in turns]
    text, _ = apply_template(special, taken, chosen, date, tools=record.tools or None, prompt=True)
    if form.header and not form.asks:
        raise UserError(
            "data.chat-template: expected a template with a generation prompt "
            f"(add_generation_prompt), got one that leaves out {form.header.strip()!r}"
        )
    tokens = ids_of(tokenizer, text)
    answer = record.messages[last]["content"] if own else ""
    learn = record.learn[:last]
    return Question(index, record.place, tokens, answer, turns, learn, record.tools)
