"""Checkpoints through Orbax v1: trained arrays, optimizer state and step; no frozen weights."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from orbax.checkpoint import v1 as ocp

from kd_jax.config import UserError
from kd_jax.weights.orbax import OrbaxArrays, absl_silent


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
    except ValueError as error:  # tensorstore's form of a full disk
        if "No space left on device" not in str(error):
            raise
        raise OSError(errno.ENOSPC, "no space left for the next checkpoint", str(folder)) from error


def save(
    checkpointer: ocp.training.Checkpointer, state: Any, step: int, eval_loss: float | None
) -> None:
    """Starts to write the state after `step` updates, unless that step is already saved.

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
    checkpointer.save_async(step, state._asdict(), force=True, metrics=metrics)


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


def restore(checkpointer: ocp.training.Checkpointer, abstract: Any) -> Any:
    """Returns the latest state, with the type, dtypes and shardings of `abstract`."""
    assert checkpointer.latest is not None
    saved = checkpointer.load(checkpointer.latest.step, abstract._asdict())
    return type(abstract)(**saved)


@dataclass(frozen=True, kw_only=True, slots=True)
class Trained(OrbaxArrays):
    """The student's trained arrays in one checkpoint, read on demand."""

    step: int


STUDENT = ("trainable", "student")  # where the student's arrays are in a checkpoint's tree


def open_trained(workdir: Path, step: int | None = None) -> Trained:
    """Opens a run's checkpoint, the latest for None, without reading its arrays.

    Raises:
      UserError: the workdir has no finished checkpoint, or none of this step.
    """
    folder = workdir.absolute() / "checkpoints"
    if not folder.is_dir():
        raise UserError(f"{workdir}: expected a workdir of kd_jax.train, got no checkpoints in it")
    with ocp.training.Checkpointer(folder) as checkpointer:
        places = {found.step: found.path for found in checkpointer.checkpoints}
    if not places:
        raise UserError(f"{folder}: holds no finished checkpoint")
    step = max(places) if step is None else step
    if step not in places:
        known = ", ".join(map(str, sorted(places)))
        raise UserError(f"--step: expected one of {known} (those in {folder}), got {step}")
    saved = ocp.metadata(places[step]).metadata
    for key in STUDENT:
        saved = saved[key]
    return Trained(place=places[step], saved=saved, parents=STUDENT, step=step)
