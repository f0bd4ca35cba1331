"""Whole and damaged checkpoints: a file in each has the hashes of all others. Needs no jax."""

import json
import os
import threading
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

import xxhash

from kd_jax.config import UserError
from kd_jax.config.record import RESUMABLE, flatten
from kd_jax.parallel.processes import say
from kd_jax.weights.files import read_json, write_whole
from kd_jax.weights.hashes import hash_files
from kd_jax.workdir.history import find_checkpoints, read_record, read_run

SEAL = "kd_jax.json"

_sealing = threading.Lock()


def seal(checkpoint: Path) -> None:
    """Writes the hashes of a finished checkpoint's files and of its run's record, once."""
    # Retention may delete it meanwhile; without a seal it is valid too.
    with _sealing, suppress(OSError, UserError):
        if not (checkpoint / SEAL).is_file():
            tree = {"files": _hashes(checkpoint), "record": _facts(checkpoint.parents[1])}
            write_whole(checkpoint / SEAL, json.dumps(tree))


def _hashes(checkpoint: Path) -> dict[str, str]:
    files = sorted(x for x in checkpoint.rglob("*") if x.is_file() and x.parent / SEAL != x)
    names = [str(x.relative_to(checkpoint)) for x in files]
    return dict(zip(names, hash_files(files), strict=True))


def _facts(workdir: Path) -> dict[str, Any]:
    """Returns the entries of config.json about a run's results; {} without that file."""
    if not (workdir / "config.json").exists():
        return {}
    record = read_record(workdir / "config.json")
    fields = {x: y for x, y in flatten(record["config"]).items() if not RESUMABLE.fullmatch(x)}
    return fields | flatten(record["inputs"], "inputs.")


def hash_checkpoint(checkpoint: Path) -> str:
    """Returns a hash of every byte of a checkpoint."""
    return xxhash.xxh3_128_hexdigest(json.dumps(_hashes(checkpoint)).encode())


def damage(checkpoint: Path) -> str:
    """Returns the fault of a checkpoint's files; "" if they are those that were written."""
    try:
        read_json(checkpoint / "state" / "_METADATA")
    except UserError:
        return "state/_METADATA cannot be read"
    if not (checkpoint / SEAL).exists():  # killed before it was sealed, or of an older version
        return ""
    try:
        written = read_json(checkpoint / SEAL).get("files")
        assert isinstance(written, dict)
        found = _hashes(checkpoint)
    except (UserError, OSError, AssertionError):
        return f"{SEAL} cannot be read"
    wrong = sorted(name for name in written if found.get(name) != written[name])
    return "" if not wrong else f"{wrong[0]} is {'changed' if wrong[0] in found else 'missing'}"


def choose_checkpoint(workdir: Path, step: int | None = None) -> tuple[int, dict[int, str]]:
    """Returns the step of the latest whole checkpoint, and the damage of each later one.

    Args:
      step: the wanted one; None: the latest.

    Raises:
      UserError: there is none, none of this step or none whole, or it is of another run than
        config.json describes.
    """
    found = find_checkpoints(workdir)
    place = f"{workdir}/checkpoints"
    if not found:
        raise UserError(f"{place}: expected a finished checkpoint, got none")
    if step is not None and step not in found:
        known = ", ".join(map(str, found))
        raise UserError(f"--step: expected one of {known} (those in {place}), got {step}")
    damaged: dict[int, str] = {}
    for candidate in [step] if step is not None else reversed(found):
        wrong = damage(found[candidate])
        if not found[candidate].exists():  # a run that trains here has deleted it
            return choose_checkpoint(workdir, step)
        if wrong:
            damaged[candidate] = wrong
            continue
        _check_record(workdir, found[candidate])
        return candidate, damaged
    named = "; ".join(f"{x} ({wrong})" for x, wrong in damaged.items())
    raise UserError(
        f"{place}: expected a whole checkpoint, got a damaged one: {named}. Restore the files"
        + (", or give another --step" if step is not None and len(found) > 1 else "")
    )


def _check_record(workdir: Path, checkpoint: Path) -> None:
    """Raises UserError if config.json is of another run than a checkpoint."""
    if not (checkpoint / SEAL).exists():
        return
    old, new = read_json(checkpoint / SEAL).get("record"), _facts(workdir)
    sealed = old if isinstance(old, dict) else {}
    common = sorted(sealed.keys() & new.keys())
    changed = [f"{x}: {sealed[x]!r} -> {new[x]!r}" for x in common if sealed[x] != new[x]]
    if changed:
        raise UserError(
            f"{workdir / 'config.json'}: expected the record of the run that wrote {checkpoint}, "
            f"got another ({'; '.join(changed)}). Restore the file, or give another --workdir"
        )


def completion(workdir: Path) -> bool:
    """Returns True for a run with its last metrics and whole checkpoint.

    Raises:
      UserError: kd_jax.train did not write the folder's files.
    """
    if not (workdir / "config.json").is_file():
        return False
    record = read_record(workdir / "config.json")
    last = workdir / "checkpoints" / str(record["num_steps"])
    return last.is_dir() and not damage(last) and read_run(workdir).finished


def set_aside_damaged(workdir: Path) -> None:
    """Renames damaged checkpoints after the latest whole one: their steps will be saved again.

    Raises:
      UserError: no checkpoint is whole, or it is of another run.
    """
    if not find_checkpoints(workdir):
        return
    step, damaged = choose_checkpoint(workdir)
    for later, wrong in damaged.items():
        folder = find_checkpoints(workdir)[later]
        free = (folder.with_name(f"{later}.damaged{i}") for i in count(1))
        aside = next(x for x in free if not x.exists())
        os.rename(folder, aside)
        say(
            f"warning: {workdir}: the checkpoint after step {step} is damaged ({wrong}): it is now "
            f"checkpoints/{aside.name}, and its steps are trained again"
        )
