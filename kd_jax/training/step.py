"""One optimizer step as a pure function."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from kd_jax.losses.fused_head import kd_head
from kd_jax.losses.head_inputs import FIRST_OF_BIN, NUM_GROUPS, Targets
from kd_jax.losses.hidden import hidden_loss
from kd_jax.models.decoder import Decoder
from kd_jax.onpolicy.samples import SAMPLED
from kd_jax.parallel.mesh import compiler_options, constrain, replicated
from kd_jax.parallel.placement import Arrays
from kd_jax.setup.forward import loss_scalars, run_models, targets
from kd_jax.setup.program import Program
from kd_jax.training.optim import make_optimizer, make_schedule, track_average


class TrainState(NamedTuple):
    """The trained state, as checkpoints store it."""

    trainable: dict[str, Any]
    """`student`: float32 arrays by path; `projection` of the hidden-state loss, if trained."""
    opt_state: Any
    step: Any
    """Number of optimizer updates, int32."""


def init_state(program: Program, trainable: dict[str, Any]) -> TrainState:
    """Returns the state before the first step, with scalars replicated over the mesh."""
    state = TrainState(trainable, _optimizer(program).init(trainable), jnp.zeros((), jnp.int32))
    everywhere = replicated(program.mesh)
    return jax.tree.map(lambda x: jax.device_put(x, everywhere) if x.ndim == 0 else x, state)


def abstract_state(program: Program, trainable: dict[str, Any]) -> TrainState:
    """Returns the shapes, dtypes and shardings of a run's state.

    Args:
      trainable: arrays or ShapeDtypeStructs; each moment is sharded like its weight.
    """
    everywhere = replicated(program.mesh)
    optimizer = _optimizer(program)
    opt_state = optax.tree.map_params(
        optimizer,
        lambda x, weight: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=weight.sharding),
        jax.eval_shape(optimizer.init, trainable),
        trainable,
        transform_non_params=lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere),
    )
    like = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)  # noqa: E731
    step = jax.ShapeDtypeStruct((), jnp.int32, sharding=everywhere)
    return TrainState(jax.tree.map(like, trainable), opt_state, step)


def _optimizer(program: Program) -> optax.GradientTransformation:
    assert program.optim is not None and program.num_steps is not None
    optimizer = make_optimizer(program.optim, program.num_steps)
    if program.teacher_kind != "ema":
        return optimizer
    return optax.chain(optimizer, track_average(program.ema_decay))


def train_step(
    program: Program, state: TrainState, frozen: Arrays, teacher_arrays: Arrays, batch: Arrays
) -> tuple[TrainState, Arrays]:
    """Returns the state after one update, and its metrics, scalars.

    Metrics are float32 means over target tokens, except the counts `target_tokens`, float32, and
    `tokens`, int32.

    Args:
      batch: tokens, positions, segment_ids (int32) and loss_mask (bool) of A micro-batches,
        [A, B, S] each; of an on-policy run also group (int32).
    """
    gradients, metrics = loss_gradients(program, state, frozen, teacher_arrays, batch)
    updates, opt_state = _optimizer(program).update(gradients, state.opt_state, state.trainable)
    trainable = optax.apply_updates(state.trainable, updates)
    assert program.optim is not None and program.num_steps is not None
    metrics["learning_rate"] = make_schedule(program.optim, program.num_steps)(state.step)
    metrics["grad_norm"] = optax.tree.norm(gradients)
    return TrainState(trainable, opt_state, state.step + 1), metrics


def loss_gradients(
    program: Program, state: TrainState, frozen: Arrays, teacher_arrays: Arrays, batch: Arrays
) -> tuple[dict[str, Any], Arrays]:
    """Returns the gradients of the mean loss in state.trainable, and the loss's metrics.

    The mean is over the target tokens of all micro-batches.
    """
    num_tokens = jnp.sum(targets(batch).mask).astype(jnp.float32)
    teacher_arrays = teacher_weights(program, state, frozen, teacher_arrays)
    scalars = loss_scalars(program, state.step)
    step_key = jax.random.fold_in(jax.random.key(program.seed), state.step)

    def micro_loss(trainable, micro_batch, key):
        student = Decoder(program.student, frozen | trainable["student"])
        inputs, outputs = run_models(
            program, student, teacher_arrays, micro_batch, key, with_hidden=True
        )
        loss, metrics = kd_head(program.head, scalars, *inputs)
        if program.hidden is not None:
            projection = trainable.get("projection")
            if projection is not None:
                projection = constrain(projection, program.mesh)  # all-gathered, like the heads
            hidden = hidden_loss(program.hidden.kind, *outputs, projection, inputs[-1].mask)
            loss += program.hidden.weight * hidden
            metrics["hidden_loss"] = hidden
        return loss / jnp.maximum(num_tokens, 1), {"loss": loss, **metrics}

    def micro_gradients(index, micro_batch):
        key = jax.random.fold_in(step_key, index) if program.student.dropout > 0 else None
        return jax.grad(micro_loss, has_aux=True)(state.trainable, micro_batch, key)

    def accumulate(gradients, indexed):
        micro, metrics = micro_gradients(*indexed)
        return jax.tree.map(jnp.add, gradients, micro), metrics

    if len(batch["tokens"]) == 1:  # no scan: it would hold a second gradient buffer
        gradients, sums = micro_gradients(0, jax.tree.map(lambda x: x[0], batch))
    else:
        zeros = jax.tree.map(jnp.zeros_like, state.trainable)
        index = jnp.arange(len(batch["tokens"]))
        gradients, sums = jax.lax.scan(accumulate, zeros, (index, batch))
    metrics = {name: jnp.sum(x) / jnp.maximum(num_tokens, 1) for name, x in sums.items()}
    metrics["target_tokens"] = num_tokens
    metrics["tokens"] = jnp.sum(batch["segment_ids"] > 0)
    if "group" in batch:
        metrics |= sample_metrics(sums, targets(batch))
    if program.head.loss.is_scheduled:
        metrics |= scalars._asdict()
    return gradients, metrics


def teacher_weights(
    program: Program, state: TrainState, frozen: Arrays, teacher_arrays: Arrays
) -> Arrays:
    """Returns the teacher's arrays: its own or, in self-distillation, some of the student's.

    base: the frozen weights, without the adapter. ema: the average of the trained weights.
    """
    if program.teacher_kind == "base":
        return frozen
    if program.teacher_kind == "ema":
        return frozen | optax.tree.get(state.opt_state, "average")["student"]
    return teacher_arrays


def sample_metrics(sums: Arrays, targets: Targets) -> Arrays:
    """Returns metrics of the tokens that the student sampled, means but for the counts.

    Args:
      sums: of each group, [..., NUM_GROUPS], by kd_head's names.
    """
    assert targets.group is not None
    groups = jnp.arange(NUM_GROUPS)
    there = targets.mask.reshape(-1, 1) & (targets.group.reshape(-1, 1) == groups[None])
    counts = jnp.sum(there, axis=0).astype(jnp.float32)
    by_group = {name: sums[name].reshape(-1, NUM_GROUPS).sum(axis=0) for name in SAMPLED}
    num_tokens = jnp.sum(counts[1:])
    found = {"samples/tokens": num_tokens}
    for name, (shown, sign) in SAMPLED.items():
        found[f"samples/{shown}"] = sign * by_group[name][1:].sum() / jnp.maximum(num_tokens, 1)
    for bin, first in enumerate(FIRST_OF_BIN, start=1):
        for name in ("kl_forward", "kl_reverse"):
            mean = by_group[name][bin] / jnp.maximum(counts[bin], 1)
            found[f"samples/{name}_from_{first}"] = mean
    return found


def jit_train_step(mesh: Mesh, layout: Any) -> Any:
    """Returns `train_step` under jit, its state donated and sharded by `layout`."""
    return jax.jit(
        train_step,
        static_argnums=0,
        donate_argnums=1,
        out_shardings=(layout, None),
        compiler_options=compiler_options(mesh),
    )
