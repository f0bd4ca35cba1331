"""The exception for a user's mistakes, and parts of its message."""

import difflib
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

MAX_SHOWN = 20  # lines of a message


class UserError(Exception):
    """A mistake of the user, printed as one message without a traceback; exit status 2."""


def raise_all(problems: Sequence[str]) -> None:
    """Raises UserError with all problems, if there are any."""
    if problems:
        raise UserError("\n".join(problems))


@contextmanager
def naming_flags(*names: str) -> Iterator[None]:
    """Names a field of DataConfig in the errors of a command by the command's flag, `--name`."""
    try:
        yield
    except UserError as error:
        fields = rf"\bdata\.({'|'.join(names)})\b"
        raise UserError(re.sub(fields, r"--\1", str(error))) from None


def did_you_mean(name: str, known: Iterable[str], flag: str = "") -> str:
    """Returns ` Did you mean X?` with the known name nearest to `name`; "" if none is near."""
    near = difflib.get_close_matches(name, list(known), 1)
    return f" Did you mean {flag}{near[0]}?" if near else ""


def half_of_pair(text: str) -> str:
    """Returns the first half of a surrogate pair in text, which is no Unicode; "" without one.

    JSON and the words of a command line can have them.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return text[error.start]
    return ""


def first_line(error: BaseException) -> str:
    """Returns the first line of an error, without the 900 characters of JSON in TensorStore's."""
    line = (str(error).splitlines() or [type(error).__name__])[0]
    return re.sub(r" \[tensorstore_spec='.*?'\](?= \[|$)", "", line)


def first_lines(lines: Sequence[str], count: int | None = None) -> list[str]:
    """Returns the first lines, and one that counts the others.

    Args:
      count: number of all lines, of which `lines` are the first; None: `lines` are all.
    """
    more = (len(lines) if count is None else count) - MAX_SHOWN
    return [*lines[:MAX_SHOWN], *([f"and {more:,} more"] if more > 0 else [])]
