"""Metrics and profiles of the steps of a run."""

import math
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax

from kd_jax.config import Config, UserError
from kd_jax.parallel.placement import Arrays
from kd_jax.workdir import checkpoints
from kd_jax.workdir.metrics import Writer, peak_memory_bytes

BatchMetrics = dict[str, float | None]


def _read(metrics: Arrays) -> tuple[dict[str, float], float]:
    """Waits for a step; returns its metrics and when it ended."""
    values = {name: float(value) for name, value in jax.device_get(metrics).items()}
    return values, time.perf_counter()


class StepLog:
    """Metrics and profiling. Logs one step late, so that the device never waits for the host.

    A thread waits for each step's end: starting the next one may take the host until that is half
    done, as a GPU's loops of unknown length do.
    """

    def __init__(self, config: Config, writer: Writer, checkpointer: Any):
        self.config = config
        self.writer = writer
        self.checkpointer = checkpointer
        self.reader = ThreadPoolExecutor(1)
        self.pending: tuple[int, Future[tuple[dict[str, float], float]], BatchMetrics] | None = None
        self.profiling = False
        self.restart_clock()

    def restart_clock(self) -> None:
        self.clock = time.perf_counter()

    def add(self, step: int, metrics: Arrays, batch_metrics: BatchMetrics) -> None:
        """Stores this step's metrics and writes the previous step's.

        Args:
          batch_metrics: those of the source of batches; None: the step has no such metric.
        """
        self.flush()
        self.pending = (step, self.reader.submit(_read, metrics), batch_metrics)

    def flush(self) -> None:
        """Waits for the pending step and writes its metrics; raises UserError if not finite."""
        if self.pending is None:
            return
        step, reading, batch_metrics = self.pending
        self.pending = None
        values, end = reading.result()
        seconds, self.clock = end - self.clock, end
        if not all(math.isfinite(value) for value in values.values()):
            self._refuse(step, values)
        values = {name: x for name, x in (values | batch_metrics).items() if x is not None}
        values["target_tokens"] = int(values["target_tokens"])
        values |= {
            "tokens_per_second": values.pop("tokens") / seconds,
            "target_tokens_per_second": values["target_tokens"] / seconds,
            "step_seconds": seconds,
            "peak_memory_bytes": peak_memory_bytes(),
        }
        if step % self.config.log.every_steps == 0 or step == self.writer.num_steps:
            self.writer.write(step, values)

    def _refuse(self, step: int, values: dict[str, float]) -> None:
        shown = ", ".join(f"{name} {value:g}" for name, value in sorted(values.items()))
        raise UserError(
            f"step {step}: expected finite values, got {shown}. "
            f"{checkpoints.last_good(self.checkpointer)}. Lower optim.learning-rate, or check "
            "the data"
        )

    def profile(self, step: int) -> None:
        """Starts or stops the XLA profile at its first or last step."""
        first = self.config.log.profile_start
        if first is None:
            return
        if step == first:
            jax.profiler.start_trace(str(Path(self.config.workdir).expanduser() / "profile"))
            self.profiling = True
        if step == first + self.config.log.profile_steps:
            self.flush()
            self.stop_profile()
            self.restart_clock()

    def stop_profile(self) -> None:
        """Stops the XLA profile if one is running."""
        if self.profiling:
            jax.profiler.stop_trace()
            self.profiling = False

    def close(self) -> None:
        """Stops a running profile and the thread."""
        self.stop_profile()
        self.reader.shutdown()
