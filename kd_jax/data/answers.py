"""The position of each answer in a conversation that a chat template has rendered."""

import json
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

from kd_jax.config import UserError
from kd_jax.data.encode import edges
from kd_jax.data.fields import check_unicode
from kd_jax.data.forms import Form, form_of
from kd_jax.data.hidden import find_hidden
from kd_jax.data.records import Conversation, Record
from kd_jax.data.templates import (
    Shown,
    Template,
    apply_template,
    apply_to_all,
    choose,
    need_template,
)
from kd_jax.data.turns import as_taken, called, with_text_arguments

Span = tuple[int, int]

MAX_PROMPTS = 16
"""Renderings of one record for tool calls, whose place the template's text does not tell."""


class Rendered(NamedTuple):
    """A record as text, the answers to learn, and the keys of HIDDEN that hold for it."""

    text: str
    spans: list[Span]
    hidden: set[str]
    begin: Sequence[int] = ()
    end: Sequence[int] = ()
    """Ids before and after the text."""


def show_all(
    tokenizer: Any, records: Sequence[Record], template: Template | None, date: str
) -> list[Shown | None]:
    """Returns the records as the template shows them, which is faster together than one by one.

    None: `render` must show this one, or all, because the template rejects one of them.
    """
    shown: list[Shown | None] = [None] * len(records)
    plain = [i for i, record in enumerate(records) if record.messages and not record.tools]
    if not plain:
        return shown
    special, chosen = tokenizer.special_tokens_map, choose(need_template(template), None)
    form = form_of(special, chosen, date)
    try:
        turns = [[as_taken(turn, form.parts) for turn in records[i].messages] for i in plain]
        texts = apply_to_all(special, turns, chosen, date, marks=form.marked)
    except (ValueError, UserError):
        return shown
    for i, text in zip(plain, texts, strict=True):
        shown[i] = text
    return shown


def render(
    tokenizer: Any,
    record: Record,
    template: Template | None,
    date: str,
    shown: Shown | None = None,
) -> Rendered:
    """Returns the record as text, and each learned answer's [begin, end) with its end of turn.

    The template is applied once, however many turns there are.

    Args:
      shown: the record as show_all returns it.

    Raises:
      ValueError: the template rejects the record.
    """
    if record.text is not None:
        begin, end = edges(tokenizer, record.text)
        return Rendered(record.text, [*record.answers], set(), begin, end)
    special = tokenizer.special_tokens_map
    chosen = choose(need_template(template), record.tools)
    form = form_of(special, chosen, date, bool(record.tools))
    apply = partial(
        apply_template, template=chosen, date=date, tools=record.tools or None, marks=form.marked
    )
    turns = [as_taken(turn, form.parts) for turn in record.messages]

    def prompt_of(i: int) -> str:
        try:
            return apply(special, turns[:i], marks=False, prompt=True)[0]
        except ValueError:
            return ""

    try:
        text, marks = shown or apply(special, turns)
    except ValueError:
        if not any("tool_calls" in turn for turn in turns):
            raise
        turns = [with_text_arguments(turn) for turn in turns]  # as DeepSeek's templates take them
        text, marks = apply(special, turns)
    hidden = find_hidden(text, record, form)
    if form.marked:
        spans = _marked(marks, record)
    else:
        spans, more = _placed(text, record, form, prompt_of)
        hidden |= more
    check_unicode(text, "the chat template's text")
    return Rendered(text, spans, hidden)


def check_learnable(rendered: Rendered, record: Record) -> None:
    """Raises ValueError if the text shows no answer that the record has to learn."""
    turns = zip(record.messages, record.learn, strict=True)
    if not rendered.spans and any(on and turn["role"] == "assistant" for turn, on in turns):
        raise ValueError("the chat template shows none of its answers whole")


def _marked(marks: list[Span], record: Record) -> list[Span]:
    """Returns the template's marks of the answers that are learned."""
    learn = [
        on for on, turn in zip(record.learn, record.messages, strict=True)
        if turn["role"] == "assistant"
    ]  # fmt: skip
    if all(learn):
        return marks
    if len(learn) != len(marks):
        raise ValueError(
            f"expected a {{% generation %}} mark for each of {len(learn)} answers, some of which "
            f"have no loss, got {len(marks)} marks"
        )
    return [mark for mark, on in zip(marks, learn, strict=True) if on]


def _placed(
    text: str, record: Record, form: Form, prompt_of: Callable[[int], str]
) -> tuple[list[Span], set[str]]:
    """Returns the learned answers' [begin, end), and keys of HIDDEN."""
    turns = record.messages
    regions = _by_headers(text, turns, form) or _by_contents(text, turns, form, prompt_of)
    spans: list[Span] = []
    hidden = set()
    for i, (turn, region) in enumerate(zip(turns, regions, strict=True)):
        if turn["role"] != "assistant":
            continue
        if region is None or not _is_shown(turn, text[region[0] : region[2]]):
            hidden |= {"assistant"} if record.learn[i] else set()
            continue
        begin, shown, stop = region
        if not _has_thought(text[begin:shown], turn) and form.shows & {
            "thought" if "</think>" in turn["content"] else "reasoning_content"
        }:
            hidden.add("dropped")
            continue
        end = _end_of(text, shown, stop, form, last=i + 1 == len(turns))
        if record.learn[i] and end > begin:
            spans.append((begin, end))
    return spans, hidden


