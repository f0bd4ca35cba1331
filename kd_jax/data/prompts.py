"""The teacher's own prompt: its conversation of a record, and whether both have equal answers."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from kd_jax.config import TeacherConfig, UserError
from kd_jax.config.errors import first_line
from kd_jax.data.answers import Rendered, render
from kd_jax.data.fields import SYSTEM_ROLES, decoded, turn_of
from kd_jax.data.hidden import HIDDEN
from kd_jax.data.records import Conversation, Record
from kd_jax.data.templates import Template, apply_template, choose, need_template

SYSTEM_FILE = "teacher_system.txt"
"""In a workdir: the text of the run's teacher.system @FILE, which may change or move later."""
OWN = "teacher_messages"
"""The key of a record's turns for the teacher."""
_SHOWN = ("system", "user", "tool")  # what the teacher must see; keys of hidden.HIDDEN
_ASKED = "zqasked"


class TeacherPrompt(NamedTuple):
    """The part of a conversation that only the teacher sees."""

    system: str | None
    """Text before a conversation's own system message."""
    messages: bool
    """Take the turns of teacher_messages."""
    seq_len: int | None
    """Tokens in a row of the teacher; None: as many as the data need."""


def read_prompt(teacher: TeacherConfig | None) -> TeacherPrompt | None:
    """Returns the teacher's own prompt, with the text of its @FILE; None: it has none.

    Raises:
      UserError: the file cannot be read.
    """
    if teacher is None or not teacher.has_prompt:
        return None
    prompt = TeacherPrompt(teacher.system, teacher.messages, teacher.seq_len)
    if prompt.system is None or not prompt.system.startswith("@"):
        return prompt
    file = Path(os.path.expanduser(prompt.system[1:]))
    try:
        text = file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"teacher.system: expected a text file, got {file} ({error})") from None
    if not text:
        raise UserError(f"teacher.system: expected a text, got {file}, which is empty")
    return prompt._replace(system=text)


def check_prompt(
    tokenizer: Any, template: Template | None, date: str, prompt: TeacherPrompt | None
) -> None:
    """Raises UserError if the chat template rejects teacher.system, or does not show it."""
    if prompt is None or prompt.system is None or template is None:
        return  # without a template each record is refused by its place
    turns = with_system([{"role": "user", "content": _ASKED}], prompt.system)
    chosen, special = choose(need_template(template), None), tokenizer.special_tokens_map
    try:
        text = apply_template(special, turns, chosen, date, prompt=True)[0]
    except ValueError as error:
        raise UserError(
            f"teacher.system: expected a chat template that takes a system message, got one that "
            f"does not: {error}. Set data.chat-template, or write the text into teacher_messages"
        ) from None
    if prompt.system.strip() not in text:
        raise UserError(
            "teacher.system: expected a chat template that shows a system message, got one that "
            "leaves it out. Set data.chat-template, or write the text into teacher_messages"
        )


def with_system(turns: Conversation, system: str) -> Conversation:
    """Returns the turns after a system message, which begins their own if they have one."""
    first, rest = turns[0], turns[1:]
    if first["role"] not in SYSTEM_ROLES:
        return [{"role": "system", "content": system}, *turns]
    return [{**first, "content": f"{system}\n\n{first['content']}"}, *rest]


def teacher_record(record: Record, prompt: TeacherPrompt) -> Record:
    """Returns the record as the teacher sees it, its answers with a loss the same.

    Raises:
      ValueError: the record is plain text, or its teacher_messages have other answers.
    """
    if not record.messages:
        raise ValueError("expected a conversation for the teacher's own prompt, got plain text")
    messages, learn = record.messages, record.learn
    if prompt.messages and record.own is not None:
        messages, learn = _own_turns(record)
    if prompt.system is not None:
        longer = with_system(messages, prompt.system)
        learn = (True,) * (len(longer) - len(messages)) + learn
        messages = longer
    return replace(record, messages=messages, learn=learn)


