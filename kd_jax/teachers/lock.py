"""The lock of a teacher's cache: one command writes at a time, others may read."""

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from kd_jax.config import UserError
from kd_jax.parallel.processes import on_first
from kd_jax.teachers.storage import is_remote, local_folder
from kd_jax.weights.files import hold, removed_if_empty

_OWN = re.compile(r"lock|(manifest\.json|cost\.json|part\d+)(\.__lock)?|lost\+found")


@contextmanager
def lock_cache(path: str, flag: str) -> Iterator[None]:
    """Makes a local cache's folder and keeps other commands from writing; process 0 has the lock.

    An object store has no locks.

    Raises:
      UserError: the folder has other files, another command writes it, or it cannot be written.
    """
    if is_remote(path):
        yield
        return
    folder = local_folder(path)
    with removed_if_empty(folder), ExitStack() as stack:
        on_first("cache/lock", lambda: _lock(folder, stack, flag))
        yield


def _lock(folder: Path, stack: ExitStack, flag: str) -> None:
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
    hold(folder, stack, flag, "is being written by {holder}. Wait for it or stop it")