def _end_of(text: str, shown: int, stop: int, form: Form, last: bool) -> int:
    """Returns the end of the answer whose content ends at `shown`: after its end of turn."""
    mark = (form.end or (form.last_end if last else "")).lstrip()  # the answer may end with blanks
    at = text.find(mark, shown, stop) if mark else -1
    if at < 0:
        return len(text[:shown].rstrip())
    opening = re.match(r"\s*(<[^<>]+>|\[[^\[\]]+\])", form.header)
    other = text.find(opening[1], shown, at) if opening else -1
    # Another turn begins before: this one has another end, as Llama 3.1's tool calls.
    return at + len(mark) if other < 0 else len(text[:other].rstrip())


def _is_shown(turn: dict[str, Any], shown: str) -> bool:
    """Returns False for tool calls without text that the template leaves out."""
    return bool(turn["content"]) or all(name in shown for name in called(turn))


def _has_thought(shown: str, turn: dict[str, Any]) -> bool:
    """Returns False if the turn has a thought that the shown answer lacks."""
    thought = turn.get("reasoning_content") or ""
    content = turn["content"]
    if "</think>" in content:
        thought = content.split("</think>")[0].split("<think>")[-1]
    return thought.strip() in shown


Region = tuple[int, int, int]
"""Begin of an answer, end of its content, and where the search for its end of turn stops."""


def _by_headers(text: str, turns: Conversation, form: Form) -> list[Region | None]:
    """Returns the answers' regions if there are as many headers as answers, else []."""
    begins = [m.end() for m in re.finditer(re.escape(form.header), text)] if form.header else []
    if begins and not text[begins[-1] :].strip():
        begins.pop()  # the template opens another answer
    if len(begins) != sum(turn["role"] == "assistant" for turn in turns):
        return []
    stops = [begin - len(form.header) for begin in begins[1:]] + [len(text)]
    places = iter(zip(begins, stops, strict=True))
    regions: list[Region | None] = []
    for turn in turns:
        region = None
        if turn["role"] == "assistant":
            begin, stop = next(places)
            at = _find(text, turn, begin, stop, form.end)
            if at is None:
                return []
            region = (begin, at[1], stop)
        regions.append(region)
    return regions


def _by_contents(
    text: str, turns: Conversation, form: Form, prompt_of: Callable[[int], str]
) -> list[Region | None]:
    """Returns the answers' regions by their contents, which are searched in order."""
    cursor = 0
    gaps: dict[Any, str] = {}
    regions: list[Region | None] = []
    for i, turn in enumerate(turns):
        region = None
        if turn["role"] == "assistant" and called(turn) and not turn["content"]:
            gap = _header_gap(text, cursor, form) or gaps.get(role := turns[i - 1]["role"], "")
            if not (gap and text.startswith(gap, cursor)) and len(gaps) < MAX_PROMPTS:
                gap = gaps[role] = gaps[i] = _gap(text, cursor, prompt_of(i))
            there = gap and text.startswith(gap, cursor)
            begin = cursor + len(gap)
            at = _find(text, turn, begin, len(text)) if there else None
            region = at and (begin, at[1], len(text))
        elif (at := _find(text, turn, cursor, len(text), form.end)) is None:
            pass
        elif turn["role"] == "assistant":
            head = text.rfind(form.header, cursor, at[0]) if form.header else -1
            thought = text.find("<think>", cursor, at[0])
            begin = head + len(form.header) if head >= 0 else thought if thought >= 0 else at[0]
            region = (begin, at[1], len(text))
        cursor = cursor if at is None else at[1]
        if region is not None and form.end:
            cursor = max(cursor, text.find(form.end, cursor) + len(form.end))
        regions.append(region)
    return regions


def _header_gap(text: str, cursor: int, form: Form) -> str:
    """Returns the text between a turn's content and the next answer, if that is the header."""
    head = text.find(form.header, cursor) if form.header else -1
    plain = head >= 0 and text[cursor:head].strip() in ("", form.end.strip())
    return text[cursor : head + len(form.header)] if plain else ""


def _gap(text: str, cursor: int, prompt: str) -> str:
    """Returns the text between a turn's content, which ends at `cursor`, and the next answer.

    Args:
      prompt: the conversation up to the answer, with the generation prompt.
    """
    for before in (prompt, re.sub(r"<think>\s*$", "", prompt)):
        if text.startswith(before):
            return before[cursor:]
    return ""


def _find(text: str, turn: dict[str, Any], begin: int, stop: int, end: str = "") -> Span | None:
    """Returns the place of a turn's content, its tool calls included.

    Templates show it as it is, trimmed, or without its thought, which may be written otherwise. An
    answer is followed by `end`, which a short one elsewhere is not.
    """
    content, thought = turn["content"], (turn.get("reasoning_content") or "").strip()
    if (at := text.find(thought, begin, stop)) >= 0:
        begin = at + len(thought)
    ways = [(content, begin), (content.strip(), begin)]
    if "</think>" in content:
        after = max(begin, text.find("</think>", begin, stop))
        ways.append((content.split("</think>")[-1].strip(), after))
    if turn["role"] != "assistant":
        ways.append((json.dumps(content, ensure_ascii=False)[1:-1], begin))
    names = called(turn)
    for shown, first in ways:
        at = text.find(shown, first, stop)
        if at < 0:
            continue
        if end and turn["role"] == "assistant" and not names:
            at = _before_end(text, shown, at, stop, end.strip())
        stops = at + len(shown)
        for name in names:
            stops = max(stops, text.find(name, stops, stop) + len(name))
        return at, stops
    return None


def _before_end(text: str, shown: str, at: int, stop: int, end: str) -> int:
    """Returns the first place of `shown` from `at` on that `end` follows; `at` if there is none."""
    place = at
    while place >= 0:
        after = place + len(shown)
        if text[after : after + len(end) + 16].lstrip().startswith(end):
            return place
        place = text.find(shown, place + 1, stop)
    return at