def _own_turns(record: Record) -> tuple[Conversation, tuple[bool, ...]]:
    """Returns the turns of teacher_messages, and which of them have a loss.

    A conversation that ends with an answer is whole. Any other replaces what the record has before
    its first answer with a loss.
    """
    turns, weights = _read_turns(record.own)
    learned = [i for i in _answers(record.messages) if record.learn[i]]
    if not learned:
        return turns, (False,) * len(turns)
    if turns[-1]["role"] != "assistant":
        rest = slice(learned[0], None)
        before = (False,) * len(turns)
        return [*turns, *record.messages[rest]], before + record.learn[rest]
    candidates = [i for i in _answers(turns) if weights[i]]
    same = candidates[-len(learned) :]
    if len(same) < len(learned):
        raise ValueError(
            f"{OWN}: expected the record's {len(learned)} answers with a loss, got {len(same)}"
        )
    for i, j in zip(learned, same, strict=True):
        if record.messages[i] != turns[j]:
            raise ValueError(
                f"{OWN}: turn {j + 1}: expected the record's turn {i + 1}, "
                f"{_difference(record.messages[i], turns[j])}"
            )
    return turns, tuple(i in same for i in range(len(turns)))


def _read_turns(own: Any) -> tuple[Conversation, list[bool]]:
    turns = decoded(own)
    if not isinstance(turns, list) or not turns:
        raise ValueError(f"{OWN}: expected a list of turns, got {own!r:.60}")
    try:
        read = [turn_of(number, turn, {}) for number, turn in enumerate(turns, start=1)]
    except ValueError as error:
        raise ValueError(f"{OWN}: {error}") from None
    return [turn for turn, _ in read], [has_loss for _, has_loss in read]


def _answers(turns: Conversation) -> list[int]:
    return [i for i, turn in enumerate(turns) if turn["role"] == "assistant"]


def _difference(turn: dict[str, Any], other: dict[str, Any]) -> str:
    """Returns the first difference of two turns."""
    a, b = turn["content"], other["content"]
    if a == b:
        keys = [key for key in {**turn, **other} if turn.get(key) != other.get(key)]
        return f"got another {keys[0]}"
    at = next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )
    return f"got {b[at : at + 30]!r} in place of {a[at : at + 30]!r} at character {at}"


def render_teacher(
    tokenizer: Any,
    record: Record,
    prompt: TeacherPrompt,
    template: Template | None,
    date: str,
    student: Rendered,
) -> Rendered:
    """Returns the teacher's conversation as text, as `render` does the student's.

    Raises:
      ValueError: the template rejects it or leaves out a message that the student's text shows.
    """
    try:
        rendered = render(tokenizer, teacher_record(record, prompt), template, date)
    except ValueError as error:
        raise ValueError(f"the teacher's conversation: {first_line(error)}") from None
    left_out = [name for name in _SHOWN if name in rendered.hidden - student.hidden]
    if left_out:
        raise ValueError(f"the teacher's conversation has {HIDDEN[left_out[0]]}")
    return rendered


def check_targets(tokenizer: Any, student: np.ndarray, teacher: np.ndarray) -> None:
    """Raises ValueError with the first target token that differs between student and teacher.

    Args:
      student, teacher: target tokens of one document, [n] int32 each.
    """
    if np.array_equal(student, teacher):
        return
    size = min(len(student), len(teacher))
    differs = np.flatnonzero(student[:size] != teacher[:size])
    at = int(differs[0]) if len(differs) else size
    shown = [
        repr(tokenizer.decode(side[at : at + 1])) if at < len(side) else "no more"
        for side in (teacher, student)
    ]
    raise ValueError(
        f"expected the same {len(student)} target tokens in the teacher's conversation, got "
        f"{len(teacher)}, and {shown[0]} in place of {shown[1]} as the first that differs, number "
        f"{at + 1}"
    )
