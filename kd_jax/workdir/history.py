"""Finished and unfinished runs, read from their workdirs. Needs no jax."""

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kd_jax.config import Config, UserError
from kd_jax.config.errors import did_you_mean, raise_all
from kd_jax.config.record import dump, flatten, from_json
from kd_jax.weights.files import read_json

if TYPE_CHECKING:
    import pandas as pd

# Files of a run that was killed before it wrote config.json, and of the file system.
_STARTED = re.compile(
    r"lock|checkpoints(/\d+\.orbax-checkpoint-tmp.*)?|\.config\.json\..*\.tmp|lost\+found"
)

MOVABLE_STUDENT = "student.path of the run (--student-path, if it has moved)"
"""Names a finished run's student in errors."""

NEUTRAL = re.compile(
    r"workdir|data\.cache_dir|compilation_cache|eval\.every_steps|(log|checkpoint)\..*"
)
"""Fields that change neither what a run learns nor what it costs."""

PROVENANCE = ("versions", "devices", "git_commit")
"""Entries of a record about each start."""

NEEDED = {
    "loss", "step_seconds", "tokens_per_second", "target_tokens_per_second", "peak_memory_bytes",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """A workdir: its configuration and its metrics, float64 by step and name."""

    folder: Path
    record: dict[str, Any]
    """Contents of config.json."""
    config: Config
    train: "pd.DataFrame"
    """Metrics of the logged steps, NaN where a step lacks one."""
    held_out: "pd.DataFrame"
    """Metrics of the evaluations during training, with the names of kd_jax.evaluate."""
    evaluation: dict[str, Any]
    """Contents of evaluation.json; empty without that file."""

    @property
    def num_steps(self) -> int:
        return self.record["num_steps"]

    @property
    def last_step(self) -> int:
        return int(self.train.index[-1])

    @property
    def finished(self) -> bool:
        every = self.config.log.every_steps
        return self.last_step >= self.num_steps // every * every

    @property
    def status(self) -> str:
        if self.finished:
            return "finished"
        return f"unfinished at step {self.last_step} of {self.num_steps}"

    @property
    def num_starts(self) -> int:
        """Returns the number of starts; of an earlier version's run that of TensorBoard's files."""
        files = self.folder.glob("tensorboard/events.out.tfevents.*")
        return len(self.record.get("starts") or list(files))


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Returns the runs in `folders`.

    Raises:
      UserError: lists every problem of every folder, and runs that repeat another run.
    """
    runs: dict[str, Run] = {}
    problems = []
    for folder in folders:
        try:
            run = read_run(folder.expanduser())
        except UserError as error:
            problems.append(str(error))
            continue
        first = runs.setdefault(_settings_and_inputs(run), run)
        if first is run:
            continue
        if first.folder.resolve() == run.folder.resolve():
            problems.append(f"{folder}: given twice. Name each run once")
        else:
            problems.append(
                f"{run.folder}: expected another configuration or seed than {first.folder} has, "
                "got the same. Leave out one of them"
            )
    raise_all(problems)
    return list(runs.values())


def _settings_and_inputs(run: Run) -> str:
    """Returns a text that is equal for runs with the same configuration, seed and inputs."""
    config = flatten(run.record["config"])
    settings = {name: identity(x) for name, x in config.items() if not NEUTRAL.fullmatch(name)}
    return json.dumps([settings, run.record["inputs"]], sort_keys=True)


def identity(value: Any) -> str:
    """Returns a text that is equal for equal values, such as 1 in a file and 1.0 from a flag."""
    number = isinstance(value, int) and not isinstance(value, bool)
    return json.dumps(float(value) if number else value)


def read_run(folder: Path) -> Run:
    """Returns the run in `folder`; raises UserError for another folder and without metrics."""
    if not folder.is_dir():
        siblings = folder.parent.glob("*/")
        hint = did_you_mean(folder.name, (path.name for path in siblings), f"{folder.parent}/")
        raise UserError(f"{folder}: expected a workdir of kd_jax.train, got no folder.{hint}")
    if not any(folder.iterdir()):
        raise UserError(f"{folder}: expected a workdir of kd_jax.train, got an empty folder")
    record = read_record(folder / "config.json")
    train, held_out = _read_metrics(folder / "metrics.jsonl")
    return Run(
        folder=folder, record=record, config=from_json(record["config"]), train=train,
        held_out=held_out, evaluation=_read_evaluation(folder / "evaluation.json"),
    )  # fmt: skip


def _read_evaluation(path: Path) -> dict[str, Any]:
    """Returns evaluation.json, {} without one; raises UserError unless kd_jax.evaluate wrote it."""
    if not path.is_file():
        return {}
    evaluation = read_json(path)
    arguments = evaluation.get("arguments", {})
    sound = isinstance(arguments, dict) and isinstance(arguments.get("teacher_cache"), str | None)
    sound = sound and not any(isinstance(value, str) for value in evaluation.values())
    if not sound or not isinstance(evaluation.get("ce"), int | float):
        raise UserError(f"{path}: not written by kd_jax.evaluate. Remove it, or evaluate again")
    return evaluation


def read_config(workdir: Path, student_path: str | None = None) -> Config:
    """Returns the configuration that a run was started with.

    Args:
      student_path: the student's folder where it is now; None: where the run had it.
    """
    config = from_json(read_record(workdir / "config.json")["config"])
    if student_path is None:
        return config
    return replace(config, student=replace(config.student, path=student_path))


def list_starts(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns `versions`, `devices` and `git_commit` of each start of a run, and its first `step`.

    A record of an earlier version has those of its last start alone, whose step is None.
    """
    known = {name: record.get(name) for name in PROVENANCE}
    return record.get("starts") or [{"step": None, **known}]


def read_record(path: Path) -> dict[str, Any]:
    """Returns config.json with every field and num_steps; raises UserError unless kd_jax.train
    wrote it."""
    if not path.is_file():
        raise UserError(f"{path.parent}: expected a workdir of kd_jax.train, got no config.json")
    record = read_json(path)
    parts = [record.get(part) for part in ("config", "inputs", "versions")]
    try:
        sound = all(isinstance(part, dict) for part in parts)
        sound &= all(map(_is_start, record.get("starts", [])))
        config = dump(from_json(record["config"]))
        num_steps = record.get("num_steps", config["steps"])
        if not sound or not isinstance(num_steps, int):
            raise TypeError
    except (UserError, KeyError, TypeError, ValueError, AttributeError):
        message = (
            f"{path}: not written by kd_jax.train of this version; {path.parent} is no workdir"
        )
        raise UserError(message) from None
    return record | {"config": config, "num_steps": num_steps}


def _is_start(tree: dict[str, Any]) -> bool:
    known = {"step", *PROVENANCE} <= tree.keys()
    return known and isinstance(tree["step"], int | None) and isinstance(tree["versions"], dict)


def find_checkpoints(workdir: Path) -> dict[int, Path]:
    """Returns the finished checkpoints by step, the latest last; also what only has such a name."""
    found = [x for x in workdir.absolute().glob("checkpoints/*") if x.name.isdecimal()]
    return {int(x.name): x for x in sorted(found, key=lambda x: int(x.name))}


def check_no_foreign_files(folder: Path, own: Sequence[Path] = ()) -> None:
    """Raises UserError unless the folder is absent, empty, or a workdir of kd_jax.train.

    Args:
      own: folders of the run that may be inside, such as the row cache.
    """
    wanted = "--workdir: expected a new or empty folder, or a workdir of kd_jax.train"
    if not os.path.exists(folder):
        return
    if not folder.is_dir():
        raise UserError(f"{wanted}, got {folder}, which is a file. Give another --workdir")
    try:
        if (folder / "config.json").exists():
            read_record(folder / "config.json")
            return
        others = _others(folder, own)
    except UserError as error:
        raise UserError(f"{error}. Give another --workdir, or restore the file") from None
    except OSError as error:
        raise UserError(f"--workdir: {folder} cannot be read ({error})") from None
    if any(name.removeprefix("checkpoints/").isdecimal() for name in others):
        raise UserError(
            f"{folder}: holds checkpoints but no config.json, so their configuration is unknown. "
            "Give another --workdir, or restore the file"
        )
    if others:
        shown = ", ".join(others[:3]) + (", ..." if len(others) > 3 else "")
        raise UserError(f"{wanted}, got {folder}, which holds {shown}. Give another --workdir")


def _others(folder: Path, own: Sequence[Path]) -> list[str]:
    """Returns names in a folder that a run, killed before it wrote config.json, did not leave."""
    kept = {part for path in own for part in (path.resolve(), *path.resolve().parents)}
    found = [*folder.iterdir(), *folder.glob("checkpoints/*")]
    names = {str(x.relative_to(folder)) for x in found if x.resolve() not in kept}
    return sorted(name for name in names if not _STARTED.fullmatch(name))


def is_workdir(folder: Path) -> bool:
    """Returns True for a folder of kd_jax.train's that is not empty."""
    try:
        check_no_foreign_files(folder)
    except UserError:
        return False
    return folder.is_dir() and any(folder.iterdir())


def is_run(folder: Path) -> bool:
    """Returns True for the workdir of a run, also a damaged one; False for a model."""
    if (folder / "checkpoints").is_dir():
        return not any(folder.glob("*.safetensors"))
    return (folder / "config.json").is_file() and is_workdir(folder)


def _read_metrics(path: Path) -> tuple["pd.DataFrame", "pd.DataFrame"]:
    """Returns the training steps and the evaluations, without a last line that a kill cut off."""
    lines = path.read_text(errors="replace").splitlines() if path.is_file() else []
    train: list[dict[str, Any]] = []
    held_out: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        try:
            values = json.loads(line)
        except ValueError:
            if number == len(lines):
                break
            raise UserError(f"{path}:{number}: expected a JSON object, got {line:.40}") from None
        if not isinstance(values, dict) or not isinstance(values.get("step"), int):
            raise UserError(f"{path}:{number}: not written by kd_jax.train, got {line:.40}")
        (train if "loss" in values else held_out).append(values)
    if not train:
        raise UserError(
            f"{path.parent}: expected metrics of at least one step, got none yet. Wait, or leave "
            "the run out"
        )
    frame = _frame(train)
    if missing := NEEDED - set(frame):
        raise UserError(f"{path}: not written by kd_jax.train: no {', '.join(sorted(missing))}")
    return frame, _frame(held_out).rename(columns=lambda name: name.removeprefix("eval/"))


def _frame(lines: list[dict[str, Any]]) -> "pd.DataFrame":
    """Returns the numbers of metrics.jsonl's lines by step, float64; the last line of a step."""
    import pandas as pd

    frame = pd.DataFrame(lines, index=[line["step"] for line in lines])
    return frame.select_dtypes("number").astype(float)[~frame.index.duplicated(keep="last")]
