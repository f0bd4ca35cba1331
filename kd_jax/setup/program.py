"""The program of a run: its static configuration under jit."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from kd_jax.config import Config, HiddenConfig, LossConfig, OptimConfig
from kd_jax.losses.fused_head import HeadConfig
from kd_jax.losses.head_inputs import Side, Targets, Teacher
from kd_jax.losses.schedules import interpolate
from kd_jax.losses.token_loss import LossScalars
from kd_jax.models.decoder import Decoder, DecoderSpec
from kd_jax.models.weight_table import is_adapter
from kd_jax.parallel.mesh import num_batch_shards, traits
from kd_jax.parallel.placement import Arrays
from kd_jax.planning.chips import chip_of
from kd_jax.planning.memory import chunk_tokens
from kd_jax.setup.models import Models, TeacherSource
from kd_jax.teachers.live import LiveModel
from kd_jax.teachers.stored import StoredModel
from kd_jax.teachers.topk import TopKModel


@dataclass(frozen=True, kw_only=True)
class Program:
    """Static configuration of a step; a static argument of jit."""

    student: DecoderSpec
    teacher: LiveModel | StoredModel | TopKModel | None
    """Gives the teacher's side of a batch."""
    teacher_source: TeacherSource = "model"
    """Whose weights the teacher has."""
    ema_decay: float = 0.0
    """With teacher_source ema: the share of the average that an update leaves."""
    head: HeadConfig
    hidden: HiddenConfig | None = None
    mesh: Mesh | None = None
    seed: int = 0
    optim: OptimConfig | None = None
    """The optimizer, built while the step is traced; None for evaluation."""
    num_steps: int | None = None
    """Optimizer steps of the run, the length of the schedules."""

    @property
    def schedule_steps(self) -> int | None:
        """Length of the loss schedule, optimizer steps."""
        return self.head.loss.schedule_steps or self.num_steps


def targets(batch: Arrays) -> Targets:
    """Returns labels, mask and, of an on-policy batch, groups, [..., S].

    Position t predicts token t + 1 of its document.
    """
    labels = jnp.roll(batch["tokens"], -1, axis=-1)
    follows = jnp.roll(batch["segment_ids"], -1, axis=-1) == batch["segment_ids"]
    follows &= jnp.arange(labels.shape[-1]).reshape((1,) * (labels.ndim - 1) + (-1,)) < (
        labels.shape[-1] - 1
    )
    group = jnp.roll(batch["group"], -1, axis=-1) if "group" in batch else None
    return Targets(labels, jnp.roll(batch["loss_mask"], -1, axis=-1) & follows, group)


def teacher_weights(program: Program, student: Arrays, given: Arrays) -> Arrays:
    """Returns the teacher's arrays: its own, or in self-distillation the student's.

    Args:
      student: the student's arrays by path, trained ones included.
      given: the teacher's own; with teacher.kind ema the average of the trained ones.
    """
    if program.teacher_source == "base":
        return {name: x for name, x in student.items() if not is_adapter(name)}
    return student | given if program.teacher_source == "ema" else given


def head_inputs(
    program: Program,
    student: Decoder,
    teacher_arrays: Arrays,
    batch: Arrays,
    dropout_key: jax.Array | None = None,
    pairs: HiddenConfig | None = None,
) -> tuple[tuple[Side, Teacher | None, Targets], tuple[Any, Any]]:
    """Returns ((student, teacher, targets) of the fused head, (student, teacher) layer outputs).

    Args:
      batch: arrays [B, S].
      pairs: layers whose outputs to return, [pairs, B, S, D] for each model; None: no outputs.
    """
    inputs = (batch["tokens"], batch["positions"], batch["segment_ids"])
    ours, theirs = (pairs.student_layers, pairs.teacher_layers) if pairs else ((), ())
    teacher_side: Any = None
    teacher_outputs = None
    if program.teacher is not None:
        teacher_side, teacher_outputs = program.teacher(teacher_arrays, batch, theirs)
    student_hidden, student_outputs = student.with_layers(*inputs, ours, dropout_key)
    student_side = Side(student_hidden, student.head_weight())
    frozen = jax.lax.stop_gradient((teacher_side, teacher_outputs))
    return (student_side, frozen[0], targets(batch)), (student_outputs, frozen[1])


def loss_scalars(program: Program, step: jax.Array | None) -> LossScalars:
    """Returns the scheduled scalars of the loss after `step` updates.

    None is the end of the schedule. Evaluations use it so that those of one run are comparable.
    """
    loss = program.head.loss

    def value(start, end):
        if end is None or step is None:
            return jnp.float32(start if end is None else end)
        assert program.schedule_steps is not None
        return interpolate(start, end, loss.schedule, step, program.schedule_steps)

    return LossScalars(
        kd_ratio=value(loss.kd_ratio, loss.kd_ratio_end),
        temperature=value(loss.temperature, loss.temperature_end),
    )


def make_head(
    loss: LossConfig,
    mesh: Mesh,
    vocab_size: int,
    num_tokens: int,
    dtype: str,
    trainable: bool = False,
) -> HeadConfig:
    """Returns the head's configuration; `num_tokens` are those of all devices."""
    share, entries = num_tokens // num_batch_shards(mesh), vocab_size // mesh.shape["tensor"]
    row = traits(mesh)
    return HeadConfig(
        loss=loss,
        chunk_tokens=chunk_tokens(
            loss.chunk_tokens,
            row,
            chip_of(mesh.devices.flat[0].device_kind),
            entries,
            share,
            head_trainable=trainable,
        ),
        vocab_size=vocab_size,
        mesh=mesh,
        transpose_head=row.transposed_head and dtype == "bfloat16",
        head_trainable=trainable,
    )


def make_program(
    config: Config, models: Models, vocab_size: int, mesh: Mesh, num_steps: int | None = None
) -> Program:
    """Returns the program of a run.

    Args:
      num_steps: optimizer steps of the run, the length of the schedules; None for evaluation.
    """
    rows = config.data.batch_size // config.optim.accumulation_steps
    head = make_head(
        config.loss,
        mesh,
        vocab_size,
        rows * config.data.seq_len,
        models.student.dtype.name,
        config.trainable == "full",
    )
    if models.teacher_kind == "topk" and config.teacher is not None:
        both = config.teacher.cache_rest == "renormalize_both"
        head = dataclasses.replace(head, listed_only=both)
    return Program(
        student=models.student,
        teacher=_make_teacher(config, models),
        teacher_source=models.teacher_source,
        ema_decay=config.teacher.ema_decay if config.teacher is not None else 0.0,
        head=head,
        hidden=config.hidden if config.compares_hidden else None,
        mesh=mesh,
        seed=config.seed if models.student.dropout > 0 else 0,  # runs that differ in it share this
        optim=config.optim,
        num_steps=num_steps,
    )


def _make_teacher(config: Config, models: Models) -> LiveModel | StoredModel | TopKModel | None:
    spec = models.teacher
    if spec is None:
        return None
    if models.teacher_kind == "live":
        return LiveModel(spec, models.own_rows)
    if models.teacher_kind == "hidden":
        return StoredModel(spec.arch)
    assert config.teacher is not None
    return TopKModel(spec.arch.vocab_size, config.teacher.cache_rest)
