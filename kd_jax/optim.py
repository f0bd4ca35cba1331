"""Schedules and the optax chain."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from kd_jax.config import OptimConfig

SHAPES: dict[str, Callable[[jax.Array], jax.Array]] = {
    "cosine": lambda progress: 0.5 * (1 + jnp.cos(math.pi * progress)),
    "linear": lambda progress: 1 - progress,
    "constant": jnp.ones_like,
}


def make_schedule(config: OptimConfig, num_steps: int) -> optax.Schedule:
    """Returns step -> learning rate: linear warm-up to the peak, then decay to zero at the end."""

    def schedule(step):
        step = jnp.asarray(step, jnp.float32)
        warm = (step + 1) / max(config.warmup_steps, 1)
        left = max(num_steps - config.warmup_steps, 1)
        progress = jnp.clip((step - config.warmup_steps) / left, 0.0, 1.0)
        shape = SHAPES[config.schedule](progress)
        return config.learning_rate * jnp.where(step < config.warmup_steps, warm, shape)

    return schedule


def interpolate(start: float, end: float, shape: str, step: Any, num_steps: int) -> jax.Array:
    """Returns what goes from `start` at step 0 to `end` at the last of num_steps, and stays."""
    progress = jnp.asarray(step, jnp.float32) / max(num_steps - 1, 1)
    return end + (start - end) * SHAPES[shape](jnp.minimum(progress, 1.0))


def decays(name: str) -> bool:
    """Tells whether weight decay applies to the array of this dotted path: not to norms, biases."""
    return not name.endswith(("norm.weight", ".bias"))


def make_optimizer(config: OptimConfig, num_steps: int) -> optax.GradientTransformation:
    """Returns AdamW after optional clipping, over a flat dict of float32 arrays by dotted path."""
    adamw = optax.adamw(
        make_schedule(config, num_steps),
        b1=config.beta1,
        b2=config.beta2,
        eps=config.epsilon,
        weight_decay=config.weight_decay,
        mask=lambda params: {name: decays(name) for name in params},
    )
    if config.clip_norm is None:
        return adamw
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw)
