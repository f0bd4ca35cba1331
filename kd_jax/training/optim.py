"""The learning-rate schedule and the optimizer."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from kd_jax.config import OptimConfig
from kd_jax.losses.schedules import SHAPES


def make_schedule(config: OptimConfig, num_steps: int) -> optax.Schedule:
    """Returns step -> learning rate: linear warm-up, then decay to zero at num_steps."""

    def schedule(step):
        step = jnp.asarray(step, jnp.float32)
        warm = (step + 1) / max(config.warmup_steps, 1)
        left = max(num_steps - config.warmup_steps, 1)
        progress = jnp.clip((step - config.warmup_steps) / left, 0.0, 1.0)
        shape = SHAPES[config.schedule](progress)
        return config.learning_rate * jnp.where(step < config.warmup_steps, warm, shape)

    return schedule


def decays(path: tuple[Any, ...], _: Any = None) -> bool:
    """Returns True if weight decay applies to this tree path: all but norms and biases."""
    return not path[-1].key.endswith(("norm.weight", ".bias"))


def make_optimizer(config: OptimConfig, num_steps: int) -> optax.GradientTransformation:
    """Returns AdamW after optional gradient clipping, over nested dicts of float32 arrays."""
    adamw = optax.adamw(
        make_schedule(config, num_steps),
        b1=config.beta1,
        b2=config.beta2,
        eps=config.epsilon,
        weight_decay=config.weight_decay,
        mask=lambda params: jax.tree.map_with_path(decays, params),
    )
    if config.clip_norm is None:
        return adamw
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw)


class AverageState(NamedTuple):
    average: Any


def track_average(decay: float) -> optax.GradientTransformation:
    """Returns the last link of a chain, which averages the weights and changes no update.

    After each update average = decay * average + (1 - decay) * weights, float32 (mean teacher,
    arXiv 1703.01780); before the first the average is the weights.
    """

    def init(params: Any) -> AverageState:
        return AverageState(jax.tree.map(jnp.copy, params))  # the step donates both

    def update(updates: Any, state: AverageState, params: Any = None) -> tuple[Any, AverageState]:
        weights = optax.apply_updates(params, updates)
        moved = jax.tree.map(lambda a, w: a + (1 - decay) * (w - a), state.average, weights)
        return updates, AverageState(moved)

    return optax.GradientTransformation(init, update)
