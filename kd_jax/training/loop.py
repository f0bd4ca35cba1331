"""The training loop."""

import math
import time
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from kd_jax.config import Config, UserError
from kd_jax.config.record import dump, flatten
from kd_jax.data.batches import count_steps, train_batches
from kd_jax.inference import scores
from kd_jax.inference.evaluation import evaluate_rows
from kd_jax.losses.hidden import PROJECTION
from kd_jax.parallel.placement import local_rows, put_batch
from kd_jax.parallel.processes import is_first, say, stop_signal, together
from kd_jax.setup.inputs import load_rows, open_inputs
from kd_jax.setup.models import load_models
from kd_jax.setup.program import Arrays, make_program
from kd_jax.setup.runtime import start_jax
from kd_jax.setup.sources import (
    Source,
    check_adapter,
    shared_vocab_size,
    start_hashing,
    without_tokenizer,
)
from kd_jax.training.optim import make_optimizer, make_schedule
from kd_jax.training.step import init_state, jit_train_step, place_state
from kd_jax.workdir import checkpoints, record
from kd_jax.workdir.metrics import Writer, peak_memory_bytes


def train(config: Config) -> None:
    """Runs or resumes a run to its last step; SIGTERM saves and returns."""
    start_jax(config.compilation_cache)
    student, teacher, mesh = together("config", lambda: _inputs(config))
    hashing = start_hashing(student, teacher)
    vocab_size = shared_vocab_size(student, teacher)
    if config.trainable == "lora" and student.adapter is not None:
        check_adapter(student, config.lora)
    tokenizers = [model.tokenizer for model in (student, teacher) if model]
    rows, eval_rows = together("rows", lambda: _rows(config, *tokenizers), first_alone=True)
    student, teacher = without_tokenizer(student), teacher and without_tokenizer(teacher)
    num_steps = count_steps(rows, config)
    check_schedules(config, num_steps)
    workdir = Path(config.workdir).expanduser()
    together("workdir", lambda: (is_first() and record.check_config(config, workdir), {}))
    models = load_models(config, student, teacher, mesh)
    inputs = {"data.path": rows.key}
    together("inputs", lambda: _claim(config, workdir, inputs | hashing.result(), num_steps))
    program = make_program(config, models, vocab_size, mesh, num_steps)
    optimizer = make_optimizer(config.optim, num_steps)
    state = place_state(init_state(models.trainable, optimizer), mesh)
    with (
        stop_signal() as asks_to_stop,
        checkpoints.open_checkpointer(workdir, config.checkpoint.keep) as checkpointer,
        ExitStack() as stack,
    ):
        state = checkpoints.restore(checkpointer, state) or state
        step = int(state.step)
        say(f"resumed at step {step}" if step else describe_models(models))
        writer = stack.enter_context(closing(Writer(workdir, config.log, step, num_steps)))
        loop = stack.enter_context(closing(_Loop(config, num_steps, writer, checkpointer)))
        layout = jax.tree.map(lambda x: x.sharding, state)  # of every step, the resumed ones too
        run_step = jit_train_step(mesh, layout)
        batches = train_batches(
            rows,
            seed=config.seed,
            start_step=step,
            batch_size=config.data.batch_size,
            accumulation_steps=config.optim.accumulation_steps,
            wanted=local_rows(mesh, config.data.batch_size // config.optim.accumulation_steps),
        )
        frozen = (models.frozen, models.teacher_arrays)
        while step < num_steps and not asks_to_stop(step):
            loop.profile(step)
            batch = put_batch(next(batches), mesh)
            state, metrics = run_step(program, optimizer, state, *frozen, batch)
            step += 1
            loop.log(step, metrics)
            last = step == num_steps
            eval_loss = None
            if eval_rows is not None and (last or step % config.eval.every_steps == 0):
                loop.flush()
                arrays = models.frozen | state.trainable
                documents, _ = evaluate_rows(
                    program, mesh, arrays, models.teacher_arrays, eval_rows, config
                )
                values = scores.whole(documents)
                writer.write(step, {f"eval/{name}": value for name, value in values.items()})
                eval_loss = values["loss"]
                loop.restart_clock()
            if last or step % config.checkpoint.every_steps == 0:
                loop.flush()  # raises rather than save a state that is not finite
                checkpoints.save(checkpointer, state, step, eval_loss)
        loop.flush()
        if step < num_steps:
            checkpoints.save(checkpointer, state, step, None)
            say(f"stopped by SIGTERM at step {step}; the same command resumes")
            return
    say(f"done: python -m convert.to_hf --workdir {workdir} --out FOLDER exports the student")


def _inputs(config: Config) -> tuple[tuple[Source, Source | None, Mesh], dict[str, Any]]:
    """Returns what open_inputs does, and what of it all processes must have alike."""
    student, teacher, mesh = open_inputs(config)
    here = ("distributed", "log", "compilation_cache", "workdir")
    fields = {
        name: value
        for name, value in flatten(dump(config)).items()
        if name.split(".")[0] not in here and not name.endswith(("path", "adapter", "cache_dir"))
    }
    return (student, teacher, mesh), {**fields, **record.versions()}


def _rows(config: Config, *tokenizers: Any):
    rows, eval_rows = load_rows(config, *tokenizers)
    return (rows, eval_rows), {"data.path": rows.key, "eval.path": eval_rows and eval_rows.key}


def _claim(
    config: Config, workdir: Path, inputs: dict[str, str], num_steps: int
) -> tuple[None, dict[str, str]]:
    """Claims the workdir for all processes, whose inputs must have the same content."""
    if is_first():
        record.claim_workdir(config, workdir, inputs, num_steps)
    return None, inputs


def check_schedules(config: Config, num_steps: int) -> None:
    """Raises UserError for a schedule longer than the run; warns of what else is likely wrong."""
    if (config.loss.schedule_steps or 0) > num_steps:
        raise UserError(
            f"loss.schedule-steps: expected at most {num_steps}, the run's optimizer steps, got "
            f"{config.loss.schedule_steps}"
        )
    if config.optim.warmup_steps >= num_steps:
        say(
            f"warning: optim.warmup-steps {config.optim.warmup_steps} is not below the run's "
            f"{num_steps} steps: the learning rate never reaches its peak and its decay"
        )
    if config.distils and config.loss.warning:
        say(f"warning: {config.loss.warning}")


def describe_models(models) -> str:
    trained = sum(x.size for name, x in models.trainable.items() if name != PROJECTION)
    frozen = sum(x.size for x in models.frozen.values())
    teacher = sum(x.size for x in models.teacher_arrays.values())
    beside = f"teacher {teacher:,}" if teacher else "no teacher: the loss is the cross-entropy"
    projection = models.trainable.get(PROJECTION)
    if projection is not None:
        beside += f", projection {projection.size:,}"
    return (
        f"student {trained + frozen:,} parameters, {trained:,} of them trained; {beside}; compiling"
    )


class _Loop:
    """The loop's bookkeeping: logs one step late, so that the device never waits for the host."""

    def __init__(self, config: Config, num_steps: int, writer: Writer, checkpointer: Any):
        self.config = config
        self.writer = writer
        self.checkpointer = checkpointer
        self.schedule = make_schedule(config.optim, num_steps)
        self.pending: tuple[int, Arrays] | None = None
        self.profiling = False
        self.restart_clock()

    def restart_clock(self) -> None:
        self.clock = time.perf_counter()

    def log(self, step: int, metrics: Arrays) -> None:
        """Keeps this step's metrics, and writes those of the step before."""
        self.flush()
        self.pending = (step, metrics)

    def flush(self) -> None:
        """Waits for the pending step and writes its metrics; raises where they are not finite."""
        if self.pending is None:
            return
        step, metrics = self.pending
        self.pending = None
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        now = time.perf_counter()
        seconds, self.clock = now - self.clock, now
        if not all(math.isfinite(value) for value in values.values()):
            self._refuse(step, values)
        values["target_tokens"] = int(values["target_tokens"])
        values |= {
            "tokens_per_second": values.pop("tokens") / seconds,
            "target_tokens_per_second": values["target_tokens"] / seconds,
            "step_seconds": seconds,
            "learning_rate": float(self.schedule(step - 1)),
            "peak_memory_bytes": peak_memory_bytes(),
        }
        if step % self.config.log.every_steps == 0:
            self.writer.write(step, values)

    def _refuse(self, step: int, values: dict[str, float]) -> None:
        shown = ", ".join(f"{name} {value:g}" for name, value in sorted(values.items()))
        raise UserError(
            f"step {step}: expected finite values, got {shown}. "
            f"{checkpoints.last_good(self.checkpointer)}. Lower optim.learning-rate, or look at "
            "the data"
        )

    def profile(self, step: int) -> None:
        """Starts and stops the XLA profile around its steps."""
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
        """Ends a profile that was begun."""
        if self.profiling:
            jax.profiler.stop_trace()
            self.profiling = False
