"""Opens and checks a configuration's models, mesh and rows."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import jax
from jax.sharding import Mesh

from kd_jax.config import Config, DataConfig, UserError
from kd_jax.data.batches import ReadTeacher, train_batches
from kd_jax.data.chat import chat_template_of
from kd_jax.data.files import check_source, choose_split
from kd_jax.data.outputs import check_apart
from kd_jax.data.prompts import TeacherPrompt, read_prompt
from kd_jax.data.rows import Rows, describe_rows, make_rows, overlap
from kd_jax.data.store import Batch
from kd_jax.data.templates import Template
from kd_jax.losses.hidden import check_layers
from kd_jax.models.architecture import Architecture, describe_context
from kd_jax.parallel.mesh import make_mesh, platform
from kd_jax.parallel.placement import Arrays, local_rows, put_batch
from kd_jax.parallel.processes import say, together
from kd_jax.parallel.rules import mesh_sizes
from kd_jax.planning.choices import choose_dtypes, choose_remat, describe_choices, with_remat
from kd_jax.planning.cost import Case
from kd_jax.planning.mesh_choice import choose_sizes
from kd_jax.planning.topology import local_topology
from kd_jax.setup.model_files import (
    ModelFiles,
    check_shared,
    open_model_files,
    own_teacher,
    shared_vocab,
)
from kd_jax.setup.runtime import check_attention


class BatchSource(Protocol):
    """Source of a run's batches; it is called for consecutive steps."""

    def __call__(self, step: int, state: Any) -> Arrays:
        """Returns the batch of a step, [A, B, S] on the mesh; `state` is that before the step."""

    def metrics(self) -> dict[str, float | None]:
        """Returns metrics of the last batch; None: the step has no such metric."""

    def resume_arrays(self, step: int) -> Batch:
        """Returns arrays that a run which resumes at `step` needs beside the state."""


@dataclass(frozen=True, slots=True)
class RowSource:
    """The rows of the data, which seed and step determine."""

    batches: Iterator[Batch]
    mesh: Mesh

    def __call__(self, step: int, state: Any) -> Arrays:
        return put_batch(next(self.batches), self.mesh)

    def metrics(self) -> dict[str, float | None]:
        return {}

    def resume_arrays(self, step: int) -> Batch:
        return {}


def open_inputs(
    config: Config, devices: Sequence[jax.Device] | None = None
) -> tuple[ModelFiles, ModelFiles | None, Mesh]:
    """Returns the checked student, teacher (None for fine-tuning) and mesh.

    Args:
      devices: devices of the mesh; None: all.

    Raises:
      UserError: lists all problems of models, data and mesh.
    """
    problems: list[str] = []
    seq_len = config.data.seq_len

    def attempt(check, *arguments):
        try:
            return check(*arguments)
        except UserError as error:
            problems.append(str(error))

    student = attempt(open_model_files, config.student.path, config.student.adapter, "student")
    teacher = None
    if config.teacher is not None and config.distils:
        if config.teacher.path is None:
            teacher = student and own_teacher(student)
        else:
            teacher = attempt(
                open_model_files, config.teacher.path, config.teacher.adapter, "teacher"
            )
    if config.compares_hidden:
        attempt(check_layers, config.hidden, *(x and x.arch for x in (student, teacher)))
    archs = (student and student.arch, teacher and teacher.arch)
    mesh = attempt(open_mesh, config, *archs, jax.devices() if devices is None else devices)
    attempt(check_source, config.data.path, config.data.split)
    attempt(prompt_of, config)
    if (held_out := held_out_data(config)) is not None:
        attempt(check_source, held_out.path, held_out.split, "eval.path")
    cache = config.teacher and config.teacher.cache
    places = {"workdir": config.workdir, "data.cache-dir": config.data.cache_dir}
    attempt(check_outputs, config, places | {"teacher.cache": cache})
    if problems:
        raise UserError("\n".join(dict.fromkeys(problems)))
    for files, field in ((student, "student"), (teacher, "teacher")):
        if files is not None and (warning := describe_context(files.arch, seq_len, field)):
            say(warning)
    return student, teacher, mesh


def check_outputs(config: Config, places: Mapping[str, str | None]) -> None:
    """Raises UserError if the data have files in `places`, which are written, by flag."""
    check_apart(config.data.path, config.data.split, places)
    if config.eval.path is not None and (held_out := held_out_data(config)) is not None:
        check_apart(held_out.path, held_out.split, places, "eval.path")


def open_mesh(
    config: Config,
    student: Architecture | None,
    teacher: Architecture | None,
    devices: Sequence[jax.Device],
) -> Mesh:
    """Returns the mesh; the planner chooses the sizes left open, if the student is known.

    Raises:
      UserError: the mesh does not match the devices, the rows or the models.
    """
    rows = config.data.batch_size // config.optim.accumulation_steps
    if student is None:
        sizes = mesh_sizes(config.mesh, len(devices), rows)
    else:
        sizes = choose_sizes(config, student, teacher, local_topology(devices))
    mesh = make_mesh(dataclasses.replace(config.mesh, **sizes), rows, devices)
    check_attention(config, mesh)
    return mesh


