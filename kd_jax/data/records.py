"""Forms of records: Alpaca, chats, ShareGPT, prompts, preferences and text to one form."""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from kd_jax.data.readers import Raw

Conversation = list[dict[str, Any]]
ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")
MAX_SHOWN = 20

# Names of speakers in ShareGPT's `from`.
_SPEAKERS = {
    "human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant",
    "bard": "assistant", "model": "assistant", "observation": "tool", "function_response": "tool",
}  # fmt: skip
_TURN_KEYS = ("tool_calls", "reasoning_content", "thinking", "name", "tool_call_id")
_WEIGHTS = ("weight", "train", "training", "loss")
_CHAT_KEYS = ("system", "tools")
# Facts about a record, and not a part of it.
_METADATA = {
    "id", "idx", "index", "uuid", "_id", "source", "category", "categories", "dataset",
    "dataset_name", "origin", "url", "title", "lang", "language", "topic", "tags", "meta",
    "metadata", "created", "created_at", "timestamp", "date", "model", "model_name", "hash",
    "prompt_id", "message_id", "conversation_id", "conversation_hash", "score", "rating",
    "quality", "difficulty", "subset", "split", "type", "task", "task_type", "license",
    "author", "user_id", "num_tokens", "token_count", "length", "turn", "turns",
    "__index_level_0__",
}  # fmt: skip
_IS_METADATA = "it says something about the record"


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


def make_record(place: str, raw: Raw) -> Record:
    """Returns a raw record of any accepted form as a checked one.

    Raises:
      ValueError: `field: expected X, got Y`, without the place.
    """
    tree = _parse(raw) if isinstance(raw, bytes) else raw
    if not isinstance(tree, dict):
        raise ValueError(f"expected an object, got {type(tree).__name__}")
    if "" in tree:
        raise ValueError("expected as many cells as the header has, got more")
    present = [form for form in FORMS if all(key in tree for key in form.keys)]
    full = [form for form in present if all(tree[key] is not None for key in form.keys)]
    if not present:
        got = ", ".join(sorted(map(str, tree))) or "no fields"
        expected = ", or ".join(form.name for form in FORMS)
        raise ValueError(f"expected the keys {expected}; got {got}")
    form = (full or present)[0]
    record = form.make(place, tree)
    used = {*form.keys, *form.optional}
    rest = [str(key) for key, x in tree.items() if key not in used and not _is_empty(x)]
    ignored = tuple((key, _reason(key, form)) for key in rest)
    return replace(record, ignored=record.ignored + ignored)


def _reason(key: str, form: "Form") -> str:
    if key in _METADATA:
        return _IS_METADATA
    if key == "rejected":
        return "only the chosen answer is trained on"
    if any(key in other.keys for other in FORMS):
        return f"the record has {form.name}"
    return f"records with {form.name} have no such key"


def _parse(line: bytes) -> Any:
    try:
        return json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise ValueError(f"expected UTF-8 text, got byte {line[error.start]:#x}") from None
    except json.JSONDecodeError as error:
        shown = line.decode(errors="replace").strip()
        raise ValueError(f"expected JSON, got {shown[:40]!r} ({error.msg})") from None
    except RecursionError:
        raise ValueError(f"expected JSON, got {line[:20]!r}... nested too deeply") from None
    except ValueError as error:  # an integer of thousands of digits
        raise ValueError(f"expected JSON, got {str(error).partition(';')[0]}") from None


def _is_empty(value: Any) -> bool:
    return value is None or (isinstance(value, str | list | dict) and not value)


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name}: expected text, got {value!r:.60}")
    if not value.isascii():
        _check_unicode(value, name)
    return value


def _check_unicode(value: str, name: str) -> None:
    try:
        value.encode()
    except UnicodeEncodeError as error:
        half = ascii(value[error.start])
        raise ValueError(f"{name}: expected Unicode text, got half of a pair, {half}") from None


