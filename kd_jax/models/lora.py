"""Low-rank adapters: add them to a model, merge them, and PEFT's names and configuration."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from kd_jax.config import LoraConfig
from kd_jax.models.decoder import Decoder, Layer, Linear, LoraParam
from kd_jax.models.table import FACTORS


def factor_dims(name: str, dims: tuple[str, ...]) -> tuple[str, str, str]:
    """Returns the logical dimensions of a stacked factor whose weight has `dims` [L, out, in]."""
    layers, out, into = dims
    return (layers, "rank", into) if name.endswith("lora_A") else (layers, out, "rank")


def add_adapters(
    model: Decoder, config: LoraConfig, key: jax.Array, start: Mapping[str, Any] | None = None
) -> None:
    """Adds A [L, rank, in] and B [L, out, rank], float32, to the target projections.

    A is Kaiming-uniform and B zero, so the model computes what it did before; `start` holds values
    to begin from instead, by the names that `named_arrays` gives.
    """
    blocks = {"self_attn": model.layers.self_attn, "mlp": model.layers.mlp}
    for block_name, block in blocks.items():
        for name in sorted(vars(block)):
            linear = getattr(block, name)
            if not isinstance(linear, Linear) or name not in config.target_modules:
                continue
            key, use = jax.random.split(key)
            L, num_out, num_in = linear.weight.shape
            path = f"layers.{block_name}.{name}"
            if start is None:
                bound = 1 / math.sqrt(num_in)
                shape = (L, config.rank, num_in)
                A = jax.random.uniform(use, shape, jnp.float32, -bound, bound)
                B = jnp.zeros((L, num_out, config.rank), jnp.float32)
            else:
                A, B = (jnp.asarray(start[f"{path}.{factor}"]) for factor in FACTORS)
            linear.lora_A = nnx.data(LoraParam(A))
            linear.lora_B = nnx.data(LoraParam(B))
            linear.scale = config.alpha / config.rank
            linear.dropout = config.dropout


def merge_adapters(layer: Layer) -> None:
    """Adds the adapters of one layer, cut out of the stack, to its weights, which keep their dtype.

    Summed in float32 and rounded once, as `merge` does for what is exported.
    """
    for block in (layer.self_attn, layer.mlp):
        for linear in vars(block).values():
            if isinstance(linear, Linear) and linear.lora_A is not None:
                assert linear.lora_B is not None
                weight = linear.weight[...]
                delta = linear.scale * (linear.lora_B[...] @ linear.lora_A[...])
                linear.weight[...] = (weight.astype(jnp.float32) + delta).astype(weight.dtype)
                linear.lora_A = linear.lora_B = nnx.data(None)


def merge(weight: np.ndarray, factors: tuple[np.ndarray, np.ndarray], scale: float) -> np.ndarray:
    """Returns weight + scale B A, summed in float32 and rounded once to the weight's dtype.

    Entries where scale B A is zero keep their bits, -0.0 included.

    Args:
      weight: [out, in], any float dtype.
      factors: A [rank, in] and B [out, rank].
    """
    A, B = factors
    delta = np.float32(scale) * (B.astype(np.float32) @ A.astype(np.float32))
    merged = (weight.astype(np.float32) + delta).astype(weight.dtype)
    return np.where(delta == 0, weight, merged)
