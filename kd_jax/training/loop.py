"""The training loop: opens a run, steps, evaluates, logs and saves."""

import json
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from kd_jax.config import Config, UserError
from kd_jax.config.record import dump, flatten, path_fields
from kd_jax.data.batches import count_steps
from kd_jax.data.prompts import SYSTEM_FILE
from kd_jax.data.store import Batch
from kd_jax.data.templates import TEMPLATE_FILE
from kd_jax.inference import scores
from kd_jax.inference.cached import open_cached
from kd_jax.inference.evaluation import evaluate_rows
from kd_jax.inference.exam import Exam, grade, make_exam
from kd_jax.onpolicy.sampler import Sampler, make_sampler
from kd_jax.onpolicy.source import OnPolicySource
from kd_jax.parallel.placement import Arrays
from kd_jax.parallel.processes import is_first, on_first, say, together
from kd_jax.parallel.signals import exit_status, stop_signal
from kd_jax.setup.cached import CachedTeacher
from kd_jax.setup.inputs import (
    BatchSource,
    PairRows,
    choose,
    describe_no_evaluation,
    open_inputs,
    open_rows,
    prompt_of,
    row_source,
)
from kd_jax.setup.model_files import ModelFiles, check_adapter, start_hashing, without_tokenizer
from kd_jax.setup.models import Models, load_models
from kd_jax.setup.program import Program, make_program
from kd_jax.setup.runtime import release_freed_memory
from kd_jax.training.step import (
    TrainState,
    abstract_state,
    init_state,
    jit_train_step,
    teacher_weights,
)
from kd_jax.training.step_log import StepLog
from kd_jax.weights.files import write_whole
from kd_jax.workdir import checkpoints, integrity, resume
from kd_jax.workdir.metrics import SampleWriter, Writer
from kd_jax.workdir.provenance import versions


@dataclass(frozen=True, kw_only=True)
class _Run:
    """Checked inputs of a run, the same in all processes."""

    config: Config
    """With every choice made."""
    student: ModelFiles
    teacher: ModelFiles | None
    mesh: Mesh
    rows: PairRows
    cached: CachedTeacher | None
    sampler: Sampler | None
    exam: Exam | None
    num_steps: int
    workdir: Path
    hashing: Future[dict[str, str]]
    """Content hashes of the models, computed while their weights load."""


def train(config: Config) -> None:
    """Trains or resumes to the last step.

    Raises:
      SystemExit: SIGTERM, SIGINT or SIGHUP stopped the run at a step, which is saved.
    """
    run = _open_run(config)
    config = run.config
    with (
        stop_signal() as should_stop,
        checkpoints.open_checkpointer(run.workdir, config.checkpoint.keep) as checkpointer,
        ExitStack() as stack,
    ):
        program, state, frozen, teacher_arrays, resume_arrays = _load(run, checkpointer)
        step = int(state.step)
        writer = stack.enter_context(closing(Writer(run.workdir, config.log, step, run.num_steps)))
        log = stack.enter_context(closing(StepLog(config, writer, checkpointer)))
        run_step = _make_step(run, state)
        source = _make_source(run, program, frozen, step, resume_arrays)
        while step < run.num_steps and not (stop := should_stop(step)):
            log.profile(step)
            state, metrics = run_step(program, state, frozen, teacher_arrays, source(step, state))
            step += 1
            log.add(step, metrics, source.metrics())
            last = step == run.num_steps
            eval_loss = None
            if run.rows.held_out is not None and (last or step % config.eval.every_steps == 0):
                log.flush()
                eval_loss = _evaluate(run, program, state, frozen, teacher_arrays, writer)
                log.restart_clock()
            if last or step % config.checkpoint.every_steps == 0:
                log.flush()  # raises if not finite, so that such a state is not saved
                checkpoints.save(checkpointer, state, step, eval_loss, source.resume_arrays(step))
        log.flush()
        if step < run.num_steps:
            checkpoints.save(checkpointer, state, step, None, source.resume_arrays(step))
            checkpointer.wait()
            say(f"stopped by {stop} at step {step}; the same command resumes")
            raise SystemExit(exit_status(stop))
    say(f"done: python -m convert.to_hf --workdir {run.workdir} --out FOLDER exports the student")


