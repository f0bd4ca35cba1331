"""Exact-answer accuracy of a model in training, on questions of its held-out data."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from kd_jax.config import Config, UserError
from kd_jax.data.questions import Question, read_questions
from kd_jax.data.templates import Template
from kd_jax.inference.accuracy import accuracy, askable
from kd_jax.inference.prompts import context_length, stop_tokens, template_stops
from kd_jax.models.decoder import DecoderSpec
from kd_jax.parallel.placement import Arrays
from kd_jax.setup.inputs import held_out_data
from kd_jax.setup.sources import Source


@dataclass(frozen=True, kw_only=True)
class Exam:
    """Questions with a final answer, and what is needed to ask them."""

    questions: Sequence[Question]
    decode: Callable[[list[int]], str]
    stops: frozenset[int]
    context: int
    max_new_tokens: int


def make_exam(config: Config, student: Source, template: Template | None) -> Exam | None:
    """Returns the first eval.accuracy questions of the held-out data; None if that is 0.

    Raises:
      UserError: no answer of the data has a final number, or no prompt leaves room for one.
    """
    data = held_out_data(config)
    if not config.eval.accuracy or data is None:
        return None
    tokenizer, context = student.tokenizer, context_length(student.arch)
    found, _ = read_questions(data, tokenizer, template)
    asked = askable(found, context)
    if not asked:
        raise UserError(
            "eval.accuracy: expected data whose answers have a final number, as GSM8K's after "
            f"####, and prompts that leave room in the student's context, got none in {data.path}"
        )
    ends, _ = template_stops(tokenizer, template, data.date)
    return Exam(
        questions=asked[: config.eval.accuracy],
        decode=partial(tokenizer.decode, skip_special_tokens=True),
        stops=frozenset(ends | stop_tokens(student.folder, tokenizer)),
        context=context,
        max_new_tokens=config.eval.max_new_tokens,
    )


def grade(exam: Exam, spec: DecoderSpec, arrays: Arrays, vocab_size: int) -> dict[str, float]:
    """Returns the accuracy of a model's greedy answers, and the share that ended by themselves."""
    found = accuracy(
        spec,
        arrays,
        exam.questions,
        exam.decode,
        max_new_tokens=exam.max_new_tokens,
        context=exam.context,
        stop_tokens=exam.stops,
        vocab_size=vocab_size,
    )
    assert found is not None
    return {"accuracy": found.share, "answers_ended": found.ended / found.questions}
