"""Chat templates: rendered by transformers' sandbox, on a fixed date, within limits."""

import json
import resource
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from kd_jax.config import UserError
from kd_jax.config.checks import parse_date
from kd_jax.config.errors import first_line

Template = str | dict[str, str]
"""Jinja text, or texts by name: `default`, and perhaps `tool_use` for records with tools."""

Shown = tuple[str, list[tuple[int, int]]]
"""A conversation as text, and the template's own marks of answers [begin, end)."""

TEMPLATE_FILE = "chat_template.json"
"""A workdir's copy of the template that the run is trained with."""
MAX_SECONDS = 3
"""CPU seconds for one conversation."""
MAX_BYTES = 2**31
"""Memory that rendering may add."""
MAX_LENGTH = 2**25
"""Characters of one rendered conversation."""
CODES = "aAbBcCdDeFgGhHIjklmMnpPrRStTuUVwWxXyYzZf"
BARE_CODES = "dmyHIjklMSUWeu"
"""Format codes of strftime, and those that may follow `%-`."""


def read_template(file: Path, field: str = "data.chat-template") -> Template:
    """Returns the template of a Jinja file, or of `chat_template` in a JSON file."""
    try:
        text = file.read_text(encoding="utf-8")
        found = json.loads(text)["chat_template"] if file.suffix == ".json" else text
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{field}: expected a Jinja file in UTF-8, got {file} ({error})") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f"{field}: expected JSON with chat_template, got {file}") from None
    if isinstance(found, list):
        found = {entry["name"]: entry["template"] for entry in found}
    return check_template(found, field)


def check_template(template: Any, field: str) -> Template:
    """Returns the template; raises UserError if it is none, or has names but no `default`."""
    named = template if isinstance(template, dict) else {"default": template}
    if "default" not in named or not all(isinstance(text, str) for text in named.values()):
        got = f"names {', '.join(named)}" if isinstance(template, dict) else repr(template)[:60]
        raise UserError(f"{field}: expected Jinja text, or texts with the name default, got {got}")
    return template


def need_template(template: Template | None) -> Template:
    """Returns the template; raises UserError if there is none."""
    if template is None:
        raise UserError("data.chat-template: no tokenizer has a template. Set a Jinja file")
    return template


def choose(template: Template, tools: Any) -> str:
    """Returns the text for a record with or without tools, as transformers chooses it."""
    if isinstance(template, str):
        return template
    return template["tool_use" if tools and "tool_use" in template else "default"]


def apply_template(
    special: dict[str, Any], turns: list[dict[str, Any]], template: str, date: str, **options: Any
) -> Shown:
    """Returns one conversation as apply_to_all does, with the same options."""
    return apply_to_all(special, [turns], template, date, **options)[0]


def apply_to_all(
    special: dict[str, Any],
    conversations: list[list[dict[str, Any]]],
    template: str,
    date: str,
    *,
    tools: list[Any] | None = None,
    prompt: bool = False,
    marks: bool = False,
) -> list[Shown]:
    """Returns each conversation as text, and the template's own marks of answers [begin, end).

    Args:
      special: the tokenizer's special tokens by name.
      date: what strftime_now and date_string show, as data.date.
      prompt: end with the generation prompt.
      marks: return what {% generation %} encloses, else no marks.

    Raises:
      ValueError: the template rejects a conversation.
      UserError: the template exceeds a limit; those of one conversation hold for all together.
    """
    from transformers.utils.chat_template_utils import render_jinja_template  # takes seconds

    prefix, shown = _fixed_date(date)
    options = {**special, "date_string": shown, "add_generation_prompt": prompt}
    try:
        with _limit_seconds():
            rendered: Any = render_jinja_template(
                conversations,
                tools=tools,
                chat_template=prefix + template,
                return_assistant_tokens_mask=marks,
                **options,
            )
    except (TimeoutError, MemoryError):
        raise UserError(
            f"data.chat-template: expected a template that ends within {MAX_SECONDS} s and takes "
            f"less than {MAX_BYTES >> 30} GiB, got one that does not. Look for a loop in it"
        ) from None
    except Exception as error:  # templates may raise anything
        line = getattr(error, "lineno", None)
        reason = first_line(error) + (f", line {line}" if line else "")
        raise ValueError(f"the chat template rejects it ({reason})") from None
    texts, marked = rendered
    if any(len(text) > MAX_LENGTH for text in texts):
        raise ValueError(f"the chat template writes more than {MAX_LENGTH:,} characters")
    if not marks:
        return [(text, []) for text in texts]
    return [
        (text, [(begin, end) for begin, end in some])
        for text, some in zip(texts, marked, strict=True)
    ]


@lru_cache
def _fixed_date(date: str) -> tuple[str, str]:
    """Returns a macro that stands for strftime_now, and the date as Llama 3 writes it.

    A macro, because transformers passes no functions to templates; +%} preserves the line break.
    """
    day = parse_date(date)
    if day is None:
        raise UserError(f"data.date: expected 26 Jul 2024 or 2024-07-26, got {date!r}")
    codes = [f"%{code}" for code in CODES] + [f"%-{code}" for code in BARE_CODES]
    shown = {"%%": "\0", **{code: day.strftime(code) for code in codes}, "\0": "%"}
    macro = (
        "{%- macro strftime_now(format) -%}{%- set shown = namespace(text=format) -%}"
        f"{{%- for code, value in {json.dumps(shown)}.items() -%}}"
        "{%- set shown.text = shown.text.replace(code, value) -%}{%- endfor -%}"
        "{{- shown.text -}}{%- endmacro +%}"
    )
    return macro, day.strftime("%d %b %Y")


@contextmanager
def _limit_seconds() -> Iterator[None]:
    """Raises TimeoutError in a block that takes too much CPU time or memory; main thread only."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    began = time.process_time()
    first: list[int] = []

    def check(*_: Any) -> None:
        first.append(_memory_bytes())
        if time.process_time() - began > MAX_SECONDS or first[-1] - first[0] > MAX_BYTES:
            raise TimeoutError
        signal.setitimer(signal.ITIMER_VIRTUAL, 0.1)

    before = signal.signal(signal.SIGVTALRM, check)
    signal.setitimer(signal.ITIMER_VIRTUAL, 0.1)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def _memory_bytes(column: int = 1) -> int:
    """Returns the process's resident memory, or with column 0 its address space; 0: unknown."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[column])
    except OSError:
        return 0
    return pages * resource.getpagesize()


@contextmanager
def limit_memory() -> Iterator[None]:
    """Bounds what the block may allocate, so that one huge text is a MemoryError. Keep it short."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    now = _memory_bytes(0)
    limits = [x for x in (now + MAX_BYTES, soft, hard) if x != resource.RLIM_INFINITY]
    try:
        if now:
            resource.setrlimit(resource.RLIMIT_AS, (min(limits), hard))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
