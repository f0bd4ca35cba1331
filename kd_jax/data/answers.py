"""The position of each answer in a conversation that a chat template has rendered."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, NamedTuple

from kd_jax.config import UserError
from kd_jax.data.records import Conversation, Record
from kd_jax.data.templates import Template, apply_template, choose, limit_memory, need_template

Span = tuple[int, int]

ASKED, ANSWERED = ("zqaskone", "zqasktwo"), ("zqreplyone", "zqreplytwo")
THOUGHT, TOOL = "zqthought", "zqtool"
MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
# What a record has, and the reason why nothing is learned from it.
HIDDEN = {
    "tools": "have `tools`, which the chat template does not show",
    "system": "have a system message, which the chat template does not show",
    "user": "have a user message, which the chat template does not show as it is",
    "tool": "have a tool's result, which the chat template does not show as it is",
    "name": "have names of speakers (`name`), which the chat template does not show",
    "tool_calls": "have `tool_calls`, which the chat template does not show",
    "reasoning_content": "have `reasoning_content`, which the chat template does not show",
    "thought": "have thoughts (</think>), which the chat template does not show",
    "dropped": "have earlier answers without a loss: the chat template drops their thoughts",
    "assistant": "have answers without a loss, because the chat template does not show them",
}


@dataclass(frozen=True, slots=True)
class Form:
    """How a chat template writes a turn of the assistant."""

    header: str
    """Text before an answer; "" if there is none, or none that can be told."""
    end: str
    """End of turn after every answer; "" if none."""
    last_end: str
    """End of turn after the last answer."""
    parts: bool
    """Contents must be lists of parts, as in templates for images."""
    marked: bool
    """The template encloses answers in {% generation %}."""
    shows: frozenset[str]
    """What of tools, thought and reasoning_content it shows in the last answer."""
    warnings: tuple[str, ...]
    """What will not be learned."""


class Rendered(NamedTuple):
    """A record as text, the answers to learn, and the keys of HIDDEN that hold for it."""

    text: str
    spans: list[Span]
    hidden: set[str]


def render(tokenizer: Any, record: Record, template: Template | None, date: str) -> Rendered:
    """Returns the record as text, and each learned answer's [begin, end) with its end of turn.

    The template is applied once, however many turns there are.

    Raises:
      ValueError: the template rejects the record.
    """
    if record.text is not None:
        return _encodable(Rendered(record.text, list(record.answers), set()))
    special = tokenizer.special_tokens_map
    chosen = choose(need_template(template), record.tools)
    form = form_of(special, chosen, date, bool(record.tools))
    apply = partial(
        apply_template, template=chosen, date=date, tools=record.tools or None, marks=form.marked
    )
    turns = [_as_taken(turn, form) for turn in record.messages]
    try:
        text, marks = apply(special, turns)
    except ValueError:
        if not any("tool_calls" in turn for turn in turns):
            raise
        turns = [_with_text_arguments(turn) for turn in turns]  # as DeepSeek's templates take them
        text, marks = apply(special, turns)
    hidden = _hidden(text, record, form)
    if form.marked:
        spans = _marked(marks, record)
    else:
        spans, more = _placed(text, record, form)
        hidden |= more
    return _encodable(Rendered(text, spans, hidden))


def _encodable(rendered: Rendered) -> Rendered:
    try:
        rendered.text.encode()
    except UnicodeEncodeError as error:
        got = rendered.text[error.start]
        raise ValueError(f"expected Unicode text, got half a character ({got!r})") from None
    return rendered


def content_of(turn: dict[str, Any]) -> str:
    """Returns a turn's text; parts of a list are joined."""
    content = turn.get("content") or ""
    if isinstance(content, str):
        return content
    texts = [part if isinstance(part, str) else part.get("text") for part in content]
    if None in texts:
        raise ValueError(f"expected parts of text, got {content[texts.index(None)]!r:.60}")
    return "".join(texts)


def _as_taken(turn: dict[str, Any], form: Form) -> dict[str, Any]:
    """Returns the turn without nulls, its content in the template's form, arguments as objects."""
    turn = {key: value for key, value in turn.items() if value is not None}
    if "content" in turn:
        text = content_of(turn)
        turn["content"] = [{"type": "text", "text": text}] if form.parts else text
    calls = turn.get("tool_calls")
    return turn | {"tool_calls": [_with_object(call) for call in calls]} if calls else turn