def choose(
    config: Config, student: Architecture, teacher: Architecture | None, mesh: Mesh
) -> Config:
    """Returns the config with dtypes and remat chosen for the mesh, and prints what was chosen.

    Where the devices report no memory, remat stays open.
    """
    here, topology = platform(mesh), local_topology(list(mesh.devices.flat))
    case = Case(
        config=choose_dtypes(config, here),
        student=student,
        teacher=teacher,
        sizes=mesh.shape,
        topology=topology,
    )
    if topology.platform == here:
        case = with_remat(case, choose_remat(case))
    if line := describe_choices(config, case):
        say(line)
    return case.config


def load_rows(config: Config, *tokenizers: Any) -> tuple[Rows, Rows | None]:
    """Returns the training and held-out rows, and prints a summary of each."""
    template = chat_template_of(config.data, *tokenizers)
    fraction, prompt = config.eval.fraction, prompt_of(config)
    rows = make_rows(config.data, tokenizers[0], template, fraction=fraction, prompt=prompt)
    say(f"{config.data.path}: {describe_rows(rows)}")
    if (data := held_out_data(config)) is None:
        return rows, None
    held_out = make_rows(
        data, tokenizers[0], template, fraction=fraction, held_out=True, prompt=prompt
    )
    notes = tuple(note for note in held_out.notes if note not in rows.notes)
    what = f" (held out, {fraction:.4g})" if fraction else ""
    say(f"{data.path}{what}: {describe_rows(dataclasses.replace(held_out, notes=notes))}")
    if not fraction and (shared := overlap(rows, held_out)):
        say(
            f"warning: eval.path: the evaluation has training data: both read {shared}. Set "
            "data.split and eval.split to other parts of it, or eval.fraction"
        )
    return rows, held_out


def describe_no_evaluation(config: Config) -> str | None:
    """Returns a line about a configuration that names a split to evaluate, but no data."""
    if config.eval.split is None or held_out_data(config) is not None:
        return None
    return (
        "nothing is evaluated during training, since eval.path is not set: --eval.path PATH "
        f"evaluates on its split {config.eval.split!r}"
    )


def prompt_of(config: Config) -> TeacherPrompt | None:
    """Returns the teacher's own prompt; None: it sees the student's, or takes no part."""
    return read_prompt(config.teacher) if config.prompts_teacher else None


@dataclass(frozen=True, kw_only=True)
class PairRows:
    """Rows whose target tokens all models of a run share, the same in all processes."""

    train: Rows
    held_out: Rows | None
    template: Template | None
    """The chat template of both."""
    vocab_size: int
    """Vocabulary entries that the models share."""

    @property
    def both(self) -> tuple[Rows, Rows | None]:
        return self.train, self.held_out


def open_rows(config: Config, student: ModelFiles, teacher: ModelFiles | None) -> PairRows:
    """Returns a run's rows, once for all processes; process 0 reads first, and writes the cache.

    Raises:
      UserError: tokenizers differ, records cannot be used, targets are tokens that the models do
        not share, or processes have other rows.
    """
    shared = shared_vocab(student, teacher)
    tokenizers = [model.tokenizer for model in (student, teacher) if model]

    train, held_out = together(
        "rows",
        lambda: load_rows(config, *tokenizers),
        lambda rows: {"data.path": rows[0].key, "eval.path": rows[1] and rows[1].key},
        first_alone=True,
    )
    check_shared(shared, student, teacher, train, "data.path")
    check_shared(shared, student, teacher, held_out, "eval.path")
    return PairRows(
        train=train,
        held_out=held_out,
        template=chat_template_of(config.data, *tokenizers),
        vocab_size=shared.size,
    )


def held_out_data(config: Config) -> DataConfig | None:
    """Returns the data of evaluations in training, or None."""
    path = config.eval.path
    if path is None:
        return config.data if config.eval.fraction else None
    return dataclasses.replace(
        config.data,
        path=path,
        split=choose_split(path, config.eval.split),
        max_conversations=config.eval.max_conversations,
    )


def row_source(
    config: Config, rows: Rows, mesh: Mesh, start_step: int, read_teacher: ReadTeacher | None = None
) -> RowSource:
    """Returns the source of training batches; it must be called for consecutive steps.

    Each process reads only the rows of its own devices.

    Args:
      read_teacher: adds a cached teacher's arrays to a batch.
    """
    size, count = config.data.batch_size, config.optim.accumulation_steps
    batches = train_batches(
        rows,
        seed=config.seed,
        start_step=start_step,
        batch_size=size,
        accumulation_steps=count,
        row_mask=local_rows(mesh, size // count),
        read_teacher=read_teacher,
    )
    return RowSource(batches, mesh)
