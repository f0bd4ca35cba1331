"""WORKDIR/lock: one command trains in a workdir at a time."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import jax

from kd_jax.config import UserError
from kd_jax.parallel.processes import is_first, together
from kd_jax.weights.files import hold, removed_if_empty
from kd_jax.workdir.history import check_no_foreign_files


@contextmanager
def lock_workdir(workdir: Path, own: Sequence[Path] = ()) -> Iterator[None]:
    """Makes the folder and keeps other commands from training in it; process 0 holds the lock.

    Args:
      own: folders of the run that may be inside a workdir without config.json.

    Raises:
      UserError: the folder is not empty and no workdir, another command trains in it, it cannot be
        written, or other processes of this run do not see it.
    """
    with removed_if_empty(workdir), ExitStack() as stack:
        together("lock", lambda: _lock(workdir, stack, own), first_alone=True)
        yield


def _lock(workdir: Path, stack: ExitStack, own: Sequence[Path]) -> None:
    if is_first():
        check_no_foreign_files(workdir, own)
        taken = "is in use by {holder}. Wait for it or stop it, or give another --workdir"
        hold(workdir, stack, "--workdir", taken)
    elif not (workdir / "lock").is_file():
        raise UserError(
            f"--workdir: expected a folder that all processes share, got {workdir}, in which "
            f"process {jax.process_index()} does not find the file of process 0"
        )
