"""Inputs of sampling, found before weights load: prompts, and tokens that end an answer."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from kd_jax.config import Config, UserError
from kd_jax.data.rows import Rows
from kd_jax.data.templates import Template
from kd_jax.inference.prompts import stop_tokens, turn_ends
from kd_jax.inference.sampling import Stop
from kd_jax.onpolicy.prompts import Prompts, check_prompts, find_prompts
from kd_jax.parallel.processes import say
from kd_jax.setup.model_files import ModelFiles


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """Inputs of sampling."""

    prompts: Prompts
    stops: frozenset[Stop]
    """Ends of an answer."""
    pad: int
    decode: Callable[[np.ndarray], str]
    """Maps tokens to text, special tokens included."""


def make_sampler(
    config: Config, student: ModelFiles, teacher: ModelFiles, template: Template | None, rows: Rows
) -> Sampler:
    """Returns the inputs of a run's sampling, and prints a line about the prompts.

    Raises:
      UserError: the data have no prompt that can be used, or no token ends an answer.
    """
    tokenizer, count = student.tokenizer, config.on_policy.max_new_tokens
    own = rows.teacher is not None
    models = {"student": student} if own else {"student": student, "teacher": teacher}
    room, field = _room(config.data.seq_len, "data.seq-len", models)
    teacher_len = rows.tokens.shape[1] if rows.teacher is None else rows.teacher.tokens.shape[1]
    teacher_room, other = _room(teacher_len, "teacher.seq-len", {"teacher": teacher})
    prompts = find_prompts(rows, room - count, teacher_room - count)
    rooms = {field: room, **({other: teacher_room} if own else {})}
    why = " and ".join(f"{name} {size:,}" for name, size in rooms.items())
    why += " less on-policy.max-new-tokens"
    fields = [name for name in rooms if name.endswith("seq-len")]
    say(check_prompts(prompts, config.data.path, room - count, why, fields))
    pad = tokenizer.pad_token_id
    return Sampler(
        prompts=prompts,
        stops=frozenset(_stops(config, student, template)),
        pad=0 if pad is None else pad,
        decode=lambda tokens: tokenizer.decode(tokens, clean_up_tokenization_spaces=False),
    )


def _room(seq_len: int, name: str, models: dict[str, ModelFiles]) -> tuple[int, str]:
    """Returns the tokens that a prompt and its answer may have together, and what bounds them."""
    rooms = [(seq_len, name)]
    for name, files in models.items():
        context = files.arch.max_position_embeddings
        rooms += [] if context is None else [(context, f"the {name}'s context")]
    return min(rooms)


def _stops(config: Config, student: ModelFiles, template: Template | None) -> set[Stop]:
    """Returns what ends an answer: the tokens of the student's folder, and the template's."""
    ends = turn_ends(student.tokenizer, template, config.data.date)
    stops = ends | stop_tokens(student.folder, student.tokenizer)
    if not stops:
        raise UserError(
            f"student.path: expected a token that ends an answer, such as eos_token_id in "
            f"{student.folder}, with on-policy.fraction above 0, got none. Add it"
        )
    return stops