def _with_object(call: Any) -> Any:
    """Returns a tool call whose arguments are an object, from OpenAI's form with JSON text."""
    return _change_arguments(call, lambda x: json.loads(x) if isinstance(x, str) else x)


def _with_text_arguments(turn: dict[str, Any]) -> dict[str, Any]:
    def change(arguments):
        return arguments if isinstance(arguments, str) else json.dumps(arguments)

    calls = turn.get("tool_calls")
    return turn | {"tool_calls": [_change_arguments(c, change) for c in calls]} if calls else turn


def _change_arguments(call: Any, change: Any) -> Any:
    if not isinstance(call, dict):
        return call
    if isinstance(call.get("function"), dict):
        return call | {"function": _change_arguments(call["function"], change)}
    try:
        return call | {"arguments": change(call["arguments"])}
    except (KeyError, ValueError):
        return call


def check_learnable(rendered: Rendered, record: Record) -> None:
    """Raises ValueError if the text shows no answer that the record has to learn."""
    turns = zip(record.messages, record.learn, strict=True)
    if not rendered.spans and any(on and turn["role"] == "assistant" for turn, on in turns):
        raise ValueError("the chat template shows none of its answers whole")


def describe_hidden(counts: Mapping[str, int], path: str) -> list[str]:
    """Returns a warning for each key of HIDDEN, with the number of its records."""
    return [f"warning: {path}: {number:,} records {HIDDEN[key]}" for key, number in counts.items()]


# The template.


def form_of(special: dict[str, Any], template: str, date: str, tools: bool = False) -> Form:
    """Returns the form of a template's answers, from conversations of known words.

    Args:
      special: the tokenizer's special tokens by name.
      tools: the conversation has tools.

    Raises:
      UserError: the template rejects every conversation, or shows no answer.
    """
    return _form(json.dumps(special, default=str), template, date, tools)


@lru_cache(maxsize=16)
def _form(special: str, template: str, date: str, tools: bool) -> Form:
    given: Any = [{"type": "function", "function": {"name": TOOL, "parameters": {}}}]

    def apply(contents: list[str], parts: bool, prompt=False, marks=False, **last: Any):
        turns: Conversation = [
            {"role": ("user", "assistant")[i % 2], "content": text}
            for i, text in enumerate(contents)
        ]
        turns[-1] |= last
        for turn in turns:
            turn["content"] = [{"type": "text", "text": turn["content"]}] * parts or turn["content"]
        options = {"tools": given if tools else None, "prompt": prompt, "marks": marks}
        return apply_template(json.loads(special), turns, template, date, **options)

    with limit_memory():
        contents, parts, text = _first_shown(apply)
        asked, plain = (_tail(apply, contents, parts, prompt) for prompt in (True, False))
        shows = {
            name: THOUGHT in _attempt(apply, [*contents[:-1], last], parts, **more)
            for name, last, more in (
                ("thought", f"<think>\n{THOUGHT}\n</think>\n\n{contents[-1]}", {}),
                ("reasoning_content", contents[-1], {"reasoning_content": THOUGHT}),
            )
        }
    shows["tools"] = TOOL in text
    before = _between(text, contents[-2], contents[-1]) or text[: text.find(contents[-1])]
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
        parts=parts,
        marked=marked,
        shows=frozenset(name for name, shown in shows.items() if shown),
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


def _attempt(apply, *arguments: Any, **options: Any) -> str:
    try:
        return apply(*arguments, **options)[0]
    except ValueError:
        return ""


def _tail(apply, contents: list[str], parts: bool, prompt: bool) -> str:
    """Returns what follows the last question, with or without the generation prompt."""
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


# A record.


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


def _placed(text: str, record: Record, form: Form) -> tuple[list[Span], set[str]]:
    """Returns the learned answers' [begin, end), and keys of HIDDEN."""
    turns = record.messages
    regions = _by_headers(text, turns, form) or _by_contents(text, turns, form)
    spans: list[Span] = []
    hidden = set()
    for i, (turn, region) in enumerate(zip(turns, regions, strict=True)):
        if turn["role"] != "assistant":
            continue
        if region is None:
            hidden |= {"assistant"} if record.learn[i] else set()
            continue
        begin, shown, stop = region
        if not _has_thought(text[begin:shown], turn) and form.shows & {
            "thought" if "</think>" in content_of(turn) else "reasoning_content"
        }:
            hidden.add("dropped")
            continue
        mark = form.end or (form.last_end if i + 1 == len(turns) else "")
        at = text.find(mark, shown, stop) if mark else -1
        end = at + len(mark) if at >= 0 else len(text[:shown].rstrip())
        if record.learn[i] and end > begin:
            spans.append((begin, end))
    return spans, hidden


