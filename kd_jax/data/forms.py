"""The form of a chat template's answers, found once with conversations of known words."""

import json
import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from kd_jax.config import UserError
from kd_jax.data.records import Conversation
from kd_jax.data.templates import apply_template, limit_memory

ASKED, ANSWERED = ("zqaskone", "zqasktwo"), ("zqreplyone", "zqreplytwo")
THOUGHT, TOOL = "zqthought", "zqtool"
_A_STRING = {"type": "string", "description": "text"}
_PARAMETERS = {"type": "object", "properties": {"text": _A_STRING}, "required": ["text"]}
_FUNCTION = {"name": TOOL, "description": "takes text", "parameters": _PARAMETERS}
_A_TOOL: Any = {"type": "function", "function": _FUNCTION}
MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True, slots=True)
class Form:
    """A chat template's form of a turn of the assistant."""

    header: str
    """Text before an answer; "" if there is none, or none that can be told."""
    end: str
    """End of turn after every answer; "" if none."""
    last_end: str
    """End of turn after the last answer."""
    asks: bool
    """The template has a generation prompt."""
    parts: bool
    """Contents must be lists of parts, as in templates for images."""
    marked: bool
    """The template encloses answers in {% generation %}."""
    shows: frozenset[str]
    """Those of tools, thought and reasoning_content that it shows in the last answer."""
    warnings: tuple[str, ...]
    """Parts of an answer that will not be learned."""


def form_of(special: dict[str, Any], template: str, date: str, tools: bool = False) -> Form:
    """Returns the form of a template's answers, from conversations of known words.

    Args:
      special: the tokenizer's special tokens by name.
      tools: the conversation has tools.

    Raises:
      UserError: the template rejects every conversation, or shows no answer.
    """
    key = json.dumps(special, default=str)
    try:
        return _form(key, template, date, tools)
    except UserError as error:
        try:  # some templates need tools, others understand only some forms of them
            return _form(key, template, date, not tools)
        except UserError:
            raise error from None


@lru_cache(maxsize=16)
def _form(special: str, template: str, date: str, tools: bool) -> Form:
    def apply(contents: list[str], parts: bool, prompt=False, marks=False, **last: Any):
        turns: Conversation = [
            {"role": ("user", "assistant")[i % 2], "content": text}
            for i, text in enumerate(contents)
        ]
        turns[-1] |= last
        for turn in turns:
            turn["content"] = [{"type": "text", "text": turn["content"]}] * parts or turn["content"]
        options = {"tools": [_A_TOOL] if tools else None, "prompt": prompt, "marks": marks}
        return apply_template(json.loads(special), turns, template, date, **options)

    with limit_memory():
        contents, parts, text = _first_shown(apply)
        asked, plain = (_tail(apply, contents, parts, prompt) for prompt in (True, False))
        shows = _shown_thoughts(apply, contents, parts) | ({"tools"} if TOOL in text else set())
    before = _between(text, contents[-2], contents[-1])
    before = text[: text.find(contents[-1])] if before is None else before
    after = text[text.rfind(contents[-1]) + len(contents[-1]) :]
    middle = _between(text, *contents[1:3]) if len(contents) > 2 else None
    header, warnings = _header(before, asked, plain)
    end = _end(after, middle, opens=asked == plain)
    if end and header.startswith(end):
        header = header[len(end) :].lstrip()
    last_end = after.rstrip().removesuffix(header.rstrip() or "\0").rstrip()
    marked = bool(MARK.search(template))
    learns_end = bool(end)
    if marked:
        warnings = []
        text, marks = apply(contents, parts, marks=True)
        learns_end = not any(text[b:e].rstrip().endswith(contents[-1]) for b, e in marks)
    if not learns_end:
        what = "follows an answer but the last" if last_end and not marked else "follows an answer"
        warnings.append(f"no end of turn {what}: the student does not learn to stop")
    return Form(
        header=header if header.strip() else "",
        end=end,
        last_end=last_end,
        asks=asked != plain,
        parts=parts,
        marked=marked,
        shows=frozenset(shows),
        warnings=tuple(warnings),
    )


def _first_shown(apply) -> tuple[list[str], bool, str]:
    """Returns the first of some conversations whose last answer the template shows, as text."""
    problem = ""
    long = [ASKED[0], ANSWERED[0], ASKED[1], ANSWERED[1]]
    for contents in (long, long[2:]):
        for parts in (False, True):
            try:
                text, _ = apply(contents, parts)
            except ValueError as error:
                problem = problem or f". It says: {error}"
                continue
            if contents[-1] in text:
                return contents, parts, text
    raise UserError(
        "data.chat-template: expected a template that shows a question and its answer, got one "
        f"that does not{problem}"
    )


def _shown_thoughts(apply, contents: list[str], parts: bool) -> set[str]:
    """Returns the forms of a thought that the template shows in the last answer."""
    marked = f"<think>\n{THOUGHT}\n</think>\n\n{contents[-1]}"
    texts = {
        "thought": _attempt(apply, [*contents[:-1], marked], parts),
        "reasoning_content": _attempt(apply, contents, parts, reasoning_content=THOUGHT),
    }
    return {name for name, text in texts.items() if THOUGHT in text}


def _attempt(apply, *arguments: Any, **options: Any) -> str:
    try:
        return apply(*arguments, **options)[0]
    except ValueError:
        return ""


def _tail(apply, contents: list[str], parts: bool, prompt: bool) -> str:
    """Returns the text after the last question, with or without the generation prompt."""
    text = _attempt(apply, contents[:-1], parts, prompt=prompt)
    return text[text.rfind(contents[-2]) + len(contents[-2]) :]


def _between(text: str, first: str, second: str) -> str | None:
    begin, end = text.find(first), text.find(second)
    return text[begin + len(first) : end] if 0 <= begin < end else None


def _header(before: str, asked: str, plain: str) -> tuple[str, list[str]]:
    """Returns the text before an answer, without the end of the question, and warnings.

    Args:
      before: what stands between question and answer.
      asked: what follows a question before generation; `plain`: without a generation prompt.
    """
    warnings = []
    header, rest = before, before.removeprefix(asked)
    if asked.startswith(before):
        if (opened := asked[len(before) :]).strip():
            warnings.append(
                f"the generation prompt ends with {opened.strip()!r}, with which the template "
                "begins no answer: the student learns answers without it"
            )
    elif before.startswith(asked) and (asked != plain or not rest.strip()):
        header = asked
    elif asked == plain:
        warnings.append(
            f"there is no generation prompt: {rest.strip()!r} before an answer is not learned, so "
            "a prompt must end with it"
        )
    else:
        warnings.append(
            f"the generation prompt ends with {asked[-40:]!r}, but answers follow {before[-40:]!r}"
        )
    return header.removeprefix(plain) if plain != header else header, warnings


def _end(after: str, middle: str | None, opens: bool) -> str:
    """Returns the end of turn that follows every answer.

    Args:
      after: what follows the last answer; `middle`: an earlier one, up to the next question.
      opens: `after` ends with the header of another answer.
    """
    if middle is None:
        return after.rstrip()
    same = [a == b for a, b in zip(after, middle, strict=False)]
    common = after[: [*same, False].index(False)]
    if common.strip() == after.strip():
        return common.rstrip()
    if opens and (unit := re.match(r"\s*(<[^<>\s]+>|\[[^\[\]\s]+\])", common)):
        return unit[0]
    return re.sub(r"[<\[{(#|\s][^>\]})]*$", "", common).rstrip()  # a marker's beginning
