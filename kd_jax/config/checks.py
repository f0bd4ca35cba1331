"""Ranges of dataclass fields, and checks that report all problems at once."""

import dataclasses
import operator
import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, get_args, get_origin

from kd_jax.config.errors import UserError, half_of_pair, raise_all

INF = float("inf")


@dataclass(frozen=True, kw_only=True, slots=True)
class Range:
    """The numbers of a field, as in `rank: Annotated[int, Range(least=1)]`; None always fits.

    --help and error messages show it.
    """

    least: float | None = None
    above: float | None = None
    most: float | None = None
    below: float | None = None
    also: float | None = None
    """A value outside the bounds that is allowed."""

    def __contains__(self, x: float) -> bool:
        return x == self.also or all(holds(x, bound) for _, holds, bound in self._bounds())

    def __str__(self) -> str:
        bounds = [f"{words} {x}" for words, _, x in self._bounds() if abs(x) < INF]
        if self.below == INF:
            bounds.append("finite")
        return " and ".join(bounds) + ("" if self.also is None else f", or {self.also}")

    def _bounds(self) -> list[tuple[str, Callable[[Any, Any], bool], float]]:
        found = (
            ("at least", operator.ge, self.least),
            ("above", operator.gt, self.above),
            ("at most", operator.le, self.most),
            ("below", operator.lt, self.below),
        )
        return [(words, holds, bound) for words, holds, bound in found if bound is not None]


Share = Range(least=0, most=1)

# Marks fields of paths, addresses and hub ids.
IS_PATH = "is a path"
PathText = Annotated[str, IS_PATH]
OptionalPath = Annotated[str | None, IS_PATH]


class Checks:
    """Collects the problems of a dataclass, so that all are reported at once."""

    def __init__(self) -> None:
        self.problems: list[str] = []

    def refuse(self, name: str, expected: Any, got: Any) -> None:
        self.problems.append(f"{name}: expected {expected}, got {got!r}")

    def check_types(self, part: Any, prefix: str) -> None:
        """Refuses values of other types than annotated, which a config file in Python may have."""
        for entry, name, value in _fields(part, prefix):
            kind = plain_type(entry.type)
            if not _is_a(value, kind):
                self.refuse(name, _name_of(kind), value)
            elif any(half_of_pair(x) for x in _texts(value)):
                self.refuse(name, "Unicode text", value)
            elif dataclasses.is_dataclass(value):
                self.check_types(value, f"{name}.")
            elif IS_PATH in metadata(entry.type):
                if any(not x or "\0" in x for x in _texts(value)):
                    self.refuse(name, "a path", value)
                elif not all(map(_has_home, _texts(value))):
                    self.refuse(name, "a path whose ~ is the home of a user that is there", value)

    def check_ranges(self, part: Any, prefix: str, skip: str | None = None) -> None:
        """Refuses values outside their fields' ranges, and what each part's `check` refuses."""
        for entry, name, value in _fields(part, prefix):
            if dataclasses.is_dataclass(value) and entry.name != skip:
                self.check_ranges(value, f"{name}.")
            for mark in metadata(entry.type):
                if isinstance(mark, Range) and value is not None and value not in mark:
                    self.refuse(name, mark, value)
        if callable(getattr(part, "check", None)):  # not a field of that name
            part.check(self)

    def check_date(self, text: str, name: str) -> None:
        if parse_date(text) is None:
            self.refuse(name, "26 Jul 2024 or 2024-07-26", text)

    def check_schedule(self, part: Any, name: str, has_end: bool, ends: str) -> None:
        """Refuses a schedule without end values, and end values or steps without a schedule."""
        if part.schedule != "constant":
            if not has_end:
                self.refuse(f"{name}.schedule", f"constant without {ends}", part.schedule)
            return
        if has_end:
            self.refuse(f"{name}.schedule", f"linear or cosine with {ends}", part.schedule)
        if part.schedule_steps is not None:
            expected = f"None with {name}.schedule constant"
            self.refuse(f"{name}.schedule-steps", expected, part.schedule_steps)


def out_path(path: str, flag: str) -> Path:
    """Returns the path of a file to write; raises UserError unless its folder takes new files."""
    file = Path(path).expanduser()
    if file.is_dir() or not file.parent.is_dir():
        raise UserError(f"{flag}: expected a file in an existing folder, got {path}")
    if not os.access(file.parent, os.W_OK):
        raise UserError(f"{flag}: expected a folder that can be written, got {file.parent}")
    return file


def parse_date(text: str) -> datetime | None:
    """Returns the day of `26 Jul 2024`, `26 July 2024` or `2024-07-26`, or None."""
    for form in ("%d %b %Y", "%d %B %Y", "%Y-%m-%d"):
        try:
            return datetime.strptime(text, form)
        except ValueError:
            continue
    return None


def check_fields(part: Any, prefix: str = "", skip: str | None = None) -> None:
    """Raises UserError with all problems of a dataclass and its parts.

    Args:
      prefix: stands before the fields' names in messages.
      skip: a part whose ranges do not matter.
    """
    checks = Checks()
    checks.check_types(part, prefix)
    raise_all(checks.problems)  # values of a wrong type cannot be compared
    checks.check_ranges(part, prefix, skip)
    raise_all(checks.problems)


class Checked:
    """Base of a command's arguments: a dataclass that is checked when it is made."""

    __slots__ = ()

    def __post_init__(self) -> None:
        check_fields(self, "--")


def _fields(part: Any, prefix: str) -> list[tuple[dataclasses.Field, str, Any]]:
    """Returns each field of a dataclass, the name of its flag and its value."""
    return [
        (entry, prefix + entry.name.replace("_", "-"), getattr(part, entry.name))
        for entry in dataclasses.fields(part)
    ]


def metadata(kind: Any) -> tuple[Any, ...]:
    """Returns the metadata of an Annotated type."""
    return kind.__metadata__ if get_origin(kind) is Annotated else ()


def plain_type(kind: Any) -> Any:
    """Returns an annotation without Annotated."""
    return kind.__origin__ if get_origin(kind) is Annotated else kind


def _texts(value: Any) -> list[str]:
    return [x for x in (value if isinstance(value, tuple) else (value,)) if isinstance(x, str)]


def _has_home(path: str) -> bool:
    """Returns False for a path, or one of several, in the home directory of an unknown user."""
    homes = [part.strip() for part in path.split(",") if part.strip().startswith("~")]
    return all(os.path.expanduser(home) != home for home in homes)


def _is_a(value: Any, kind: Any) -> bool:
    """Returns True if a value has the type; an integer is a float too, a bool is neither."""
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if isinstance(kind, UnionType):
        return any(_is_a(value, one) for one in get_args(kind))
    if get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(_is_a(x, get_args(kind)[0]) for x in value)
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, (int, float) if kind is float else kind)


def _name_of(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return "|".join(get_args(kind))
    return kind.__name__ if isinstance(kind, type) else str(kind)
