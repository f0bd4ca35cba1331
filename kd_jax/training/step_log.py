"""Metrics and profiles of the steps of a run."""

import math
import time
from pathlib import Path
from typing import Any

import jax

from kd_jax.config import Config, UserError
from kd_jax.parallel.placement import Arrays
from kd_jax.workdir import checkpoints
from kd_jax.workdir.metrics import Writer, peak_memory_bytes

BatchMetrics = dict[str, float | None]


class StepLog:
    """Metrics and profiling. Logs one step late, so that the device never waits for the host."""

    def __init__(self, config: Config, writer: Writer, checkpointer: Any):
        self.config = config
        self.writer = writer
        self.checkpointer = checkpointer
        self.pending: tuple[int, Arrays, BatchMetrics] | None = None
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
        self.pending = (step, metrics, batch_metrics)

    def flush(self) -> None:
        """Waits for the pending step and writes its metrics; raises UserError if not finite."""
        if self.pending is None:
            return
        step, metrics, batch_metrics = self.pending
        self.pending = None
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        now = time.perf_counter()
        seconds, self.clock = now - self.clock, now
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
            self.close()

    def close(self) -> None:
        """Stops a running profile."""
        if self.profiling:
            jax.profiler.stop_trace()
            self.profiling = False
