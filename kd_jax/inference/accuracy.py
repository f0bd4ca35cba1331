"""Final numbers of answers, and whether they are those of the data's own answers."""

import re

from kd_jax.data.questions import Question

MARK = "####"
"""Stands before the final answer in GSM8K (arXiv 2110.14168)."""
# A sign touches its number, and not what is before it: neither a list's dash nor the one of 3-4.
_SIGN = r"(?:(?<![\w.)])[-+](?=[$.\d]))?"
_WHOLE = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)"
_NUMBER = re.compile(rf"{_SIGN}(?:\$\s?)?(?:{_WHOLE}(?:\.\d+)?|\.\d+)")


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
