"""WORKDIR/config.json: what a run is, and whether a workdir belongs to it."""

import json
import os
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import jax

from kd_jax.config import Config, UserError
from kd_jax.config.record import differences, dump, from_json
from kd_jax.weights.files import write_whole

PACKAGES = (
    "kd-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "safetensors", "grain",
    "transformers", "numpy",
)  # fmt: skip


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
