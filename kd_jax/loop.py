"""The training loop."""

import math
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from kd_jax import checkpoint, data, scores
from kd_jax.build import (
    Source,
    check_adapter,
    check_attention,
    load_models,
    make_program,
    open_source,
    put_batch,
    shared_vocab_size,
    start_jax,
    without_tokenizer,
)
from kd_jax.config import Config, UserError
from kd_jax.evaluation import evaluate_rows
from kd_jax.hidden import PROJECTION, check_layers
from kd_jax.metrics import Writer, peak_memory_bytes
from kd_jax.optim import make_optimizer, make_schedule
from kd_jax.sharding import compiler_options, make_mesh, replicated
from kd_jax.step import Arrays, TrainState, init_state, train_step
from kd_jax.text import chat_template_of, check_path


def train(config: Config) -> None:
    """Runs or resumes a run to its last step; SIGTERM saves and returns."""
    start_jax(config.compilation_cache)
    mesh = make_mesh(config.mesh, config.data.batch_size // config.optim.accumulation_steps)
    student, teacher = open_inputs(config)
    vocab_size = shared_vocab_size(student, teacher)
    if config.trainable == "lora" and student.adapter is not None:
        check_adapter(student, config.lora)
    rows, eval_rows = load_rows(config, *(model.tokenizer for model in (student, teacher) if model))
    student, teacher = without_tokenizer(student), teacher and without_tokenizer(teacher)
    num_steps = data.num_steps(rows, config)
    if (config.loss.schedule_steps or 0) > num_steps:
        raise UserError(
            f"loss.schedule-steps: expected at most {num_steps}, the run's optimizer steps, got "
            f"{config.loss.schedule_steps}"
        )
    if config.optim.warmup_steps >= num_steps:
        print(
            f"warning: optim.warmup-steps {config.optim.warmup_steps} is not below the run's "
            f"{num_steps} steps: the learning rate never reaches its peak and its decay",
            flush=True,
        )
    if config.distils and config.loss.warning:
        print(f"warning: {config.loss.warning}", flush=True)
    workdir = Path(config.workdir).expanduser()
    inputs = {**student.hashes, **(teacher.hashes if teacher else {}), "data.path": rows.key}
    checkpoint.claim_workdir(config, workdir, inputs, num_steps)

    models = load_models(config, student, teacher, mesh)
    program = make_program(config, models, vocab_size, mesh, num_steps)
    optimizer = make_optimizer(config.optim, num_steps)
    state = _place(init_state(models.trainable, optimizer), mesh)
    with (
        _sigterm_noted() as stop,
        checkpoint.open_checkpointer(workdir, config.checkpoint.keep) as checkpointer,
        ExitStack() as stack,
    ):
        state = checkpoint.restore(checkpointer, state) or state
        step = int(state.step)
        print(f"resumed at step {step}" if step else describe_models(models), flush=True)
        writer = stack.enter_context(closing(Writer(workdir, config.log, step, num_steps)))
        loop = stack.enter_context(closing(_Loop(config, num_steps, writer, checkpointer)))
        layout = jax.tree.map(lambda x: x.sharding, state)  # of every step, the resumed ones too
        run_step = jax.jit(
            train_step,
            static_argnums=(0, 1),
            donate_argnums=2,
            out_shardings=(layout, None),
            compiler_options=compiler_options(mesh),
        )
        batches = data.batches(
            rows,
            seed=config.seed,
            start_step=step,
            batch_size=config.data.batch_size,
            accumulation_steps=config.optim.accumulation_steps,
        )
        frozen = (models.frozen, models.teacher_arrays)
        while step < num_steps and not stop:
            loop.profile(step)
            batch = next(batches)
            state, metrics = run_step(program, optimizer, state, *frozen, put_batch(batch, mesh))
            step += 1
            loop.log(step, metrics, int(np.count_nonzero(batch["segment_ids"])))
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
            if last or stop or step % config.checkpoint.every_steps == 0:
                loop.flush()  # raises rather than save a state that is not finite
                checkpoint.save(checkpointer, state, step, eval_loss)
        loop.flush()
        if stop and step < num_steps:
            checkpoint.save(checkpointer, state, step, None)
            print(f"stopped by SIGTERM at step {step}; the same command resumes", flush=True)
            return
    print(f"done: python -m convert.to_hf --workdir {workdir} --out FOLDER exports the student")


def open_inputs(config: Config) -> tuple[Source, Source | None]:
    """Returns student and teacher, checked; no teacher for plain fine-tuning.

    Raises:
      UserError: with what is wrong with any of the models, the data and the attention at once.
    """
    problems: list[str] = []

    def attempt(check, *arguments):
        try:
            return check(*arguments)
        except UserError as error:
            problems.append(str(error))

    attempt(check_attention, config)
    student = attempt(open_source, config.student.path, config.student.adapter, "student")
    teacher = None
    if config.teacher is not None and config.distils:
        teacher = attempt(open_source, config.teacher.path, config.teacher.adapter, "teacher")
    if config.compares_hidden:
        attempt(check_layers, config.hidden, *(x and x.arch for x in (student, teacher)))
    attempt(check_path, config.data.path, "data.path")
    if config.eval.path is not None:
        attempt(check_path, config.eval.path, "eval.path")
    if problems:
        raise UserError("\n".join(problems))
    return student, teacher


def load_rows(config: Config, *tokenizers: Any) -> tuple[data.Rows, data.Rows | None]:
    """Returns the training and held-out rows, and prints what became of the conversations."""
    template = chat_template_of(config.data, *tokenizers)
    rows = data.make_rows(config.data, tokenizers[0], template)
    print(f"{config.data.path}: {data.describe(rows)}", flush=True)
    if config.eval.path is None:
        return rows, None
    held_out = data.make_rows(
        config.data,
        tokenizers[0],
        template,
        path=config.eval.path,
        split=config.eval.split,
        max_conversations=config.eval.max_conversations,
    )
    print(f"{config.eval.path}: {data.describe(held_out)}", flush=True)
    return rows, held_out


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


def _place(state: TrainState, mesh: Mesh) -> TrainState:
    """Returns the state with its scalars on every device of the mesh, like the arrays."""
    return jax.tree.map(lambda x: jax.device_put(x, replicated(mesh)) if x.ndim == 0 else x, state)


@contextmanager
def _sigterm_noted() -> Iterator[list[int]]:
    """Yields a list that is filled when SIGTERM arrives, instead of the process being ended."""
    received: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: received.append(number))
    try:
        yield received
    finally:
        signal.signal(signal.SIGTERM, before)


