"""User errors: the exception, and checks that report all problems at once."""

import dataclasses
import importlib
from types import UnionType
from typing import Any, Literal, get_args, get_origin


class UserError(Exception):
    """A mistake of the user, printed as one message without a traceback; exit status 2."""


class Checks:
    """Collects the problems of a dataclass, to report all of them at once."""

    def __init__(self) -> None:
        self.problems: list[str] = []

    def require(self, holds: bool, name: str, expected: str, got: Any) -> None:
        if not holds:
            self.problems.append(f"{name}: expected {expected}, got {got!r}")

    def require_types(self, part: Any, prefix: str = "") -> None:
        """Requires values of the annotated types, which Python itself does not check."""
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
    """Returns True for a value of an annotated type; int counts as float, bool as neither."""
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


def import_experimental(module: str, name: str) -> Any:
    """Returns an attribute of one of jax's modules without a stable interface.

    Raises:
      UserError: the installed jax does not have it.
    """
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        from importlib.metadata import version

        raise UserError(
            f"jax: expected 0.10, 0.11 or 0.12, which have {module}.{name}, got {version('jax')} "
            f"({error}). pip install 'jax<0.13'"
        ) from error
