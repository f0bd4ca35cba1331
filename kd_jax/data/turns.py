"""Turns of a checked conversation as chat templates take them."""

import json
from typing import Any


def as_taken(turn: dict[str, Any], parts: bool) -> dict[str, Any]:
    """Returns the turn with its content in the template's form: text, or a list of parts."""
    return turn | {"content": [{"type": "text", "text": turn["content"]}]} if parts else turn


def with_text_arguments(turn: dict[str, Any]) -> dict[str, Any]:
    """Returns the turn with the arguments of its tool calls as JSON text."""
    calls = []
    for call in turn.get("tool_calls", []):
        function, arguments = call["function"], call["function"]["arguments"]
        text = arguments if isinstance(arguments, str) else json.dumps(arguments)
        calls.append(call | {"function": function | {"arguments": text}})
    return turn | {"tool_calls": calls} if calls else turn


def called(turn: dict[str, Any]) -> list[str]:
    """Returns the names of a turn's tool calls."""
    return [call["function"]["name"] for call in turn.get("tool_calls", [])]