def _open_run(config: Config) -> _Run:
    """Returns the checked inputs; raises if processes have different ones."""
    workdir = Path(config.workdir).expanduser()
    config, student, teacher, mesh = together(
        "config", lambda: _inputs(config, workdir), lambda inputs: _shared_values(inputs[0])
    )
    hashing = start_hashing(student, teacher)
    if config.trainable == "lora" and student.adapter is not None:
        check_adapter(student, config.lora)
    rows = open_rows(config, student, teacher)
    num_steps = count_steps(rows.train, config)
    check_schedules(config, num_steps)
    if line := describe_no_evaluation(config):
        say(line)
    on_first("workdir", lambda: _prepare_workdir(config, workdir))
    cached = None
    if teacher is not None and config.reads_cache:
        hashes = together("teacher", hashing.result, dict)
        cached = open_cached(config, teacher, mesh, hashes, rows.template, rows.both)
        cached.check_vocab(rows.vocab_size)
    sampler = None
    if config.samples:
        assert teacher is not None
        sampler = make_sampler(config, student, teacher, rows.template, rows.train)
    return _Run(
        config=config,
        student=without_tokenizer(student),
        teacher=teacher and without_tokenizer(teacher),
        mesh=mesh,
        rows=rows,
        cached=cached,
        sampler=sampler,
        exam=make_exam(config, student, rows.template),
        num_steps=num_steps,
        workdir=workdir,
        hashing=hashing,
    )


def _prepare_workdir(config: Config, workdir: Path) -> None:
    """Refuses a workdir of another run, then renames its damaged checkpoints."""
    resume.check_same_config(config, workdir)
    integrity.set_aside_damaged(workdir)


def _load(run: _Run, checkpointer: Any) -> tuple[Program, TrainState, Arrays, Arrays, Batch]:
    """Returns the program, the first state, the student's frozen arrays, and the teacher's.

    Last are the arrays that the source of batches resumes from. State and these come from the
    latest checkpoint, if there is one. The record is written once the models' hashes are known.
    """
    config = run.config
    resumes = checkpointer.latest is not None
    outputs = None if run.cached is None else run.cached.kind
    models = load_models(
        config, run.student, run.teacher, run.mesh, with_trainable=not resumes, outputs=outputs
    )
    step = checkpointer.latest.step if resumes else 0
    together("inputs", lambda: _write_record(run, step), dict)
    program = make_program(config, models, run.rows.vocab_size, run.mesh, run.num_steps)
    arrays: Batch = {}
    if resumes:
        state, arrays = checkpoints.restore(checkpointer, abstract_state(program, models.trainable))
        say(f"resumed at step {int(state.step)}")
    else:
        state = init_state(program, models.trainable)
        say(describe_models(models))
    return program, state, models.frozen, models.teacher_arrays, arrays


def _make_step(run: _Run, state: TrainState) -> Callable[..., tuple[TrainState, Arrays]]:
    """Returns the jitted step. Before it first runs, memory that compiling freed is released."""
    step = jit_train_step(run.mesh, jax.tree.map(lambda x: x.sharding, state))
    compiled = False

    def run_step(*arguments: Any) -> tuple[TrainState, Arrays]:
        nonlocal compiled
        if not compiled:
            step.lower(*arguments).compile()  # the call below finds it
            release_freed_memory()
            compiled = True
        return step(*arguments)

    return run_step


def _make_source(
    run: _Run, program: Program, frozen: Arrays, step: int, resume_arrays: Batch
) -> BatchSource:
    """Returns the source of batches from `step` on."""
    read_teacher = None if run.cached is None else run.cached.train
    rows = row_source(run.config, run.rows.train, run.mesh, step, read_teacher)
    if run.sampler is None:
        return rows
    return OnPolicySource(
        config=run.config,
        sampler=run.sampler,
        batches=rows.batches,
        mesh=run.mesh,
        student=program.student,
        frozen=frozen,
        vocab_size=run.rows.vocab_size,
        num_steps=run.num_steps,
        write=SampleWriter(run.workdir, step).write,
        columns=resume_arrays,
    )


