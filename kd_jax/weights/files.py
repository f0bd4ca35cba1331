"""Files: regular ones alone, JSON with one clear error, atomic writes, locks."""

import errno
import fcntl
import json
import os
import socket
import stat
from collections.abc import Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from kd_jax.config import UserError

_AGAIN = "Download it again"
# First bytes of files that hold something else.
_CONTENTS = {
    b"version https://git-lfs": "a Git LFS pointer, which stands for a file that was not "
    "downloaded. Run `git lfs pull` in its folder, or download the model again",
    b"# xet version": f"a Git Xet pointer, which stands for a file. {_AGAIN}",
    b"/annex/objects/": "a git-annex pointer, which stands for a file. Run `git annex get`",
    b"<!doctype html": f"a web page. {_AGAIN}",
    b"<html": f"a web page. {_AGAIN}",
    b"entry not found": f"the hub's message for a missing file. {_AGAIN}",
    b"gguf": "a GGUF file (llama.cpp). Give the original safetensors model",
    b"pk\x03\x04": "a zip archive, such as pickled weights. Give safetensors",
}
_SPECIAL = {
    stat.S_IFIFO: "a pipe (FIFO)", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device", stat.S_IFDIR: "a folder",
}  # fmt: skip


def check_file(path: Path, kind: str = "a file") -> None:
    """Raises UserError unless a path leads to a regular file that holds its own content.

    Special files are not opened: reading a pipe waits for ever.
    """
    try:
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):
            got = _SPECIAL.get(stat.S_IFMT(mode), "a special file")
            raise UserError(f"{path}: expected {kind}, got {got}")
        with open(path, "rb") as stream:
            head = stream.read(max(map(len, _CONTENTS))).lower()
    except FileNotFoundError:
        if path.is_symlink():
            target = os.readlink(path)
            raise UserError(
                f"{path}: expected {kind}, got a link to {target}, which is not there. Download "
                "the folder again"
            ) from None
        raise UserError(f"{path}: expected {kind}, which is not there") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: expected {kind}, got {error}") from None
    for start, what in _CONTENTS.items():
        if head.startswith(start):
            raise UserError(f"{path}: expected {kind}, got {what}")


def is_there(path: Path) -> bool:
    """Returns True if a path names anything but a folder, False too where it cannot be a path."""
    try:
        return not stat.S_ISDIR(path.lstat().st_mode)
    except (OSError, ValueError):
        return False


def read_json(path: Path) -> dict[str, Any]:
    """Returns the JSON object in a file; raises UserError for anything else."""
    check_file(path, "a JSON file")
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: expected JSON, got {error}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected a JSON object, got {type(tree).__name__}")
    return tree


def read_lines(path: Path, integers: Collection[str]) -> list[tuple[str, dict[str, Any] | None]]:
    """Returns the lines of a file of JSON objects with these integers, and the objects.

    None stands for the object of a line that a kill or a power cut tore. An absent file has no
    lines.
    """
    lines = path.read_bytes().split(b"\n") if path.is_file() else []
    return [(x.decode(errors="replace"), _object(x, integers)) for x in lines if x]


def _object(line: bytes, integers: Collection[str]) -> dict[str, Any] | None:
    try:
        found = json.loads(line.decode())
        return found if all(isinstance(found[name], int) for name in integers) else None
    except (ValueError, TypeError, LookupError, RecursionError):
        return None


@contextmanager
def naming(file: Path | str) -> Iterator[None]:
    """Names the file in errors of writing it, such as a full disk's, which have no name."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(file)) from error


def write_whole(file: Path, text: str | Iterable[str]) -> None:
    """Writes a text, or its parts as they come, to a file atomically.

    A reader sees the old content or the new, after a power cut too.
    """
    beside = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        with naming(file), beside.open("w", encoding="utf-8") as stream:
            stream.writelines([text] if isinstance(text, str) else text)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(beside, file)
    except BaseException:
        with suppress(OSError):
            beside.unlink()
        raise


# Errors of file systems without locks.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@contextmanager
def removed_if_empty(folder: Path) -> Iterator[None]:
    """Removes a folder at the end, and those above it, if not there before and empty."""
    made = [place for place in (folder, *folder.parents) if not os.path.lexists(place)]
    try:
        yield
    finally:
        with suppress(OSError):  # raised unless the folder is empty
            for place in made:
                place.rmdir()


def hold(folder: Path, stack: ExitStack, flag: str, taken: str, path: Path | None = None) -> None:
    """Holds a lock file, which names this process, until the stack closes.

    Args:
      folder: what is locked; a folder is made.
      flag: names it in messages.
      taken: what to say if {holder} holds it.
      path: of the lock file; None: `lock` in the folder.

    Raises:
      UserError: another process holds it, or it cannot be written.
    """
    path = folder / "lock" if path is None else path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = stack.enter_context(locked(path, wait=False))
        os.truncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
    except BlockingIOError:
        holder = path.read_text(errors="replace") or "another process"
        raise UserError(f"{flag}: {folder} {taken.format(holder=holder)}") from None
    except OSError as error:
        raise UserError(f"{flag}: {folder} cannot be written ({error})") from None


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
