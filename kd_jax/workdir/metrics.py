"""Metrics of a run: written to metrics.jsonl, TensorBoard and the console."""

import json
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from kd_jax.config import LogConfig
from kd_jax.parallel.processes import say
from kd_jax.weights.files import naming, read_lines, write_whole

SHOWN = (
    "loss", "ce_loss", "kd_loss",
    "eval/loss", "eval/ce", "eval/kl_forward", "eval/top1_agreement",
)  # fmt: skip


def peak_memory_bytes() -> int:
    """Returns the peak memory of the fullest device, or on CPU the process's peak resident set."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    if peak := max(stat.get("peak_bytes_in_use", 0) for stat in stats):
        return peak
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class Writer:
    """Writes one record per step. A resumed run first drops the records after its checkpoint."""

    def __init__(self, workdir: Path, config: LogConfig, start_step: int, num_steps: int):
        self.every_steps = config.every_steps
        self.num_steps = num_steps
        self.file = self.events = self.bar = None
        if jax.process_index() > 0:
            return
        path = workdir / "metrics.jsonl"
        last_logged = start_step // config.every_steps * config.every_steps
        if keep_until(path, start_step) < last_logged:
            say(f"warning: {path}: lines of steps until {last_logged} are missing")
        self.file = path.open("a")
        if config.tensorboard:
            from tensorboard.summary.writer.event_file_writer import EventFileWriter

            self.events = EventFileWriter(str(workdir / "tensorboard"))
        if config.progress and sys.stderr.isatty():
            self.bar = _progress_bar(start_step, num_steps)
        self.printed = 0.0

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Writes the values of `step`, the number of updates taken."""
        if self.file is None:
            return
        with naming(self.file.name):
            self.file.write(json.dumps({"step": step, **values}) + "\n")
            self.file.flush()
        if self.events is not None:
            self.events.add_event(_make_event(step, values))
        self._show(step, values)

    def _show(self, step: int, values: dict[str, Any]) -> None:
        """Updates the progress bar, or prints every 10 s, every evaluation and the last step."""
        text = "  ".join(f"{name} {v:.4f}" for name, v in values.items() if name in SHOWN)
        rate = values.get("tokens_per_second")
        speed = {} if rate is None else {"speed": f"{rate:,.0f} tokens/s"}
        if self.bar is not None:
            self.bar.update(self.bar.task_ids[0], completed=step, text=text, **speed)
        elif time.monotonic() - self.printed > 10 or step == self.num_steps or rate is None:
            print("  ".join([f"step {step}/{self.num_steps}", text, *speed.values()]), flush=True)
            self.printed = time.monotonic()

    def close(self) -> None:
        for part in (self.file, self.events):
            if part is not None:
                part.close()
        if self.bar is not None:
            self.bar.stop()


class SampleWriter:
    """Writes samples as text to samples.jsonl; a resumed run first drops those of later steps."""

    def __init__(self, workdir: Path, start_step: int):
        self.path = workdir / "samples.jsonl"
        if jax.process_index() == 0:
            keep_until(self.path, start_step)

    def write(self, step: int, records: Sequence[dict[str, Any]]) -> None:
        """Writes samples on which `step`, the number of updates taken with it, trains first."""
        if jax.process_index() > 0:
            return
        lines = [json.dumps({"step": step, **record}, ensure_ascii=False) for record in records]
        with naming(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write("".join(f"{line}\n" for line in lines))


def _make_event(step: int, values: dict[str, Any]) -> Any:
    """Returns a step's values as a TensorBoard event."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary

    scalars = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
    return Event(wall_time=time.time(), step=step, summary=Summary(value=scalars))


def keep_until(path: Path, last_step: int) -> int:
    """Drops lines of a file after `last_step`, and damaged ones; returns the last step."""
    if not path.is_file():
        return 0
    lines = read_lines(path, ["step"])
    if torn := sum(record is None for _, record in lines):
        say(f"warning: {path}: {torn} damaged lines were dropped")
    kept = [(line, record["step"]) for line, record in lines if record]
    kept = [(line, step) for line, step in kept if step <= last_step]
    write_whole(path, "".join(f"{line}\n" for line, _ in kept))
    return max((step for _, step in kept), default=0)


def _progress_bar(start_step: int, num_steps: int):
    from rich import progress
    from rich.console import Console

    bar = progress.Progress(
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TextColumn("{task.fields[text]}  {task.fields[speed]}"),
        progress.TimeRemainingColumn(),
        console=Console(stderr=True),
    )
    bar.add_task("train", total=num_steps, completed=start_step, text="compiling", speed="")
    bar.start()
    return bar
