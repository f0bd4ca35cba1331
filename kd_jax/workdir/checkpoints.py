"""Checkpoints through Orbax v1: trained arrays, optimizer state and step; never the frozen base."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from kd_jax.config import UserError
from kd_jax.weights.orbax import OrbaxArrays


@contextmanager
def open_checkpointer(workdir: Path, keep: int) -> Iterator[ocp.training.Checkpointer]:
    """Yields the checkpointer of a run; it keeps the latest `keep` and the best evaluated one.

    Raises:
      OSError: the disk is full; the checkpoints that were finished before are whole.
    """
    folder = workdir.absolute() / "checkpoints"
    policies = ocp.training.preservation_policies
    best = policies.BestN(
        get_metric_fn=lambda metrics: -metrics["eval_loss"],
        n=1,
        keep_checkpoints_without_metrics=False,
    )
    try:
        with ocp.training.Checkpointer(
            folder,
            preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(n=keep), best]),
            cleanup_tmp_directories=True,
        ) as checkpointer:
            yield checkpointer
    except ValueError as error:  # how the storage library reports it
        if "No space left on device" not in str(error):
            raise
        raise OSError(errno.ENOSPC, "no space left for the next checkpoint", str(folder)) from error


def save(
    checkpointer: ocp.training.Checkpointer, state: Any, step: int, eval_loss: float | None
) -> None:
    """Starts to write the state after `step` updates, unless that step is there already."""
    if checkpointer.latest is not None and checkpointer.latest.step == step:
        return
    metrics = None if eval_loss is None else {"eval_loss": eval_loss}
    checkpointer.save_async(step, state._asdict(), force=True, metrics=metrics)


def restore(checkpointer: ocp.training.Checkpointer, like: Any) -> Any:
    """Returns the latest state, of the type and laid out as `like`; None where there is none."""
    if checkpointer.latest is None:
        return None
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like._asdict()
    )
    return type(like)(**checkpointer.load(checkpointer.latest.step, abstract))


@dataclass(frozen=True, kw_only=True, slots=True)
class Trained(OrbaxArrays):
    """The student's trained arrays in one checkpoint, read on demand."""

    step: int


STUDENT = (
    "trainable",
    "student",
)  # keys of the dict in a checkpoint's tree that holds the student's arrays


def open_trained(workdir: Path, step: int | None = None) -> Trained:
    """Opens a run's checkpoint, the latest for None, without reading its arrays.

    Raises:
      UserError: the workdir has no finished checkpoint, or none of this step.
    """
    folder = workdir.absolute() / "checkpoints"
    if not folder.is_dir():
        raise UserError(f"{workdir}: expected a folder of kd_jax.train, got no checkpoints in it")
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