class _Loop:
    """The loop's bookkeeping: logs one step late, so that the device never waits for the host."""

    def __init__(self, config: Config, num_steps: int, writer: Writer, checkpointer: Any):
        self.config = config
        self.writer = writer
        self.checkpointer = checkpointer
        self.schedule = make_schedule(config.optim, num_steps)
        self.pending: tuple[int, Arrays, int] | None = None
        self.profiling = False
        self.restart_clock()

    def restart_clock(self) -> None:
        self.clock = time.perf_counter()

    def log(self, step: int, metrics: Arrays, num_tokens: int) -> None:
        """Keeps this step's metrics, and writes those of the step before."""
        self.flush()
        self.pending = (step, metrics, num_tokens)

    def flush(self) -> None:
        """Waits for the pending step and writes its metrics; raises where they are not finite."""
        if self.pending is None:
            return
        step, metrics, num_tokens = self.pending
        self.pending = None
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        now = time.perf_counter()
        seconds, self.clock = now - self.clock, now
        if not all(math.isfinite(value) for value in values.values()):
            self._refuse(step, values)
        values["target_tokens"] = int(values["target_tokens"])
        values |= {
            "tokens_per_second": num_tokens / seconds,
            "target_tokens_per_second": values["target_tokens"] / seconds,
            "step_seconds": seconds,
            "learning_rate": float(self.schedule(step - 1)),
            "peak_memory_bytes": peak_memory_bytes(),
        }
        if step % self.config.log.every_steps == 0:
            self.writer.write(step, values)

    def _refuse(self, step: int, values: dict[str, float]) -> None:
        self.checkpointer.wait()
        latest = self.checkpointer.latest
        good = (
            "none was saved yet"
            if latest is None
            else f"step {latest.step} in {self.checkpointer.directory}"
        )
        shown = ", ".join(f"{name} {value:g}" for name, value in sorted(values.items()))
        raise UserError(
            f"step {step}: expected finite values, got {shown}. Last good checkpoint: {good}. "
            "Lower optim.learning-rate, or look at the data"
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
