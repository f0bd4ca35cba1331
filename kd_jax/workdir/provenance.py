"""Provenance of a run: versions of the packages, commit of the code, devices."""

import os
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax

PACKAGES = (
    "kd-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "safetensors", "grain",
    "transformers", "numpy",
)  # fmt: skip


def describe_start(step: int) -> dict[str, Any]:
    """Returns what a start of a run after `step` updates runs on, for the record of the run."""
    return {
        "step": step,
        "versions": versions(),
        "devices": _devices(),
        "git_commit": _git_commit(),
    }


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
