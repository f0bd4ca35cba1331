"""Forms of records: Alpaca, chats, ShareGPT, prompts, preferences and text to one form."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from kd_jax.data.fields import (
    IS_METADATA,
    METADATA,
    SYSTEM_ROLES,
    decoded,
    is_empty,
    parse,
    text_of,
    tools_of,
    turn_of,
)
from kd_jax.data.readers import Raw

Conversation = list[dict[str, Any]]

_CHAT_KEYS = ("system", "tools")


@dataclass(frozen=True, slots=True)
class Record:
    """One checked record: a conversation for the chat template, or text that is used as it is."""

    place: str
    """`file:line` or `file, record n`, for messages."""
    messages: Conversation
    """Turns as chat templates take them; [] for text."""
    learn: tuple[bool, ...] = ()
    """One per turn: False leaves an assistant's turn without a loss."""
    tools: list[Any] | None = None
    """Tool descriptions for the template."""
    text: str | None = None
    """Plain text, or prompt and completion, without a template."""
    answers: tuple[tuple[int, int], ...] = ()
    """[begin, end) characters of `text` with a loss."""
    ignored: tuple[tuple[str, str], ...] = ()
    """(key, reason) of each key that is not used."""
    own: Any = None
    """The raw `teacher_messages`, where they are wanted."""


def make_record(place: str, raw: Raw, own: bool = False) -> Record:
    """Returns a raw record of any accepted form as a checked one.

    Args:
      own: its teacher_messages are wanted.

    Raises:
      ValueError: `field: expected X, got Y`, without the place.
    """
    tree = parse(raw) if isinstance(raw, bytes) else raw
    if not isinstance(tree, dict):
        raise ValueError(f"expected an object, got {type(tree).__name__}")
    if None in tree:
        raise ValueError("expected as many cells as the header has, got more")
    present = [form for form in FORMS if all(key in tree for key in form.keys)]
    full = [form for form in present if all(tree[key] is not None for key in form.keys)]
    if not present:
        got = ", ".join(sorted(map(str, tree))) or "no fields"
        expected = ", or ".join(form.name for form in FORMS)
        raise ValueError(f"expected the keys {expected}; got {got}")
    form = (full or present)[0]
    record = form.make(place, tree)
    used = {*form.keys, *form.optional, *(["teacher_messages"] if own else [])}
    rest = [str(key) for key, x in tree.items() if key not in used and not is_empty(x)]
    ignored = tuple((key, _reason(key, form)) for key in rest)
    turns = tree.get("teacher_messages") if own else None
    return replace(record, ignored=record.ignored + ignored, own=None if is_empty(turns) else turns)


def _reason(key: str, form: "Form") -> str:
    if key in METADATA:
        return IS_METADATA
    if key == "teacher_messages":
        return "only a run with a teacher and --teacher.messages uses them"
    if key == "rejected":
        return "only the chosen answer is trained on"
    if any(key in other.keys for other in FORMS):
        return f"the record has {form.name}"
    return f"records with {form.name} have no such key"


# Forms.


def _chat(place: str, tree: dict[str, Any], turns: Any, name: str, context: int = 0) -> Record:
    """Returns a conversation, with the record's `system` and `tools`.

    Args:
      context: number of first turns that have no loss.
    """
    turns = decoded(turns)
    if not isinstance(turns, list) or not turns:
        raise ValueError(f"{name}: expected a list of turns, got {turns!r:.60}")
    messages: Conversation = []
    learn: list[bool] = []
    ignored: dict[tuple[str, str], None] = {}
    for number, turn in enumerate(turns, start=1):
        message, has_loss = turn_of(number, turn, ignored)
        messages.append(message)
        learn.append(has_loss and number > context)
    if all(message["role"] != "assistant" for message in messages[context:]):
        raise ValueError("expected a turn of the assistant, got none")
    if not is_empty(system := tree.get("system")):
        if messages[0]["role"] in SYSTEM_ROLES:
            if messages[0]["content"] != system:
                raise ValueError("system: expected none beside a system turn, got another text")
        else:
            messages.insert(0, {"role": "system", "content": text_of(system, "system")})
            learn.insert(0, True)
    return Record(
        place, messages, tuple(learn), tools_of(tree.get("tools")), ignored=tuple(ignored)
    )


def _turns(key: str) -> Callable[[str, dict[str, Any]], Record]:
    """Returns the maker of records whose turns are under one key."""
    return lambda place, tree: _chat(place, tree, tree[key], key)


