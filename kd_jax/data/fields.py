"""Checked parts of records: JSON lines, text, turns, tool calls and tools.

A part that is not as expected raises ValueError, `field: expected X, got Y`, without the place.
"""

import json
from typing import Any

from kd_jax.config.errors import half_of_pair
from kd_jax.data.readers import once

SYSTEM_ROLES = ("system", "developer")
RESULT_ROLES = ("tool", "function", "ipython")  # speakers of a tool's results
ROLES = (*SYSTEM_ROLES, "user", "assistant", *RESULT_ROLES)
# Names of speakers in ShareGPT's `from`.
_SPEAKERS = {
    "human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant",
    "bard": "assistant", "model": "assistant", "observation": "tool", "function_response": "tool",
}  # fmt: skip
_TURN_KEYS = ("tool_calls", "reasoning_content", "thinking", "name", "tool_call_id")
_WEIGHTS = ("weight", "train", "training", "loss")
# Facts about a record, and not a part of it.
METADATA = {
    "id", "idx", "index", "uuid", "_id", "source", "category", "categories", "dataset",
    "dataset_name", "origin", "url", "title", "lang", "language", "topic", "tags", "meta",
    "metadata", "created", "created_at", "timestamp", "date", "model", "model_name", "hash",
    "prompt_id", "message_id", "conversation_id", "conversation_hash", "score", "rating",
    "quality", "difficulty", "subset", "split", "type", "task", "task_type", "license",
    "author", "user_id", "num_tokens", "token_count", "length", "turn", "turns", "sample", "ended",
    "tokens",
    "__index_level_0__",
}  # fmt: skip
IS_METADATA = "it says something about the record"


def parse(line: bytes) -> Any:
    """Returns the value of a line of JSON in UTF-8."""
    try:
        return json.loads(line.decode(), object_pairs_hook=once)
    except UnicodeDecodeError as error:
        raise ValueError(f"expected UTF-8 text, got byte {line[error.start]:#x}") from None
    except json.JSONDecodeError as error:
        shown = line.decode(errors="replace").strip()
        raise ValueError(f"expected JSON, got {shown[:40]!r} ({error.msg})") from None
    except RecursionError:
        raise ValueError(f"expected JSON, got {line[:20]!r}... nested too deeply") from None
    except ValueError as error:  # a key twice, or an integer of thousands of digits
        raise ValueError(f"expected JSON, got {str(error).partition(';')[0]}") from None


def is_empty(value: Any) -> bool:
    """Returns True for None and for text, lists and objects without content; False for 0."""
    return value is None or (isinstance(value, str | list | dict) and not value)


def text_of(value: Any, name: str) -> str:
    """Returns the value if it is Unicode text; `name` is the field in messages."""
    if not isinstance(value, str):
        raise ValueError(f"{name}: expected text, got {value!r:.60}")
    if not value.isascii():
        check_unicode(value, name)
    return value


def check_unicode(value: str, name: str) -> None:
    """Raises ValueError for text with half of a surrogate pair."""
    if half := half_of_pair(value):
        raise ValueError(f"{name}: expected Unicode text, got half of a pair, {half!a}")


def _check_json(value: Any, name: str) -> None:
    """Raises ValueError for what JSON does not have, such as a date, or half a character."""
    try:
        check_unicode(json.dumps(value, ensure_ascii=False), name)
    except TypeError as error:
        raise ValueError(f"{name}: expected values of JSON ({error})") from None


def decoded(value: Any) -> Any:
    """Returns a list or object that a table has as JSON text."""
    return (
        _from_json(value) if isinstance(value, str) and value.lstrip()[:1] in ("[", "{") else value
    )


def _from_json(text: str) -> Any:
    """Returns what a JSON text stands for; any other text as it is."""
    try:
        return json.loads(text, object_pairs_hook=once)
    except (json.JSONDecodeError, RecursionError):
        return text
    except ValueError as error:
        raise ValueError(f"expected JSON, got {str(error).partition(';')[0]}") from None


