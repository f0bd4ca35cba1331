"""The forward pass of a step: from a batch to the inputs of the fused head."""

from typing import Any

import jax
import jax.numpy as jnp

from kd_jax.losses.head_inputs import Student, Targets, Teacher
from kd_jax.losses.schedules import interpolate
from kd_jax.losses.token_loss import LossScalars
from kd_jax.models.decoder import Decoder
from kd_jax.parallel.placement import Arrays
from kd_jax.setup.program import Program


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


def run_models(
    program: Program,
    student: Decoder,
    teacher_arrays: Arrays,
    batch: Arrays,
    dropout_key: jax.Array | None = None,
    with_hidden: bool = False,
) -> tuple[tuple[Student, Teacher | None, Targets], tuple[Any, Any]]:
    """Returns ((student, teacher, targets) of the fused head, (student, teacher) layer outputs).

    Args:
      batch: arrays [B, S].
      with_hidden: return the outputs of the layers in program.hidden, [pairs, B, S, D] of each
        model.
    """
    pairs = program.hidden if with_hidden else None
    student_layers, teacher_layers = (
        ((), ()) if pairs is None else (pairs.student_layers, pairs.teacher_layers)
    )
    teacher_side: Any = None
    teacher_outputs = None
    if program.teacher is not None:
        teacher_side, teacher_outputs = program.teacher(teacher_arrays, batch, teacher_layers)
    inputs = (batch["tokens"], batch["positions"], batch["segment_ids"])
    student_hidden, student_outputs = student.with_layers(*inputs, student_layers, dropout_key)
    student_side = Student(student_hidden, student.head_weight())
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
