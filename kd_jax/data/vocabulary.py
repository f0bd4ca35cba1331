"""The ids of a tokenizer, and those that name the same token in two."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kd_jax.config import UserError

_PART = 4096  # rows looked at together
_HOLES = 2**16  # ids without a token, beside as many as there are tokens


def check_ids(file: Path) -> None:
    """Raises UserError for huge token ids in tokenizer.json: memory is taken up to the largest."""
    data = file.read_bytes() if file.is_file() else b""
    if not re.search(rb"\d{8}", data):
        return  # parsing takes ten times as long
    try:
        ids = json.loads(data)["model"]["vocab"].values()
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return  # the tokenizers library says what is wrong
    largest = max((i for i in ids if type(i) is int), default=0)
    if largest >= 10**7:
        raise UserError(f"{file}: expected token ids below 10,000,000, got {largest}")


def num_entries(tokenizer: Any) -> int:
    """Returns the vocabulary entries up to a tokenizer's highest id."""
    return max(tokenizer.get_vocab().values()) + 1


def check_vocab(tokenizer: Any, folder: Path) -> None:
    """Raises UserError for a tokenizer without tokens, or with far larger ids than tokens."""
    ids = tokenizer.get_vocab().values()
    if not ids or max(ids) > 2 * len(ids) + _HOLES:
        largest = f" up to {max(ids):,}" if ids else ""
        raise UserError(f"{folder}: expected token ids without gaps, got {len(ids):,}{largest}")


@dataclass(frozen=True, slots=True)
class SharedVocab:
    """The ids that can be compared: those below `size` that are not in `differ`."""

    size: int
    differ: dict[int, tuple[str | None, str | None]]
    """Added tokens, such as reserved ones, that have another name, or none, in the other."""

    def describe(self) -> str:
        """Returns the tokens that are not shared; "" if there are none."""
        shown = [f"{i} is {name!r} and {other!r}" for i, (name, other) in self.differ.items()]
        more = f" and {len(shown) - 3:,} more" if len(shown) > 3 else ""
        return "; ".join(shown[:3]) + more


def share_vocab(
    student: Any, teacher: Any, student_path: Any, teacher_path: Any, fields: str
) -> SharedVocab:
    """Returns the ids that both tokenizers share; chat templates may differ.

    Added tokens may differ. They do not change which ids a text without them has.

    Raises:
      UserError: other tokens or the merges differ, so that logits cannot be compared.
    """
    vocabs = student.get_vocab(), teacher.get_vocab()
    size = min(max(vocab.values()) for vocab in vocabs) + 1
    if student.backend_tokenizer.to_str() == teacher.backend_tokenizer.to_str():
        return SharedVocab(size, {})  # parsing both takes half a gigabyte
    own, other = ({i: token for token, i in vocab.items()} for vocab in vocabs)
    differ = {
        i: (own.get(i), other.get(i))
        for i in sorted(own.keys() | other.keys())
        if own.get(i) != other.get(i)
    }
    added, others = ({*x.get_added_vocab(), None} for x in (student, teacher))
    wrong = SharedVocab(
        size, {i: (a, b) for i, (a, b) in differ.items() if a not in added or b not in others}
    )
    if wrong.differ or _merges(student) != _merges(teacher):
        what = f"{len(wrong.differ)} tokens ({wrong.describe()})" if wrong.differ else "the merges"
        raise UserError(
            f"{fields}: expected one tokenizer, got {student_path} and {teacher_path}, which "
            f"differ in {what}. Use models of one family"
        )
    return SharedVocab(size, differ)


def _merges(tokenizer: Any) -> Any:
    return json.loads(tokenizer.backend_tokenizer.to_str())["model"].get("merges")


def check_tokens(
    shared: SharedVocab, tokens: np.ndarray, loss_mask: np.ndarray, rows: int, source: str
) -> str:
    """Returns a warning about prompt tokens that one model does not know; "" if there are none.

    Args:
      tokens: [R, S] integers, the student's ids.
      loss_mask: [R, S] bool, True for targets.
      rows: entries of the smaller embedding.

    Raises:
      UserError: such a token is a target, or one of the models has no embedding for it.
    """
    if not shared.differ:
        return ""
    ids = np.array([*shared.differ])
    prompts, targets = set[int](), set[int]()
    for first in range(0, len(tokens), _PART):
        some, mask = tokens[first : first + _PART], loss_mask[first : first + _PART]
        here = np.isin(some, ids)
        prompts |= {*map(int, np.unique(some[here]))}
        targets |= {*map(int, np.unique(some[here & mask]))}
    wrong = targets | {i for i in prompts if i >= rows}
    if wrong:
        named = SharedVocab(shared.size, {i: shared.differ[i] for i in sorted(wrong)})
        raise UserError(
            f"{source}: has tokens that the student and the teacher do not share: "
            f"{named.describe()}. Set data.chat-template to one whose tokens both have, such as "
            "the teacher's"
        )
    if not prompts:
        return ""
    named = SharedVocab(shared.size, {i: shared.differ[i] for i in sorted(prompts)})
    return f"{source}: prompts have tokens that are not shared: {named.describe()}"
