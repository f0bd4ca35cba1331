"""The resume check, and WORKDIR/config.json, the record with which it compares.

kd_jax.train calls on all processes, in this order:

1. `lock.lock_workdir` refuses a folder of something else; process 0 makes it and writes `lock`.
2. `reuse_choices` reads the record: a run that resumes keeps what it chose for "auto".
3. `check_same_config` reads the record: the configuration must be the run's.
4. `integrity.set_aside_damaged` renames damaged checkpoints; on process 0.
5. `write_record`, with the hashes of the models: the configuration and the inputs must be the
   run's; process 0 writes the record.

Later commands read the configuration by `history.read_config`, and compare the files that they read
by `check_same_inputs`.
"""

import json
from pathlib import Path
from typing import Any

from kd_jax.config import Config, UserError
from kd_jax.config.record import differences, dump, keep_chosen
from kd_jax.weights.files import write_whole
from kd_jax.workdir.history import (
    check_no_foreign_files,
    find_checkpoints,
    list_starts,
    read_record,
)
from kd_jax.workdir.provenance import describe_start


def reuse_choices(config: Config, workdir: Path) -> Config:
    """Returns the config of a run that resumes with the choices that the run made for "auto"."""
    if not find_checkpoints(workdir):
        return config
    check_no_foreign_files(workdir)
    return keep_chosen(config, read_record(workdir / "config.json")["config"])


def check_same_config(config: Config, workdir: Path) -> dict[str, str]:
    """Returns the input hashes of the run in a workdir; {} before its first checkpoint.

    Raises:
      UserError: the folder belongs to a run with another configuration.
    """
    if not find_checkpoints(workdir):
        return {}
    check_no_foreign_files(workdir)
    old = read_record(workdir / "config.json")
    _refuse(workdir, differences(old["config"], dump(config)))
    return old["inputs"]


def write_record(
    config: Config, workdir: Path, inputs: dict[str, str], num_steps: int, step: int = 0
) -> None:
    """Writes WORKDIR/config.json, after a check that it describes the same run if there is one.

    The record has the configuration of the last start, the provenance of the first one, and that of
    each in `starts`.

    Args:
      inputs: a content hash of each input of the run, by config field.
      num_steps: optimizer steps, which `epochs` alone does not determine.
      step: updates that the run has already taken.

    Raises:
      UserError: the folder belongs to a run with another configuration or other inputs, or cannot
        be written.
    """
    old = check_same_config(config, workdir)
    if old:
        _refuse(workdir, _changed_inputs(old, inputs))
    starts = _starts(workdir, step, num_steps)
    first = {name: x for name, x in starts[0].items() if name != "step"}
    record = {"config": dump(config), "inputs": inputs, "num_steps": num_steps, **first}
    record["starts"] = starts
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        write_whole(workdir / "config.json", json.dumps(record, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"--workdir: {workdir} cannot be written ({error})") from None


def _starts(workdir: Path, step: int, num_steps: int) -> list[dict[str, Any]]:
    """Returns the provenance of each start that took steps which the run still has.

    Steps after the checkpoint that a run resumes from are taken again. A finished run takes none.
    """
    found = find_checkpoints(workdir)
    earlier = list_starts(read_record(workdir / "config.json")) if found else []
    earlier = [start for start in earlier if start["step"] is None or start["step"] < step]
    return earlier if earlier and step >= num_steps else [*earlier, describe_start(step)]


def check_same_inputs(workdir: Path, inputs: dict[str, str]) -> None:
    """Raises UserError if an input of the run has changed since the run began."""
    old = read_record(workdir / "config.json")["inputs"]
    changed = _changed_inputs({name: old.get(name, "") for name in inputs}, inputs)
    if changed:
        raise UserError(f"{workdir}: " + "\n".join(changed))


def _refuse(workdir: Path, changed: list[str]) -> None:
    if changed:
        raise UserError(
            f"{workdir}: belongs to a run with another configuration:\n  "
            + "\n  ".join(changed)
            + "\nGive another --workdir, or the old values"
        )


def _changed_inputs(old: dict[str, str], new: dict[str, str]) -> list[str]:
    problems = []
    for name in sorted(old.keys() | new.keys()):
        if name not in old:
            problems.append(f"{name}: expected none, since the run began without it, got one")
        elif old[name] != new.get(name):
            got = "other content" if name in new else "none"
            problems.append(f"{name}: expected the content that the run began with, got {got}")
    return problems
