"""LoRA: initial factors, and merging them into weights."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from kd_jax.config import LoraConfig
from kd_jax.models.architecture import Architecture
from kd_jax.models.weight_table import adapter_weights


def init_adapters(lora: LoraConfig, arch: Architecture, seed: int) -> dict[str, jax.Array]:
    """Returns A [L, rank, in], Kaiming-uniform, and B [L, out, rank], zero, float32 by path."""
    key = jax.random.key(seed)
    arrays = {}
    table = adapter_weights(lora, arch)
    for path in sorted(table, key=lambda path: ("self_attn" not in path, path)):
        shape = table[path].shape
        if path.endswith("lora_B"):
            arrays[path] = jnp.zeros(shape, jnp.float32)
            continue
        key, use = jax.random.split(key)
        bound = 1 / math.sqrt(shape[-1])
        arrays[path] = jax.random.uniform(use, shape, jnp.float32, -bound, bound)
    return arrays


def merge(weight: np.ndarray, factors: tuple[np.ndarray, np.ndarray], scale: float) -> np.ndarray:
    """Returns weight + scale B A, summed in float32 and cast once to the weight's dtype.

    Entries where scale B A is zero stay bit-identical, -0.0 included.

    Args:
      weight: [out, in], any float dtype.
      factors: A [rank, in] and B [out, rank].
    """
    A, B = factors
    delta = np.float32(scale) * (B.astype(np.float32) @ A.astype(np.float32))
    merged = (weight.astype(np.float32) + delta).astype(weight.dtype)
    return np.where(delta == 0, weight, merged)