def turn_of(
    number: int, turn: Any, ignored: dict[tuple[str, str], None]
) -> tuple[dict[str, Any], bool]:
    """Returns a turn as chat templates take it, and whether it has a loss.

    Args:
      number: of the turn in its conversation, from 1, for messages.
      ignored: gets (key, reason) of each key of the turn that is not used.
    """
    at = f"turn {number}"
    if isinstance(turn, dict) and {"from", "value"} <= turn.keys() and "role" not in turn:
        turn = _from_sharegpt(turn)
    if not isinstance(turn, dict) or turn.get("role") is None:
        raise ValueError(f"{at}: expected role and content, got {turn!r:.60}")
    turn = {key: value for key, value in turn.items() if value is not None or key == "content"}
    role = turn["role"]
    if role not in ROLES:
        raise ValueError(f"{at}: expected role {'|'.join(ROLES)}, got {role!r:.60}")
    calls = decoded(turn.get("tool_calls")) or []
    if not is_empty(call := turn.pop("function_call", None)):
        calls = [*calls, decoded(call)] if isinstance(calls, list) else calls
    message = {"role": role}
    if calls:
        message["tool_calls"] = _tool_calls(calls, at)
    if "content" not in turn and not calls:
        raise ValueError(f"{at}: expected role and content, got {turn!r:.60}")
    message["content"] = "" if calls and not turn.get("content") else _content(turn["content"], at)
    if role == "assistant" and not message["content"].strip() and not calls:
        raise ValueError(f"{at}: expected an answer, got an empty one")
    for key in ("reasoning_content", "thinking", "name", "tool_call_id"):
        if not is_empty(turn.get(key)):
            message[key] = text_of(turn[key], f"{at}: {key}")
    learn = True
    for key in (key for key in _WEIGHTS if key in turn):
        if turn[key] not in (0, 1):
            raise ValueError(f"{at}: {key}: expected 0 or 1, got {turn[key]!r:.60}")
        if role == "assistant":
            learn &= bool(turn[key])
        elif turn[key]:
            ignored[key, "only the assistant's turns have a loss"] = None
    for key in turn.keys() - {"role", "content", *_TURN_KEYS, *_WEIGHTS}:
        if not is_empty(turn[key]):
            why = IS_METADATA if key in METADATA else "turns have no such key"
            ignored[str(key), why] = None
    return message, learn


def _from_sharegpt(turn: dict[str, Any]) -> dict[str, Any]:
    rest = {key: value for key, value in turn.items() if key not in ("from", "value")}
    if turn["from"] == "function_call":
        calls = decoded(turn["value"])
        if isinstance(calls, str):
            raise ValueError(f"function_call: expected JSON, got {calls!r:.60}")
        calls = calls if isinstance(calls, list) else [calls]
        return {**rest, "role": "assistant", "content": None, "tool_calls": calls}
    return {**rest, "role": role_of(turn["from"]), "content": turn["value"]}


def role_of(speaker: Any) -> Any:
    """Returns the role of a speaker, by any of its names."""
    return _SPEAKERS.get(speaker.lower(), speaker) if isinstance(speaker, str) else speaker


def _content(value: Any, at: str) -> str:
    """Returns text, or the text of a list of content parts."""
    if not isinstance(value, list):
        return text_of(value, at)
    parts = []
    for part in value:
        if not isinstance(part, dict):
            raise ValueError(f"{at}: expected text, got {value!r:.60}")
        if part.get("type") not in ("text", "input_text", "output_text"):
            raise ValueError(f"{at}: expected parts of type text, got {part.get('type')!r:.60}")
        parts.append(text_of(part.get("text"), f"{at}: text"))
    return "".join(parts)


def _tool_calls(calls: Any, at: str) -> list[dict[str, Any]]:
    """Returns tool calls with their arguments as objects, as chat templates take them."""
    if not isinstance(calls, list):
        raise ValueError(f"{at}: tool_calls: expected a list, got {calls!r:.60}")
    out = []
    for call in calls:
        function = call.get("function", call) if isinstance(call, dict) else call
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ValueError(f"{at}: tool_calls: expected name and arguments, got {call!r:.60}")
        given = function.get("arguments", {})
        arguments = _from_json(given) if isinstance(given, str) else given  # OpenAI's are text
        function = {**function, "arguments": arguments}
        beside = call if "function" in call else {}
        out.append({"type": "function", **beside, "function": function})
    _check_json(out, f"{at}: tool_calls")
    return out


def tools_of(tools: Any) -> list[Any] | None:
    """Returns a record's tools as a list of objects; None if there are none."""
    if is_empty(tools):
        return None
    tools = decoded(tools)
    tools = [tools] if isinstance(tools, dict) else tools
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ValueError(f"tools: expected a list of objects, got {tools!r:.60}")
    _check_json(tools, "tools")
    return tools or None