def _alpaca(place: str, tree: dict[str, Any]) -> Record:
    question, extra = text_of(tree["instruction"], "instruction"), tree.get("input")
    if extra is not None and text_of(extra, "input"):
        question += f"\n\n{extra}"
    turns: Conversation = []
    history = [] if is_empty(tree.get("history")) else decoded(tree["history"])
    if not isinstance(history, list):
        raise ValueError(f"history: expected pairs of question and answer, got {history!r:.60}")
    for pair in history:
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise ValueError(f"history: expected pairs of question and answer, got {pair!r:.60}")
        turns += _exchange(text_of(pair[0], "history"), pair[1])
    answer = tree["output"] if "output" in tree else tree["chosen"]
    return _chat(place, tree, [*turns, *_exchange(question, answer)], "instruction")


def _exchange(question: Any, answer: Any) -> Conversation:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _completed(key: str) -> Callable[[str, dict[str, Any]], Record]:
    """Returns the maker of records with a prompt and an answer `key`, each text or turns."""

    def make(place: str, tree: dict[str, Any]) -> Record:
        prompt, answer = (_decoded_turns(tree[name]) for name in ("prompt", key))
        if isinstance(prompt, str) and isinstance(answer, str):
            if not text_of(answer, key).strip():
                raise ValueError(f"{key}: expected an answer, got an empty one")
            text = text_of(prompt, "prompt") + answer
            why = "a prompt of text has no chat template"
            ignored = tuple((name, why) for name in _CHAT_KEYS if not is_empty(tree.get(name)))
            return Record(
                place, [], text=text, answers=((len(prompt), len(text)),), ignored=ignored
            )
        if isinstance(answer, str):
            answer = [{"role": "assistant", "content": answer}]
        if not isinstance(answer, list):
            raise ValueError(f"{key}: expected text or turns, got {answer!r:.60}")
        if isinstance(prompt, str):
            turn = {"role": "user", "content": prompt}
            turns = [other for other in answer if isinstance(other, dict)]
            prompt = [] if any(other | turn == other for other in turns) else [turn]
        if not isinstance(prompt, list):
            raise ValueError(f"prompt: expected text or turns, got {prompt!r:.60}")
        return _chat(place, tree, prompt + _rest(answer, prompt), key, len(prompt))

    return make


def _rest(answer: list[Any], before: list[Any]) -> list[Any]:
    """Returns the answer without the turns before it, which some data sets repeat in it."""
    return answer[len(before) :] if answer[: len(before)] == before else answer


def _decoded_turns(value: Any) -> Any:
    """Returns turns that a table has as JSON text; other text stays."""
    turns = decoded(value)
    is_turns = isinstance(turns, list) and all(isinstance(turn, dict) for turn in turns)
    return turns if is_turns and turns else value


def _preferred(place: str, tree: dict[str, Any]) -> Record:
    """Returns `conversations` followed by the chosen answer."""
    turns, chosen = decoded(tree["conversations"]), tree["chosen"]
    if not isinstance(turns, list):
        raise ValueError(f"conversations: expected a list of turns, got {turns!r:.60}")
    answer = chosen if isinstance(chosen, list) else [chosen]
    return _chat(place, tree, turns + _rest(answer, turns), "conversations", len(turns))


def _plain(place: str, tree: dict[str, Any]) -> Record:
    text = text_of(tree["text"], "text")
    if not text.strip():
        raise ValueError("text: expected some, got none")
    return Record(place, [], text=text, answers=((0, len(text)),))


@dataclass(frozen=True, slots=True)
class Form:
    """A form of records: the keys it must and may have, and how it becomes a Record."""

    keys: tuple[str, ...]
    optional: tuple[str, ...]
    make: Callable[[str, dict[str, Any]], Record]

    @property
    def name(self) -> str:
        return " and ".join(self.keys)


_ALPACA_KEYS = (*_CHAT_KEYS, "input", "history")
# The first one that a record has is taken.
FORMS = (
    Form(("messages",), _CHAT_KEYS, _turns("messages")),
    Form(("conversations", "chosen"), _CHAT_KEYS, _preferred),
    Form(("conversations",), _CHAT_KEYS, _turns("conversations")),
    Form(("instruction", "output"), _ALPACA_KEYS, _alpaca),
    Form(("instruction", "chosen"), _ALPACA_KEYS, _alpaca),
    Form(("prompt", "completion"), _CHAT_KEYS, _completed("completion")),
    Form(("prompt", "chosen"), _CHAT_KEYS, _completed("chosen")),
    Form(("chosen",), _CHAT_KEYS, _turns("chosen")),
    Form(("text",), (), _plain),
)


def describe_ignored(census: Counter[tuple[str, str]]) -> list[str]:
    """Returns a line for each ignored key with the number of its records; one for metadata."""
    facts = {key: count for (key, why), count in census.items() if why == IS_METADATA}
    lines = [
        f"{count:,} records have `{key}`: ignored, because {why}"
        for (key, why), count in sorted(census.items())
        if why != IS_METADATA and count
    ]
    if facts:
        names = ", ".join(f"`{key}`" for key in sorted(facts))
        lines.append(f"{max(facts.values()):,} records have {names}: ignored, as facts about them")
    return lines
