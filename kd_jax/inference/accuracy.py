"""Exact-answer accuracy: greedy answers whose final number is that of the data's own answer."""

import re
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

from kd_jax.data.questions import Question
from kd_jax.inference.sampling import sample
from kd_jax.models.decoder import DecoderSpec
from kd_jax.parallel.placement import Arrays

MARK = "####"
"""Stands before the final answer in GSM8K (arXiv 2110.14168)."""
_NUMBER = re.compile(r"[-+]?\$?\s?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")


class Accuracy(NamedTuple):
    correct: int
    questions: int
    """Questions asked: those whose own answer has a final number and whose prompt leaves room."""
    ended: int
    """Answers that ended by themselves."""

    @property
    def share(self) -> float:
        return self.correct / self.questions

    @property
    def standard_error(self) -> float:
        """Of the share, binomial."""
        return (self.share * (1 - self.share) / self.questions) ** 0.5


def final_number(text: str, marked: bool) -> float | None:
    """Returns the final number of an answer; None without one.

    Dollar signs and commas between digits do not count.

    Args:
      marked: take the number after the last MARK, else the text's last number.
    """
    if marked:
        _, mark, text = text.rpartition(MARK)
        found = _NUMBER.findall(text) if mark else []
    else:
        found = _NUMBER.findall(text)[-1:]
    if not found:
        return None
    return float(re.sub(r"[$,\s]", "", found[0]))


def is_correct(answer: str, reference: str) -> bool:
    """Returns True if an answer's final number is that of the reference.

    Where the reference has a MARK, the answer needs one too.
    """
    marked = MARK in reference
    wanted, got = final_number(reference, marked), final_number(answer, marked)
    return (
        wanted is not None and got is not None and abs(wanted - got) <= 1e-6 * max(1, abs(wanted))
    )


def has_final_number(question: Question) -> bool:
    return final_number(question.answer, MARK in question.answer) is not None


def askable(questions: Sequence[Question], context: int) -> list[Question]:
    """Returns those whose own answer has a final number and whose prompt leaves room for one."""
    return [q for q in questions if has_final_number(q) and 0 < len(q.tokens) < context]


def accuracy(
    spec: DecoderSpec,
    arrays: Arrays,
    questions: Sequence[Question],
    decode: Callable[[list[int]], str],
    *,
    max_new_tokens: int,
    context: int,
    stop_tokens: Collection[int],
    vocab_size: int | None = None,
    batch_rows: int | None = None,
) -> Accuracy | None:
    """Returns the exact-answer accuracy of greedy answers; None if no question can be asked.

    Args:
      arrays: as for `sampling.sample`.
      decode: maps tokens to text.
      context: most tokens of prompt and answer.
    """
    asked = askable(questions, context)
    if not asked:
        return None
    room = [min(max_new_tokens, context - len(q.tokens)) for q in asked]
    found = sample(
        spec, arrays, [q.tokens for q in asked], keys=range(len(asked)), max_new_tokens=room,
        stop_tokens=stop_tokens, batch_rows=batch_rows, vocab_size=vocab_size,
    )  # fmt: skip
    right = [
        is_correct(decode(tokens.tolist()), question.answer)
        for tokens, question in zip(found.tokens, asked, strict=True)
    ]
    return Accuracy(sum(right), len(asked), int(found.ended.sum()))
