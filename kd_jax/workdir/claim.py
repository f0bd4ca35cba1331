"""WORKDIR/config.json, the record of a run, and WORKDIR/lock, held by one command."""

import json
import os
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import jax

from kd_jax.config import Config, UserError
from kd_jax.config.record import differences, dump, from_json, keep_chosen
from kd_jax.parallel.processes import is_first, together
from kd_jax.weights.files import hold, removed_if_empty, write_whole
from kd_jax.workdir.history import check_workdir, find_checkpoints, read_record

PACKAGES = (
    "kd-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "safetensors", "grain",
    "transformers", "numpy",
)  # fmt: skip


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


def _lock(workdir: Path, stack: ExitStack, own: Sequence[Path]) -> tuple[None, dict[str, str]]:
    if not is_first():
        if not (workdir / "lock").is_file():
            raise UserError(
                f"--workdir: expected a folder that all processes share, got {workdir}, in which "
                f"process {jax.process_index()} does not find the file of process 0"
            )
        return None, {}
    check_workdir(workdir, own)
    taken = "is in use by {holder}. Wait for it or stop it, or give another --workdir"
    hold(workdir, stack, "--workdir", taken)
    return None, {}


def keep_choices(config: Config, workdir: Path) -> Config:
    """Returns the config of a run that resumes with the choices that the run made for "auto"."""
    if not find_checkpoints(workdir):
        return config
    check_workdir(workdir)
    return keep_chosen(config, read_record(workdir / "config.json")["config"])


def check_config(config: Config, workdir: Path) -> dict[str, str]:
    """Returns the input hashes of the run in a workdir; {} before its first checkpoint.

    Raises:
      UserError: the folder belongs to a run with another configuration.
    """
    if not find_checkpoints(workdir):
        return {}
    check_workdir(workdir)
    old = read_record(workdir / "config.json")
    _refuse(workdir, differences(old["config"], dump(config)))
    return old["inputs"]


def claim_workdir(config: Config, workdir: Path, inputs: dict[str, str], num_steps: int) -> None:
    """Writes WORKDIR/config.json, or checks that the existing one describes the same run.

    Args:
      inputs: a content hash of each input of the run, by config field.
      num_steps: optimizer steps, which `epochs` alone does not determine.

    Raises:
      UserError: the folder belongs to a run with another configuration or other inputs, or cannot
        be written.
    """
    old = check_config(config, workdir)
    if old:
        _refuse(workdir, _changed_inputs(old, inputs))
    record = {
        "config": dump(config),
        "inputs": inputs,
        "num_steps": num_steps,
        "versions": versions(),
        "devices": _devices(),
        "git_commit": _git_commit(),
    }
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        write_whole(workdir / "config.json", json.dumps(record, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"--workdir: {workdir} cannot be written ({error})") from None


def _refuse(workdir: Path, changed: list[str]) -> None:
    if changed:
        raise UserError(
            f"{workdir}: belongs to a run with another configuration:\n  "
            + "\n  ".join(changed)
            + "\nGive another --workdir, or the old values"
        )


def _changed_inputs(old: dict[str, str], new: dict[str, str]) -> list[str]:
    return [
        f"{name}: expected the content that the run began with, got other content"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)
    ]


def check_inputs(workdir: Path, inputs: dict[str, str]) -> None:
    """Raises UserError if an input of the run has changed since the run began."""
    old = read_record(workdir / "config.json")["inputs"]
    changed = _changed_inputs({name: old.get(name, "") for name in inputs}, inputs)
    if changed:
        raise UserError(f"{workdir}: " + "\n".join(changed))


def read_run(workdir: Path) -> Config:
    """Returns the configuration that a run was started with."""
    return from_json(read_record(workdir / "config.json")["config"])


def versions() -> dict[str, str]:
    """Returns the versions of the packages that affect a run's numbers."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def _devices() -> str:
    """Returns number and kind of the devices, such as `8 x NVIDIA H200`."""
    kind = jax.devices()[0].device_kind
    if kind == "cpu":
        kind = f"cpu (on {os.cpu_count()} cores)"
    return f"{jax.device_count()} x {kind}"


def _git_commit() -> str | None:
    """Returns the commit of this code, with `-dirty` after local changes."""
    where = str(Path(__file__).parent)
    command = ["git", "-C", where, "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
