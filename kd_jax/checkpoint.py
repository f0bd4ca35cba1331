"""Checkpoints through Orbax v1: trained arrays, optimizer state and step; never the frozen base."""

import errno
import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from kd_jax.config import Config, UserError
from kd_jax.config.record import differences, dump, from_json
from kd_jax.losses.hidden import PROJECTION
from kd_jax.training.step import TrainState
from kd_jax.weights.files import write_whole

PACKAGES = (
    "kd-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "safetensors", "grain",
    "transformers", "numpy",
)  # fmt: skip


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
    checkpointer: ocp.training.Checkpointer, state: TrainState, step: int, eval_loss: float | None
) -> None:
    """Starts to write the state after `step` updates, unless that step is there already."""
    if checkpointer.latest is not None and checkpointer.latest.step == step:
        return
    metrics = None if eval_loss is None else {"eval_loss": eval_loss}
    checkpointer.save_async(step, state._asdict(), force=True, metrics=metrics)


def restore(checkpointer: ocp.training.Checkpointer, like: TrainState) -> TrainState | None:
    """Returns the latest state, laid out like `like`, or None where no checkpoint was finished."""
    if checkpointer.latest is None:
        return None
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like._asdict()
    )
    return TrainState(**checkpointer.load(checkpointer.latest.step, abstract))


def load_trained(workdir: Path, step: int | None = None) -> tuple[dict[str, np.ndarray], int]:
    """Returns the student's arrays in a checkpoint by dotted path, and its step; None: the latest.

    What is trained beside the student, the hidden-state loss's projection, is not read.
    """
    folder = workdir.absolute() / "checkpoints"
    if not folder.is_dir():
        raise UserError(f"{workdir}: expected a folder of kd_jax.train, got no checkpoints in it")
    with ocp.training.Checkpointer(folder) as checkpointer:
        steps = sorted(checkpoint.step for checkpoint in checkpointer.checkpoints)
        if not steps:
            raise UserError(f"{folder}: holds no finished checkpoint")
        step = steps[-1] if step is None else step
        if step not in steps:
            known = ", ".join(map(str, steps))
            raise UserError(f"--step: expected one of {known} (those in {folder}), got {step}")
        saved = checkpointer.metadata(step).metadata
        abstract = jax.tree.map(lambda _: ocp.PLACEHOLDER, saved)
        abstract["trainable"] |= {
            name: np.empty(leaf.shape, leaf.dtype)
            for name, leaf in saved["trainable"].items()
            if name != PROJECTION
        }
        loaded = checkpointer.load(step, abstract)["trainable"]
        return {name: x for name, x in loaded.items() if name != PROJECTION}, step


def claim_workdir(config: Config, workdir: Path, inputs: dict[str, str], num_steps: int) -> None:
    """Writes WORKDIR/config.json, or checks that the one there describes the same run.

    Args:
      inputs: a hash of the content of each thing that the run reads, by what it is.
      num_steps: optimizer steps, which `epochs` alone does not tell.

    Raises:
      UserError: the folder belongs to a run with another configuration or other inputs, or cannot
        be written.
    """
    record = {
        "config": dump(config),
        "inputs": inputs,
        "num_steps": num_steps,
        "versions": versions(),
        "devices": _devices(),
        "git_commit": _git_commit(),
    }
    path = workdir / "config.json"
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        if path.is_file() and _has_checkpoint(workdir):
            old = json.loads(path.read_text())
            changed = differences(old["config"], dump(config))
            changed += _changed_inputs(old["inputs"], inputs)
            if changed:
                raise UserError(
                    f"{workdir}: belongs to a run with another configuration:\n  "
                    + "\n  ".join(changed)
                    + "\nGive another --workdir, or the old values"
                )
        write_whole(path, json.dumps(record, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"--workdir: {workdir} cannot be written ({error})") from None
    except (json.JSONDecodeError, KeyError) as error:
        raise UserError(f"{path}: not written by kd_jax.train ({error!r})") from None


def _changed_inputs(old: dict[str, str], new: dict[str, str]) -> list[str]:
    names = sorted(old.keys() | new.keys())
    return [
        f"{name}: other content than the run began with"
        for name in names
        if old.get(name) != new.get(name)
    ]


def check_inputs(workdir: Path, inputs: dict[str, str]) -> None:
    """Raises UserError where something that the run read has another content by now."""
    old = json.loads((workdir / "config.json").read_text())["inputs"]
    changed = _changed_inputs({name: old.get(name, "") for name in inputs}, inputs)
    if changed:
        raise UserError(f"{workdir}: " + "\n".join(changed))


def _has_checkpoint(workdir: Path) -> bool:
    return any(entry.name.isdigit() for entry in workdir.glob("checkpoints/*"))


def read_run(workdir: Path) -> Config:
    """Returns the configuration that a run was started with."""
    path = workdir / "config.json"
    try:
        return from_json(json.loads(path.read_text())["config"])
    except FileNotFoundError:
        raise UserError(
            f"{workdir}: expected a folder of kd_jax.train, got no config.json"
        ) from None
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not written by kd_jax.train ({error!r})") from None


def is_run(folder: Path) -> bool:
    """Tells whether a folder is the workdir of a run rather than a model."""
    return (folder / "checkpoints").is_dir()


def versions() -> dict[str, str]:
    """Returns the versions of the packages that a run computes with."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def _devices() -> str:
    """Returns how many devices of what kind run, such as `8 x NVIDIA H200`."""
    kind = jax.devices()[0].device_kind
    if kind == "cpu":
        kind = f"cpu (on {os.cpu_count()} cores)"
    return f"{jax.device_count()} x {kind}"


def _git_commit() -> str | None:
    """Returns the commit of the code that runs, with `-dirty` where files differ from it."""
    command = [
        "git",
        "-C",
        str(Path(__file__).parent),
        "describe",
        "--always",
        "--dirty",
        "--abbrev=40",
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
