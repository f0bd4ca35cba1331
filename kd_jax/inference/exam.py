"""Exact-answer accuracy: greedy answers to questions of data whose answers have a final number."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from kd_jax.config import Config, DataConfig, UserError
from kd_jax.data.questions import Question, read_questions
from kd_jax.data.templates import Template
from kd_jax.inference.accuracy import has_final_number, is_correct
from kd_jax.inference.prompts import context_length, decode_answer, stop_tokens, turn_ends
from kd_jax.inference.sampling import Stop, sample, without_stop
from kd_jax.models.decoder import DecoderSpec
from kd_jax.parallel.placement import Arrays
from kd_jax.parallel.processes import say
from kd_jax.setup.inputs import held_out_data
from kd_jax.setup.model_files import ModelFiles


@dataclass(frozen=True, kw_only=True)
class Exam:
    """Questions with a final answer, and what is needed to ask them."""

    questions: Sequence[Question]
    decode: Callable[[list[int]], str]
    stops: frozenset[Stop]
    context: int
    """Most tokens of prompt and answer."""
    max_new_tokens: int


class Accuracy(NamedTuple):
    correct: int
    questions: int
    ended: int
    """Answers that ended by themselves."""

    @property
    def share(self) -> float:
        return self.correct / self.questions

    @property
    def scores(self) -> dict[str, float]:
        """The share of right answers with its binomial standard error, and what it is of."""
        return {
            "accuracy": self.share,
            "accuracy_standard_error": (self.share * (1 - self.share) / self.questions) ** 0.5,
            "accuracy_questions": self.questions,
            "answers_ended": self.ended / self.questions,
        }


def read_exam(
    data: DataConfig,
    count: int,
    max_new_tokens: int,
    model: ModelFiles,
    template: Template | None,
    field: str,
) -> Exam:
    """Returns the first `count` questions of the data that can be asked.

    Args:
      field: names the count in messages.

    Raises:
      UserError: no answer of the data has a final number, or no prompt leaves room for one.
    """
    tokenizer, context = model.tokenizer, context_length(model.arch)
    found, left_out = read_questions(data, tokenizer, template)
    asked = [q for q in found if has_final_number(q) and 0 < len(q.tokens) < context]
    if not asked:
        raise UserError(
            f"{field}: expected data whose answers have a final number, as GSM8K's after ####, "
            f"and prompts that leave room in the model's context, got none in {data.path}"
        )
    if left_out:
        say(f"warning: {left_out}")
    if left := len(found) - len(asked):
        say(
            f"warning: {field}: {left:,} of {len(found):,} records of {data.path} are not asked: "
            "their answers have no final number, or their prompts leave no room"
        )
    ends = turn_ends(tokenizer, template, data.date)
    return Exam(
        questions=asked[:count],
        decode=partial(decode_answer, tokenizer),
        stops=frozenset(ends | stop_tokens(model.folder, tokenizer)),
        context=context,
        max_new_tokens=max_new_tokens,
    )


def make_exam(config: Config, student: ModelFiles, template: Template | None) -> Exam | None:
    """Returns a run's exam, of its held-out data; None if eval.accuracy is 0."""
    data, part = held_out_data(config), config.eval
    if not part.accuracy or data is None:
        return None
    return read_exam(data, part.accuracy, part.max_new_tokens, student, template, "eval.accuracy")


def take_exam(exam: Exam, spec: DecoderSpec, arrays: Arrays, vocab_size: int) -> Accuracy:
    """Returns the exact-answer accuracy of a model's greedy answers.

    Args:
      arrays: as for `sampling.sample`.
    """
    prompts = [question.tokens for question in exam.questions]
    room = [min(exam.max_new_tokens, exam.context - len(tokens)) for tokens in prompts]
    found = sample(
        spec, arrays, prompts, keys=range(len(prompts)), max_new_tokens=room,
        stop_tokens=exam.stops, vocab_size=vocab_size,
    )  # fmt: skip
    right = [
        is_correct(exam.decode(without_stop(tokens, exam.stops).tolist()), question.answer)
        for tokens, question in zip(found.tokens, exam.questions, strict=True)
    ]
    return Accuracy(sum(right), len(right), int(found.ended.sum()))


def grade(exam: Exam, spec: DecoderSpec, arrays: Arrays, vocab_size: int) -> dict[str, float]:
    """Returns the accuracy of a model's answers, and the share that ended by themselves."""
    found = take_exam(exam, spec, arrays, vocab_size).scores
    return {name: found[name] for name in ("accuracy", "answers_ended")}
