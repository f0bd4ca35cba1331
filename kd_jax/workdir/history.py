"""Workdirs of runs as they are on disk. Needs no jax."""

import difflib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kd_jax.config import UserError
from kd_jax.config.record import flatten
from kd_jax.weights.files import read_json

Columns = dict[str, np.ndarray]


NEEDED = {
    "step", "loss", "step_seconds", "tokens_per_second", "target_tokens_per_second",
    "peak_memory_bytes",
}  # fmt: skip


COMPARED = ("data", "split", "teacher", "dtype", "top_k")


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """A workdir: its configuration, and its metrics by name over the steps that were logged."""

    folder: Path
    record: dict[str, Any]
    """What config.json holds."""
    train: Columns
    held_out: Columns
    """The evaluations during training, by the names of kd_jax.evaluate."""
    evaluation: dict[str, float]
    """The numbers of evaluation.json; empty where there is none."""
    evaluated_with: dict[str, Any]
    """The arguments beside them that must agree for numbers to be compared."""
    num_starts: int | None
    """How often training was started, from the files of TensorBoard; None without them."""

    @property
    def seed(self) -> int:
        return self.record["config"]["seed"]

    @property
    def num_steps(self) -> int | None:
        """The steps that the run is to take, where that was recorded."""
        return self.record.get("num_steps") or self.record["config"]["steps"]

    @property
    def last_step(self) -> int:
        return int(self.train["step"][-1])

    @property
    def finished(self) -> bool:
        every = self.record["config"]["log"]["every_steps"]
        return self.num_steps is None or self.last_step >= self.num_steps // every * every

    @property
    def distils(self) -> bool:
        config = self.record["config"]
        loss = config["loss"]
        highest = max(loss["kd_ratio"], loss.get("kd_ratio_end") or 0)
        return config["teacher"] is not None and highest > 0

    @property
    def status(self) -> str:
        if self.finished:
            return "finished"
        return f"unfinished at step {self.last_step} of {self.num_steps}"


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Returns the runs in `folders`.

    Raises:
      UserError: with everything that is wrong with any of the folders.
    """
    runs: list[Run] = []
    problems, seen = [], set()
    for folder in folders:
        place = folder.expanduser().resolve()
        try:
            if place in seen:
                raise UserError(f"{folder}: given twice. Name each run once")
            seen.add(place)
            runs.append(read_run(folder.expanduser()))
        except UserError as error:
            problems.append(str(error))
    problems += _repeated(runs)
    if problems:
        raise UserError("\n".join(problems))
    return runs


def _repeated(runs: Sequence[Run]) -> list[str]:
    """Returns a problem for each run that only repeats another: it would count as a seed."""
    first: dict[str, Path] = {}
    problems = []
    for run in runs:
        config = flatten(run.record["config"])
        settings = {name: identity(x) for name, x in config.items() if name != "workdir"}
        key = json.dumps([settings, run.record["inputs"]], sort_keys=True)
        if key in first:
            problems.append(
                f"{run.folder}: expected another configuration or seed than {first[key]} has, got "
                "the same. Leave one of them out"
            )
        first.setdefault(key, run.folder)
    return problems


def read_run(folder: Path) -> Run:
    """Returns the run in `folder`; raises UserError where there is none or it has no metrics."""
    if not folder.is_dir():
        near = _nearest(folder)
        raise UserError(f"{folder}: expected a workdir of kd_jax.train, got no folder.{near}")
    if not any(folder.iterdir()):
        raise UserError(f"{folder}: expected a workdir of kd_jax.train, got an empty folder")
    record = _read_record(folder / "config.json")
    train, held_out = _read_metrics(folder / "metrics.jsonl")
    path = folder / "evaluation.json"
    evaluation = read_json(path) if path.is_file() else {}
    arguments = evaluation.get("arguments", {})
    events = len(list(folder.glob("tensorboard/events.out.tfevents.*")))
    return Run(
        folder=folder,
        record=record,
        train=train,
        held_out=held_out,
        evaluation=_numbers(evaluation),
        evaluated_with={name: arguments[name] for name in COMPARED if name in arguments},
        num_starts=events or None,
    )


def completion(folder: Path) -> bool | None:
    """Tells whether a run has its last step's metrics and checkpoint; None where no one can tell.

    Raises:
      UserError: the folder's files were written by something else.
    """
    if not (folder / "config.json").is_file():
        return False
    record = _read_record(folder / "config.json")
    num_steps = record.get("num_steps") or record["config"]["steps"]
    if num_steps is None:
        return None
    saved = (folder / "checkpoints" / str(num_steps)).is_dir()
    return saved and read_run(folder).finished


def _nearest(folder: Path) -> str:
    if not folder.parent.is_dir():
        return ""
    names = [path.name for path in folder.parent.iterdir() if path.is_dir()]
    near = difflib.get_close_matches(folder.name, names, 1)
    return f" Did you mean {folder.parent / near[0]}?" if near else ""


def _read_record(path: Path) -> dict[str, Any]:
    """Returns what claim_workdir wrote; raises UserError where something else did."""
    if not path.is_file():
        raise UserError(f"{path.parent}: expected a workdir of kd_jax.train, got no config.json")
    record = read_json(path)
    parts = {"config", "inputs", "versions"}
    foreign = UserError(f"{path}: not written by kd_jax.train; {path.parent} is no workdir")
    if not all(isinstance(record.get(part), dict) for part in parts):
        raise foreign
    config = record["config"]
    if not {"teacher", "student", "loss", "log", "steps", "seed"} <= config.keys():
        raise foreign
    return record


def _read_metrics(path: Path) -> tuple[Columns, Columns]:
    """Returns the training steps and the evaluations; a last line cut by a kill is left out."""
    lines = path.read_text(errors="replace").splitlines() if path.is_file() else []
    train, held_out = [], []
    for number, line in enumerate(lines, start=1):
        try:
            values = json.loads(line)
        except ValueError:
            if number == len(lines):
                break
            raise UserError(f"{path}:{number}: expected a JSON object, got {line:.40}") from None
        if not isinstance(values, dict) or not isinstance(values.get("step"), int):
            raise UserError(f"{path}:{number}: not written by kd_jax.train, got {line:.40}")
        if "loss" in values:
            train.append(values)
        else:
            held_out.append({name.removeprefix("eval/"): x for name, x in values.items()})
    if not train:
        raise UserError(
            f"{path.parent}: expected metrics of at least one step, got none yet. Wait, or leave "
            "the run out"
        )
    columns = _columns(train)
    missing = NEEDED - columns.keys()
    if missing:
        raise UserError(f"{path}: not written by kd_jax.train: no {', '.join(sorted(missing))}")
    return columns, _columns(held_out)


def _columns(lines: Sequence[dict[str, Any]]) -> Columns:
    """Returns float64 arrays [lines] by name, nan where a line lacks it."""
    names = {name: None for line in lines for name in _numbers(line)}
    return {
        name: np.array([_numbers(line).get(name, np.nan) for line in lines], np.float64)
        for name in names
    }


def _numbers(values: dict[str, Any]) -> dict[str, float]:
    return {name: x for name, x in values.items() if isinstance(x, (int, float))}


def identity(value: Any) -> str:
    """Returns what is equal for equal values; a file may say 1 where a flag says 1.0."""
    number = isinstance(value, int) and not isinstance(value, bool)
    return json.dumps(float(value) if number else value)