def _evaluate(
    run: _Run,
    program: Program,
    state: TrainState,
    frozen: Arrays,
    teacher_arrays: Arrays,
    writer: Writer,
) -> float:
    """Evaluates the held-out rows, writes the means and returns the loss."""
    arrays = frozen | state.trainable["student"]
    teacher = teacher_weights(program, state, frozen, teacher_arrays)
    rows, config = run.rows.held_out, run.config
    assert rows is not None
    read_teacher = None if run.cached is None else run.cached.held_out
    documents, _ = evaluate_rows(program, run.mesh, arrays, teacher, rows, config, read_teacher)
    values = scores.whole(documents)
    if run.exam is not None:
        values = values | grade(run.exam, program.student, arrays, run.rows.vocab_size)
    writer.write(int(state.step), {f"eval/{name}": value for name, value in values.items()})
    return values["loss"]


def _inputs(config: Config, workdir: Path) -> tuple[Config, ModelFiles, ModelFiles | None, Mesh]:
    """Returns the config with every choice made, the models and the mesh."""
    config = resume.reuse_choices(config, workdir)
    student, teacher, mesh = open_inputs(config)
    config = choose(config, student.arch, teacher.arch if teacher else None, mesh)
    return config, student, teacher, mesh


def _shared_values(config: Config) -> dict[str, Any]:
    """Returns the fields and versions that must be equal in all processes."""
    own = set(path_fields())  # may differ between hosts
    fields = {
        name: value
        for name, value in flatten(dump(config)).items()
        if name not in own and not name.startswith(("distributed.", "log."))
    }
    return {**fields, **versions()}


def _write_record(run: _Run, step: int) -> dict[str, str]:
    """Writes the run's record on process 0; returns the input hashes, equal in all processes."""
    inputs = {"data.path": run.rows.train.key} | run.hashing.result()
    if run.cached is not None:
        inputs["teacher.cache"] = run.cached.key
    if is_first():
        resume.write_record(run.config, run.workdir, inputs, run.num_steps, step)
        if run.rows.template is not None:
            text = json.dumps({"chat_template": run.rows.template}, ensure_ascii=False)
            write_whole(run.workdir / TEMPLATE_FILE, text + "\n")
        prompt, part = prompt_of(run.config), run.config.teacher
        if prompt is not None and part is not None and prompt.system != part.system:
            write_whole(run.workdir / SYSTEM_FILE, f"{prompt.system}\n")
    return inputs


def check_schedules(config: Config, num_steps: int) -> None:
    """Raises UserError if a schedule exceeds the run; warns of other likely mistakes."""
    for name, part in (("loss", config.loss), ("on-policy", config.on_policy)):
        if (part.schedule_steps or 0) > num_steps:
            raise UserError(
                f"{name}.schedule-steps: expected at most {num_steps}, the run's optimizer steps, "
                f"got {part.schedule_steps}"
            )
    if config.optim.warmup_steps >= num_steps:
        say(
            f"warning: optim.warmup-steps {config.optim.warmup_steps} is not below the run's "
            f"{num_steps} steps: the whole run is warm-up"
        )
    if config.distils and config.loss.warning:
        say(f"warning: {config.loss.warning}")


def describe_models(models: Models) -> str:
    """Returns a line with the number of parameters, trained ones, and what the teacher is."""

    def count(tree: Any) -> int:
        return sum(x.size for x in jax.tree.leaves(tree))

    trained, teacher = count(models.trainable["student"]), count(models.teacher_arrays)
    beside = f"teacher {teacher:,}" if teacher else "no teacher: the loss is the cross-entropy"
    if models.teacher_kind != "model":
        own = {"base": "without its adapter", "ema": "as an exponential average"}
        beside = f"its teacher is itself, {own[models.teacher_kind]}"
    elif models.teacher_outputs == "hidden":
        beside = f"teacher's lm_head {teacher:,}, its hidden states from teacher.cache"
    elif models.teacher_outputs != "live":
        beside = f"teacher from teacher.cache ({models.teacher_outputs})"
    if "projection" in models.trainable:
        beside += f", projection {count(models.trainable['projection']):,}"
    total = trained + count(models.frozen)
    return f"student {total:,} parameters, {trained:,} of them trained; {beside}; compiling"