def _has_thought(shown: str, turn: dict[str, Any]) -> bool:
    """Returns False if the turn has a thought that the shown answer lacks."""
    thought = turn.get("reasoning_content") or ""
    content = content_of(turn)
    if "</think>" in content:
        thought = content.split("</think>")[0].split("<think>")[-1]
    return thought.strip() in shown


Region = tuple[int, int, int]
"""Begin of an answer, end of its content, and where the search for its end of turn stops."""


def _by_headers(text: str, turns: Conversation, form: Form) -> list[Region | None]:
    """Returns the answers' regions if there are as many headers as answers, else []."""
    begins = [m.end() for m in re.finditer(re.escape(form.header), text)] if form.header else []
    count = sum(turn["role"] == "assistant" for turn in turns)
    if len(begins) not in (count, count + 1):  # one more where the template opens another answer
        return []
    stops = [begin - len(form.header) for begin in begins[1:]] + [len(text)]
    places = iter(zip(begins, stops, strict=True))
    regions: list[Region | None] = []
    for turn in turns:
        region = None
        if turn["role"] == "assistant":
            begin, stop = next(places)
            at = _find(text, turn, begin, stop)
            if at is None:
                return []
            region = (begin, at[1], stop)
        regions.append(region)
    return regions


def _by_contents(text: str, turns: Conversation, form: Form) -> list[Region | None]:
    """Returns the answers' regions by their contents, which are searched in order."""
    cursor = 0
    regions: list[Region | None] = []
    for turn in turns:
        at = _find(text, turn, cursor, len(text))
        region = None
        if at is not None and turn["role"] == "assistant":
            until = at[0] if content_of(turn) else at[1]
            head = text.rfind(form.header, cursor, until) if form.header else -1
            thought = text.find("<think>", cursor, at[0])
            begin = head + len(form.header) if head >= 0 else thought if thought >= 0 else at[0]
            region = (begin, at[1], len(text))
        cursor = cursor if at is None else at[1]
        regions.append(region)
    return regions


def _find(text: str, turn: dict[str, Any], begin: int, stop: int) -> Span | None:
    """Returns where a turn's content is shown, its tool calls included.

    Templates show it as it is, trimmed, or without its thought, which may be written otherwise.
    """
    content, thought = content_of(turn), (turn.get("reasoning_content") or "").strip()
    begin = max(begin, text.find(thought, begin, stop) + len(thought))
    ways = [(content, begin), (content.strip(), begin)]
    if "</think>" in content:
        after = max(begin, text.find("</think>", begin, stop))
        ways.append((content.split("</think>")[-1].strip(), after))
    for shown, first in ways:
        at = text.find(shown, first, stop)
        if at >= 0:
            end = at + len(shown)
            for name in _called(turn):
                end = max(end, text.find(name, end, stop) + len(name))
            return at, end
    return None


def _called(turn: dict[str, Any]) -> list[str]:
    """Returns the names of a turn's tool calls."""
    calls = [call.get("function", call) for call in turn.get("tool_calls") or []]
    return [str(call.get("name", "")) for call in calls]


def _hidden(text: str, record: Record, form: Form) -> set[str]:
    """Returns the keys of HIDDEN for what the record has and the text does not show."""
    found = set()
    if record.tools and "tools" not in form.shows:
        found.add("tools")
    for turn in record.messages:
        content, role = content_of(turn), turn["role"]
        if role != "assistant" and not _shows(text, content):
            found.add(role if role in HIDDEN else "user")
        if turn.get("name") and role != "tool" and not _shows(text, turn["name"]):
            found.add("name")
        if not all(_shows(text, name) for name in _called(turn)):
            found.add("tool_calls")
        thought = turn.get("reasoning_content")
        if thought and "reasoning_content" not in form.shows and not _shows(text, thought):
            found.add("reasoning_content")
        if role == "assistant" and "</think>" in content and "thought" not in form.shows:
            found.add("thought")
    return found


def _shows(text: str, part: str) -> bool:
    """Returns True if the text has the part, as it is or as JSON."""
    part = part.strip()
    return part in text or json.dumps(part, ensure_ascii=False)[1:-1] in text
