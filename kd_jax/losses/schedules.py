"""Schedules over the steps of a run."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

SHAPES: dict[str, Callable[[jax.Array], jax.Array]] = {
    "cosine": lambda progress: 0.5 * (1 + jnp.cos(math.pi * progress)),
    "linear": lambda progress: 1 - progress,
    "constant": jnp.ones_like,
}


def interpolate(start: float, end: float, shape: str, step: Any, num_steps: int) -> jax.Array:
    """Returns the value at `step`: `start` at step 0, `end` from step num_steps - 1 on."""
    progress = jnp.asarray(step, jnp.float32) / max(num_steps - 1, 1)
    return end + (start - end) * SHAPES[shape](jnp.minimum(progress, 1.0))
