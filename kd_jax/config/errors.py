"""A user's mistakes: the exception, and checks that report all problems at once."""

import dataclasses
from types import UnionType
from typing import Any, Literal, get_args, get_origin


class UserError(Exception):
    """A mistake of the user's: printed as one message without a traceback, exit status 2."""


class Checks:
    """Collects what is wrong with a dataclass, so that all problems are reported at once."""

    def __init__(self) -> None:
        self.problems: list[str] = []

    def require(self, holds: bool, name: str, expected: str, got: Any) -> None:
        if not holds:
            self.problems.append(f"{name}: expected {expected}, got {got!r}")

    def require_types(self, part: Any, prefix: str = "") -> None:
        """Requires values of the annotated types: a config file is Python, which checks none."""
        for entry in dataclasses.fields(part):
            name, value = f"{prefix}{entry.name}".replace("_", "-"), getattr(part, entry.name)
            fits = _is_a(value, entry.type)
            self.require(fits, name, _name_of(entry.type), value)
            if fits and dataclasses.is_dataclass(value):
                self.require_types(value, f"{name}.")

    def finish(self) -> None:
        if self.problems:
            raise UserError("\n".join(self.problems))


def _is_a(value: Any, kind: Any) -> bool:
    """Tells whether a value is of an annotated type; an integer is a float too, a bool neither."""
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


def first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