def _decoded(value: Any) -> Any:
    """Returns a list or object that a table has as JSON text."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


# Forms.


def _chat(place: str, tree: dict[str, Any], turns: Any, name: str, context: int = 0) -> Record:
    """Returns a conversation, with the record's `system` and `tools`.

    Args:
      context: number of first turns that have no loss.
    """
    turns = _decoded(turns)
    if not isinstance(turns, list) or not turns:
        raise ValueError(f"{name}: expected a list of turns, got {turns!r:.60}")
    messages: Conversation = []
    learn: list[bool] = []
    ignored: dict[tuple[str, str], None] = {}
    for number, turn in enumerate(turns, start=1):
        message, has_loss = _turn(number, turn, ignored)
        messages.append(message)
        learn.append(has_loss and number > context)
    if all(message["role"] != "assistant" for message in messages[context:]):
        raise ValueError("expected a turn of the assistant, got none")
    if not _is_empty(system := tree.get("system")):
        if messages[0]["role"] in ("system", "developer"):
            if messages[0]["content"] != system:
                raise ValueError("system: expected none beside a system turn, got another text")
        else:
            messages.insert(0, {"role": "system", "content": _text(system, "system")})
            learn.insert(0, True)
    return Record(place, messages, tuple(learn), _tools(tree.get("tools")), ignored=tuple(ignored))


def _turn(
    number: int, turn: Any, ignored: dict[tuple[str, str], None]
) -> tuple[dict[str, Any], bool]:
    """Returns a turn as chat templates take it, and whether it has a loss."""
    at = f"turn {number}"
    if isinstance(turn, dict) and {"from", "value"} <= turn.keys() and "role" not in turn:
        turn = _from_sharegpt(turn)
    if not isinstance(turn, dict) or "role" not in turn:
        raise ValueError(f"{at}: expected role and content, got {turn!r:.60}")
    turn = {key: value for key, value in turn.items() if value is not None or key == "content"}
    role = turn["role"]
    if role not in ROLES:
        raise ValueError(f"{at}: expected role {'|'.join(ROLES)}, got {role!r:.60}")
    if not _is_empty(call := turn.pop("function_call", None)):
        turn["tool_calls"] = [*turn.get("tool_calls", []), call]
    message = {"role": role}
    if calls := turn.get("tool_calls"):
        message["tool_calls"] = _tool_calls(calls, at)
    if "content" not in turn and not calls:
        raise ValueError(f"{at}: expected role and content, got {turn!r:.60}")
    message["content"] = "" if calls and not turn.get("content") else _content(turn["content"], at)
    if role == "assistant" and not message["content"].strip() and not calls:
        raise ValueError(f"{at}: expected an answer, got an empty one")
    for key in ("reasoning_content", "thinking", "name", "tool_call_id"):
        if not _is_empty(turn.get(key)):
            message[key] = _text(turn[key], f"{at}: {key}")
    learn = True
    for key in (key for key in _WEIGHTS if key in turn):
        if turn[key] not in (0, 1):
            raise ValueError(f"{at}: {key}: expected 0 or 1, got {turn[key]!r:.60}")
        if role == "assistant":
            learn &= bool(turn[key])
        elif turn[key]:
            ignored[key, "only the assistant's turns have a loss"] = None
    for key in turn.keys() - {"role", "content", *_TURN_KEYS, *_WEIGHTS}:
        if not _is_empty(turn[key]):
            why = _IS_METADATA if key in _METADATA else "turns have no such key"
            ignored[str(key), why] = None
    return message, learn


def _from_sharegpt(turn: dict[str, Any]) -> dict[str, Any]:
    rest = {key: value for key, value in turn.items() if key not in ("from", "value")}
    if turn["from"] == "function_call":
        calls = _decoded(turn["value"])
        if isinstance(calls, str):
            raise ValueError(f"function_call: expected JSON, got {calls!r:.60}")
        calls = calls if isinstance(calls, list) else [calls]
        return {**rest, "role": "assistant", "content": None, "tool_calls": calls}
    speaker = turn["from"] if isinstance(turn["from"], str) else repr(turn["from"])
    return {**rest, "role": _SPEAKERS.get(speaker.lower(), turn["from"]), "content": turn["value"]}


def _content(value: Any, at: str) -> str:
    """Returns text, or the text of a list of content parts."""
    if not isinstance(value, list):
        return _text(value, at)
    parts = []
    for part in value:
        if not isinstance(part, dict):
            raise ValueError(f"{at}: expected text, got {value!r:.60}")
        if part.get("type") not in ("text", "input_text", "output_text"):
            raise ValueError(f"{at}: expected parts of type text, got {part.get('type')!r:.60}")
        parts.append(_text(part.get("text"), f"{at}: text"))
    return "".join(parts)


def _tool_calls(calls: Any, at: str) -> list[dict[str, Any]]:
    """Returns tool calls with their arguments as objects, as chat templates take them."""
    calls = _decoded(calls)
    if not isinstance(calls, list):
        raise ValueError(f"{at}: tool_calls: expected a list, got {calls!r:.60}")
    out = []
    for call in calls:
        function = call.get("function", call) if isinstance(call, dict) else call
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ValueError(f"{at}: tool_calls: expected name and arguments, got {call!r:.60}")
        function = {**function, "arguments": _decoded(function.get("arguments", {}))}
        beside = call if "function" in call else {}
        out.append({"type": "function", **beside, "function": function})
    _check_unicode(json.dumps(out, ensure_ascii=False), f"{at}: tool_calls")
    return out


def _tools(tools: Any) -> list[Any] | None:
    if _is_empty(tools):
        return None
    tools = _decoded(tools)
    tools = [tools] if isinstance(tools, dict) else tools
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ValueError(f"tools: expected a list of objects, got {tools!r:.60}")
    _check_unicode(json.dumps(tools, ensure_ascii=False), "tools")
    return tools or None


def _alpaca(place: str, tree: dict[str, Any]) -> Record:
    question, extra = _text(tree["instruction"], "instruction"), tree.get("input")
    if extra is not None and _text(extra, "input"):
        question += f"\n\n{extra}"
    turns: Conversation = []
    history = [] if _is_empty(tree.get("history")) else _decoded(tree["history"])
    if not isinstance(history, list):
        raise ValueError(f"history: expected pairs of question and answer, got {history!r:.60}")
    for pair in history:
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise ValueError(f"history: expected pairs of question and answer, got {pair!r:.60}")
        turns += _exchange(_text(pair[0], "history"), pair[1])
    answer = tree["output"] if "output" in tree else tree["chosen"]
    return _chat(place, tree, [*turns, *_exchange(question, answer)], "instruction")


def _exchange(question: Any, answer: Any) -> Conversation:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _completed(key: str) -> Callable[[str, dict[str, Any]], Record]:
    """Returns the maker of records with a prompt and an answer `key`, each text or turns."""

    def make(place: str, tree: dict[str, Any]) -> Record:
        prompt, answer = (_decoded_turns(tree[name]) for name in ("prompt", key))
        if isinstance(prompt, str) and isinstance(answer, str):
            if not _text(answer, key).strip():
                raise ValueError(f"{key}: expected an answer, got an empty one")
            text = _text(prompt, "prompt") + answer
            why = "a prompt of text has no chat template"
            ignored = tuple((name, why) for name in _CHAT_KEYS if not _is_empty(tree.get(name)))
            return Record(
                place, [], text=text, answers=((len(prompt), len(text)),), ignored=ignored
            )
        if isinstance(answer, str):
            answer = [{"role": "assistant", "content": answer}]
        if not isinstance(answer, list):
            raise ValueError(f"{key}: expected text or turns, got {answer!r:.60}")
        if isinstance(prompt, str):
            turn = {"role": "user", "content": prompt}
            prompt = [] if any(_is_question(turn, other) for other in answer) else [turn]
        if not isinstance(prompt, list):
            raise ValueError(f"prompt: expected text or turns, got {prompt!r:.60}")
        return _chat(place, tree, prompt + answer, key, len(prompt))

    return make


def _is_question(turn: dict[str, Any], other: Any) -> bool:
    return isinstance(other, dict) and {**other, **turn} == other


def _decoded_turns(value: Any) -> Any:
    """Returns turns that a table has as JSON text; other text stays."""
    turns = _decoded(value)
    is_turns = isinstance(turns, list) and all(isinstance(turn, dict) for turn in turns)
    return turns if is_turns and turns else value


def _preferred(place: str, tree: dict[str, Any]) -> Record:
    """Returns `conversations` followed by the chosen answer."""
    turns, chosen = _decoded(tree["conversations"]), tree["chosen"]
    if not isinstance(turns, list):
        raise ValueError(f"conversations: expected a list of turns, got {turns!r:.60}")
    answer = chosen if isinstance(chosen, list) else [chosen]
    return _chat(place, tree, turns + answer, "conversations", len(turns))


def _plain(place: str, tree: dict[str, Any]) -> Record:
    text = _text(tree["text"], "text")
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
    Form(("messages",), _CHAT_KEYS, lambda at, tree: _chat(at, tree, tree["messages"], "messages")),
    Form(("conversations", "chosen"), _CHAT_KEYS, _preferred),
    Form(
        ("conversations",),
        _CHAT_KEYS,
        lambda at, tree: _chat(at, tree, tree["conversations"], "conversations"),
    ),
    Form(("instruction", "output"), _ALPACA_KEYS, _alpaca),
    Form(("instruction", "chosen"), _ALPACA_KEYS, _alpaca),
    Form(("prompt", "completion"), _CHAT_KEYS, _completed("completion")),
    Form(("prompt", "chosen"), _CHAT_KEYS, _completed("chosen")),
    Form(("chosen",), _CHAT_KEYS, lambda at, tree: _chat(at, tree, tree["chosen"], "chosen")),
    Form(("text",), (), _plain),
)


def describe_ignored(census: Counter[tuple[str, str]]) -> list[str]:
    """Returns a line for each ignored key with the number of its records; one for metadata."""
    facts = {key: count for (key, why), count in census.items() if why == _IS_METADATA}
    lines = [
        f"{count:,} records have `{key}`: ignored, because {why}"
        for (key, why), count in sorted(census.items())
        if why != _IS_METADATA and count
    ]
    if facts:
        names = ", ".join(f"`{key}`" for key in sorted(facts))
        lines.append(f"{max(facts.values()):,} records have {names}: ignored, as facts about them")
    return lines


def first_of(problems: list[str]) -> list[str]:
    """Returns the first problems, and a line that counts the others."""
    more = len(problems) - MAX_SHOWN
    return problems[:MAX_SHOWN] + ([f"and {more} more"] if more > 0 else [])
