"""One optimizer step and one evaluation step; everything that changes is returned."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from kd_jax.losses.fused_head import kd_head
from kd_jax.losses.hidden import PROJECTION, hidden_loss
from kd_jax.models.decoder import rebuild
from kd_jax.parallel.mesh import compiler_options, constrain, replicated
from kd_jax.setup.program import Arrays, Program, head_inputs, loss_scalars, targets


class TrainState(NamedTuple):
    """What a checkpoint holds."""

    trainable: Arrays
    """float32, by dotted path."""
    opt_state: Any
    step: jax.Array
    """Optimizer updates taken, int32."""


def init_state(trainable: Arrays, optimizer: optax.GradientTransformation) -> TrainState:
    return TrainState(trainable, optimizer.init(trainable), jnp.zeros((), jnp.int32))


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
    num_tokens = jnp.sum(targets(batch).mask).astype(jnp.float32)
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
            extra = hidden_loss(program.hidden.kind, *kept, projection, inputs[-1].mask)
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


def place_state(state: TrainState, mesh: Mesh) -> TrainState:
    """Returns the state with its scalars on every device of the mesh, like the arrays."""
    return jax.tree.map(lambda x: jax.device_put(x, replicated(mesh)) if x.ndim == 0 else x, state)
