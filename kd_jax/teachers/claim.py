"""The lock of a teacher's cache: one command writes at a time, others may read."""

import os
import re
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from kd_jax.config import UserError
from kd_jax.parallel.processes import is_first, together
from kd_jax.teachers.storage import is_remote, local_folder
from kd_jax.weights.files import locked

_OWN = re.compile(r"lock|(manifest\.json|part\d+)(\.__lock)?|lost\+found")


@contextmanager
def claimed(path: str, flag: str) -> Iterator[None]:
    """Makes a local cache's folder and keeps other commands from writing; process 0 has the lock.

    An object store has no locks.

    Raises:
      UserError: the folder has other files, another command writes it, or it cannot be written.
    """
    folder, made = local_folder(path), False
    with ExitStack() as stack:
        if not is_remote(path):
            made = is_first() and not os.path.lexists(folder)
            together("cache/lock", lambda: _lock(folder, stack, flag))
        try:
            yield
        finally:
            stack.close()
            if made:
                with suppress(OSError):  # raised unless the folder is empty
                    folder.rmdir()


def _lock(folder: Path, stack: ExitStack, flag: str) -> tuple[None, dict[str, str]]:
    if not is_first():
        return None, {}
    try:
        others = [x.name for x in folder.iterdir() if not _OWN.fullmatch(x.name)]
    except FileNotFoundError:
        others = []
    except OSError as error:
        raise UserError(f"{flag}: {folder} cannot be read ({error})") from None
    if others:
        raise UserError(
            f"{flag}: expected a new or empty folder, or one that kd_jax.cache wrote, got {folder} "
            f"with {others[0]}. Give another folder"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = stack.enter_context(locked(folder / "lock", wait=False))
        os.truncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
        return None, {}
    except BlockingIOError:
        holder = (folder / "lock").read_text(errors="replace") or "another process"
        raise UserError(
            f"{flag}: {folder} is being written by {holder}. Wait for it or stop it"
        ) from None
    except OSError as error:
        raise UserError(f"{flag}: {folder} cannot be written ({error})") from None
