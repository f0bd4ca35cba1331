"""Parts of a record that its text does not show, because the chat template leaves them out."""

import json
from collections.abc import Mapping

from kd_jax.data.forms import Form
from kd_jax.data.records import Record
from kd_jax.data.turns import called

# Parts of a record from which nothing is learned, and the reason.
HIDDEN = {
    "tools": "`tools`, which the chat template does not show",
    "system": "a system message, which the chat template does not show",
    "user": "a user message, which the chat template does not show as it is",
    "tool": "a tool's result, which the chat template does not show as it is",
    "name": "names of speakers (`name`), which the chat template does not show",
    "tool_calls": "`tool_calls`, which the chat template does not show",
    "reasoning_content": "`reasoning_content`, which the chat template does not show",
    "thinking": "`thinking`, which the chat template does not show",
    "thought": "thoughts (</think>), which the chat template does not show",
    "dropped": "earlier answers without a loss: the chat template drops their thoughts",
    "assistant": "answers without a loss, because the chat template hides them or their place",
}


def describe_hidden(counts: Mapping[str, int], path: str) -> list[str]:
    """Returns a warning for each key of HIDDEN, with the number of its records."""
    return [
        f"warning: {path}: {number:,} record{' has' if number == 1 else 's have'} {HIDDEN[key]}"
        for key, number in counts.items()
    ]


def find_hidden(text: str, record: Record, form: Form) -> set[str]:
    """Returns the keys of HIDDEN for what the record has and the text does not show."""
    found = set()
    if record.tools and "tools" not in form.shows:
        found.add("tools")
    for turn in record.messages:
        content, role = turn["content"], turn["role"]
        if role != "assistant" and not _shows(text, content):
            found.add(role if role in HIDDEN else "user")
        if turn.get("name") and role != "tool" and not _shows(text, turn["name"]):
            found.add("name")
        if not all(_shows(text, name) for name in called(turn)):
            found.add("tool_calls")
        for key in ("reasoning_content", "thinking"):
            if key in turn and key not in form.shows and not _shows(text, turn[key]):
                found.add(key)
        if role == "assistant" and "</think>" in content and "thought" not in form.shows:
            found.add("thought")
    return found


def _shows(text: str, part: str) -> bool:
    """Returns True if the text has the part, as it is or as JSON."""
    part = part.strip()
    return part in text or json.dumps(part, ensure_ascii=False)[1:-1] in text
