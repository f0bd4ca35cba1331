"""Shapes of schedules, over the progress of a run."""

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
    """Returns what goes from `start` at step 0 to `end` at the last of num_steps, and stays."""
    progress = jnp.asarray(step, jnp.float32) / max(num_steps - 1, 1)
    return end + (start - end) * SHAPES[shape](jnp.minimum(progress, 1.0))
