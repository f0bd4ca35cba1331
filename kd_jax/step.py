"""One optimizer step and one evaluation step; everything that changes is returned."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from kd_jax.config import HiddenConfig
from kd_jax.losses.fused_head import HeadConfig, kd_head
from kd_jax.losses.hidden import PROJECTION, hidden_loss
from kd_jax.losses.schedules import interpolate
from kd_jax.losses.token_loss import LossScalars
from kd_jax.models.decoder import Decoder, Structure, rebuild
from kd_jax.parallel.mesh import compiler_options, constrain

Arrays = dict[str, jax.Array]


class TrainState(NamedTuple):
    """What a checkpoint holds."""

    trainable: Arrays
    """float32, by dotted path."""
    opt_state: Any
    step: jax.Array
    """Optimizer updates taken, int32."""


@dataclass(frozen=True, kw_only=True)
class Program:
    """What is fixed while a run is compiled; static under jit."""

    student: Structure
    teacher: Structure | None
    head: HeadConfig
    hidden: HiddenConfig | None = None
    mesh: Mesh | None = None
    dropout: bool = False
    seed: int = 0
    schedule_steps: int | None = None
    """Optimizer steps that head.loss.schedule takes; None where nothing is trained."""


def init_state(trainable: Arrays, optimizer: optax.GradientTransformation) -> TrainState:
    return TrainState(trainable, optimizer.init(trainable), jnp.zeros((), jnp.int32))


def targets(batch: Arrays) -> tuple[jax.Array, jax.Array]:
    """Returns labels and mask, [..., S]: position t predicts token t + 1 of the same document."""
    labels = jnp.roll(batch["tokens"], -1, axis=-1)
    follows = jnp.roll(batch["segment_ids"], -1, axis=-1) == batch["segment_ids"]
    follows &= jnp.arange(labels.shape[-1]).reshape((1,) * (labels.ndim - 1) + (-1,)) < (
        labels.shape[-1] - 1
    )
    return labels, jnp.roll(batch["loss_mask"], -1, axis=-1) & follows


def head_inputs(
    program: Program,
    student: Decoder,
    teacher: Decoder | None,
    batch: Arrays,
    dropout_key: jax.Array | None = None,
    pairs: HiddenConfig | None = None,
) -> tuple[tuple[Any, ...], tuple[Any, Any]]:
    """Returns what the head takes of a batch of rows [B, S]: hidden states, heads, targets.

    And the outputs of the layers in `pairs`, student's and teacher's, [pairs, B, S, D] each.
    """
    inputs = (batch["tokens"], batch["positions"], batch["segment_ids"])
    labels, mask = targets(batch)
    ours, theirs = (pairs.student_layers, pairs.teacher_layers) if pairs else ((), ())
    teacher_hidden = teacher_head = teacher_kept = None
    if teacher is not None:
        teacher_hidden, teacher_kept = teacher.with_layers(*inputs, theirs)
        teacher_head = teacher.head_weight()
    student_hidden, student_kept = student.with_layers(*inputs, ours, dropout_key)
    return (
        student_hidden,
        jax.lax.stop_gradient(teacher_hidden),
        student.head_weight(),
        jax.lax.stop_gradient(teacher_head),
        labels,
        mask,
    ), (student_kept, jax.lax.stop_gradient(teacher_kept))


def loss_scalars(program: Program, step: jax.Array | None) -> LossScalars:
    """Returns the loss's scalars after `step` updates; None stands for the schedule's end.

    Evaluations take the end, so that those of one run can be compared.
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


def train_step(
    program: Program,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    frozen: Arrays,
    teacher_arrays: Arrays,
    batch: Arrays,
) -> tuple[TrainState, Arrays]:
    """Returns the state after one update, and metrics as means over its target tokens.

    And how many these are, target_tokens, and how many tokens there are.

    Args:
      batch: tokens, positions, segment_ids (int32) and loss_mask (bool), [A, B, S] each: A
        micro-batches whose gradients are summed before the single division by the number of
        target tokens of all of them.
    """
    teacher = None if program.teacher is None else rebuild(program.teacher, teacher_arrays)
    num_tokens = jnp.sum(targets(batch)[1]).astype(jnp.float32)
    scalars = loss_scalars(program, state.step)
    step_key = jax.random.fold_in(jax.random.key(program.seed), state.step)

    def micro_loss(trainable, micro_batch, key):
        student = rebuild(program.student, trainable, frozen)
        inputs, kept = head_inputs(program, student, teacher, micro_batch, key, program.hidden)
        loss, metrics = kd_head(program.head, scalars, *inputs)
        if program.hidden is not None:
            projection = trainable.get(PROJECTION)
            if projection is not None:
                projection = constrain(projection, program.mesh)  # gathered once, as the heads are
            extra = hidden_loss(program.hidden.kind, *kept, projection, inputs[-1])
            loss += program.hidden.weight * extra
            metrics["hidden_loss"] = extra
        return loss / jnp.maximum(num_tokens, 1), {"loss": loss, **metrics}

    def accumulate(gradients, indexed):
        index, micro_batch = indexed
        key = jax.random.fold_in(step_key, index) if program.dropout else None
        micro, metrics = jax.grad(micro_loss, has_aux=True)(state.trainable, micro_batch, key)
        return jax.tree.map(jnp.add, gradients, micro), metrics

    zeros = jax.tree.map(jnp.zeros_like, state.trainable)
    index = jnp.arange(batch["tokens"].shape[0])
    gradients, sums = jax.lax.scan(accumulate, zeros, (index, batch))
    metrics = {name: jnp.sum(x) / jnp.maximum(num_tokens, 1) for name, x in sums.items()}
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.trainable)
    metrics["target_tokens"] = num_tokens
    metrics["tokens"] = jnp.sum(batch["segment_ids"] > 0)
    metrics["grad_norm"] = optax.global_norm(gradients)
    if program.head.loss.is_scheduled:
        metrics |= scalars._asdict()
    trainable = optax.apply_updates(state.trainable, updates)
    return TrainState(trainable, opt_state, state.step + 1), metrics


def jit_train_step(mesh: Mesh, layout: Any) -> Any:
    """Returns `train_step` under jit: its state is donated, and laid out as `layout` says."""
    return jax.jit(
        train_step,
        static_argnums=(0, 1),
        donate_argnums=2,
        out_shardings=(layout, None),
        compiler_options=compiler_options(mesh),
    )
