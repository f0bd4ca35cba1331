"""Small files: JSON with one clear error, atomic writes, locks."""

import errno
import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from kd_jax.config import UserError


def read_json(path: Path) -> dict[str, Any]:
    """Returns the JSON object in a file; raises UserError for anything else."""
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: expected a JSON file, which is not there") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: expected JSON, got {error}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected a JSON object, got {type(tree).__name__}")
    return tree


def write_whole(file: Path, text: str) -> None:
    """Writes a file atomically: a reader sees the old content or the new."""
    beside = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, file)


# Errors of file systems without locks.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@contextmanager
def locked(path: Path, *, wait: bool) -> Iterator[int]:
    """Holds an exclusive lock on a file and yields its descriptor; the file is removed at the end.

    The kernel releases the lock when the process dies. On a file system without locks nothing is
    held.

    Raises:
      BlockingIOError: another process holds the lock, and `wait` is False.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise
            if not _is_open_at(descriptor, path):  # the holder before removed it
                continue
            try:
                yield descriptor
            finally:
                with suppress(OSError):
                    path.unlink()
            return
        finally:
            os.close(descriptor)


def _is_open_at(descriptor: int, path: Path) -> bool:
    """Returns True if the path still leads to the open file."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False
