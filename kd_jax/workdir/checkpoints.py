"""Checkpoints through Orbax v1: trained arrays, optimizer state and step; no frozen weights."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as ocp

from kd_jax.config import UserError
from kd_jax.config.errors import first_line
from kd_jax.parallel.processes import is_first, say
from kd_jax.weights.orbax import OrbaxArrays, absl_silent
from kd_jax.workdir.history import find_checkpoints
from kd_jax.workdir.integrity import choose_checkpoint, seal

_WRITE_ERRORS = (
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EIO,
)  # fmt: skip
KEPT = "kept"  # the arrays beside the state, in a checkpoint's tree


@contextmanager
def open_checkpointer(workdir: Path, keep: int) -> Iterator[ocp.training.Checkpointer]:
    """Yields the checkpointer of a run, which keeps the latest `keep` and the best evaluated one.

    Raises:
      OSError: a checkpoint cannot be written; those finished before it stay valid.
    """
    folder = workdir.absolute() / "checkpoints"
    policies = ocp.training.preservation_policies
    best = policies.BestN(
        get_metric_fn=lambda metrics: -metrics["eval_loss"],
        n=1,
        keep_checkpoints_without_metrics=False,
    )
    try:
        with (
            absl_silent(),  # a failed save logs the traceback of each of its threads
            ocp.training.Checkpointer(
                folder,
                preservation_policy=policies.AnyPreservationPolicy(
                    [policies.LatestN(n=keep), best]
                ),
                cleanup_tmp_directories=True,
            ) as checkpointer,
        ):
            yield checkpointer
            checkpointer.wait()
            if checkpointer.latest is not None and is_first():
                seal(folder / str(checkpointer.latest.step))
    except ValueError as error:  # tensorstore's error for any of them
        for number in _WRITE_ERRORS:
            if os.strerror(number) in str(error):
                how = f"{os.strerror(number)}, for the next checkpoint"
                raise OSError(number, how, str(folder)) from error
        raise


def save(
    checkpointer: ocp.training.Checkpointer,
    state: Any,
    step: int,
    eval_loss: float | None,
    kept: dict[str, np.ndarray] | None = None,
) -> None:
    """Starts to write the state after `step` updates, unless that step is already saved.

    Args:
      kept: more that a resumed run needs, the same in all processes.

    Raises:
      UserError: a trained weight is NaN or infinite; nothing is written.
    """
    if checkpointer.latest is not None and checkpointer.latest.step == step:
        return
    if not _all_finite(state.trainable):
        raise UserError(
            f"step {step}: expected finite weights after the update, got NaN or infinity. "
            f"{last_good(checkpointer)}. Lower optim.learning-rate, or check the data"
        )
    metrics = None if eval_loss is None else {"eval_loss": eval_loss}
    tree = state._asdict() | ({KEPT: kept} if kept else {})
    response = checkpointer.save_async(step, tree, force=True, metrics=metrics)
    if response is not None and is_first():
        response.on_complete(lambda _: seal(Path(checkpointer.directory) / str(step)))


@jax.jit
def _all_finite(trainable: Any) -> jax.Array:
    """Returns a bool scalar; compiled apart from the step, whose fast math folds some NaN to 0."""
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(trainable)]))


def last_good(checkpointer: ocp.training.Checkpointer) -> str:
    """Returns a sentence with the checkpoint to resume from, once pending writes have finished."""
    checkpointer.wait()
    latest = checkpointer.latest
    where = f"step {latest.step} in {checkpointer.directory}" if latest else "none was saved yet"
    return f"Last good checkpoint: {where}"


def restore(
    checkpointer: ocp.training.Checkpointer, abstract: Any
) -> tuple[Any, dict[str, np.ndarray]]:
    """Returns the latest state, with the type, dtypes and shardings of `abstract`, and what `save`
    was given beside it."""
    assert checkpointer.latest is not None
    step = checkpointer.latest.step
    try:
        with absl_silent():
            found = checkpointer.metadata(step).metadata.get(KEPT, {})
            kept = {name: np.empty(x.shape, x.dtype) for name, x in found.items()}
            tree = abstract._asdict() | ({KEPT: kept} if kept else {})
            saved = checkpointer.load(step, tree)
    except Exception as error:  # Orbax raises no narrower class for a damaged file
        reason = first_line(error.__cause__ or error)
        place = checkpointer.directory / str(step)
        raise UserError(
            f"{place}: cannot be read ({reason}). Rename it to resume from the checkpoint before it"
        ) from error
    kept = saved.pop(KEPT, {})
    return type(abstract)(**saved), kept


@dataclass(frozen=True, kw_only=True, slots=True)
class Trained(OrbaxArrays):
    """The student's trained arrays in one checkpoint, read on demand."""

    step: int


STUDENT = ("trainable", "student")  # where the student's arrays are in a checkpoint's tree


def open_trained(workdir: Path, step: int | None = None) -> Trained:
    """Opens a run's checkpoint, the latest for None, without reading its arrays.

    Raises:
      UserError: the workdir has no whole checkpoint, or none of this step.
    """
    step, damaged = choose_checkpoint(workdir, step)
    for later, wrong in damaged.items():
        say(f"warning: {workdir}: checkpoint {later} is damaged ({wrong}): step {step} is used")
    place = find_checkpoints(workdir)[step]
    try:
        saved = ocp.metadata(place).metadata
        for key in STUDENT:
            saved = saved[key]
    except Exception as error:  # Orbax raises no narrower class for a damaged file
        raise UserError(f"{place}: cannot be read ({first_line(error)})") from error
    return Trained(place=place, saved=saved, parents=STUDENT, step=step)
