"""stdout and stderr that a reader may close before a command ends."""

import os
import select
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from typing import Any, TextIO


def open_streams() -> None:
    """Opens the null device for each standard stream that the process began without.

    Else the next file would get its descriptor, and messages of libraries would go into that file.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
    sys.stdout = sys.stdout or os.fdopen(1, "w", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", closefd=False)


def is_unread() -> bool:
    """Returns True if stdout is a pipe whose reader has ended."""
    poll = select.poll()
    with suppress(OSError, ValueError):  # no descriptor
        poll.register(sys.stdout.fileno(), 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def flush_streams() -> None:
    """Writes what is buffered; without a reader it is dropped."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):  # ValueError: closed
            _drop(stream)


def _drop(stream: Any) -> None:
    """Leads a stream to the null device."""
    with suppress(OSError, ValueError, AttributeError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)


class _Outliving:
    """A stream whose writes never fail: without a reader they are dropped."""

    def __init__(self, stream: TextIO):
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        self._attempt(self.stream.write, text)
        return len(text)

    def flush(self) -> None:
        self._attempt(self.stream.flush)

    def _attempt(self, call: Callable[..., Any], *arguments: Any) -> None:
        try:
            call(*arguments)
        except OSError:  # a closed pipe or terminal, a full disk
            _drop(self.stream)


@contextmanager
def outlive_readers() -> Iterator[None]:
    """Lets a command go on when the reader of its output ends, such as `head -n 1`."""
    out: Any = _Outliving(sys.stdout)
    err: Any = _Outliving(sys.stderr)
    with redirect_stdout(out), redirect_stderr(err):
        yield
