"""Turns of a conversation as chat templates take them."""

import json
from typing import Any


def content_of(turn: dict[str, Any]) -> str:
    """Returns a turn's text; parts of a list are joined."""
    content = turn.get("content") or ""
    if isinstance(content, str):
        return content
    texts = [part if isinstance(part, str) else part.get("text") for part in content]
    if None in texts:
        raise ValueError(f"expected parts of text, got {content[texts.index(None)]!r:.60}")
    return "".join(texts)


def as_taken(turn: dict[str, Any], parts: bool) -> dict[str, Any]:
    """Returns the turn without nulls, its content in the template's form, arguments as objects."""
    turn = {key: value for key, value in turn.items() if value is not None}
    if "content" in turn:
        text = content_of(turn)
        turn["content"] = [{"type": "text", "text": text}] if parts else text
    calls = turn.get("tool_calls")
    return turn | {"tool_calls": [_with_object(call) for call in calls]} if calls else turn


def _with_object(call: Any) -> Any:
    """Returns a tool call whose arguments are an object, from OpenAI's form with JSON text."""
    return _change_arguments(call, lambda x: json.loads(x) if isinstance(x, str) else x)


def with_text_arguments(turn: dict[str, Any]) -> dict[str, Any]:
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


def called(turn: dict[str, Any]) -> list[str]:
    """Returns the names of a turn's tool calls."""
    calls = [call.get("function", call) for call in turn.get("tool_calls") or []]
    return [str(call.get("name", "")) for call in calls]
