"""Low-rank adapters: add them to a model, and their names in PEFT's files."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from kd_jax.config import LoraConfig
from kd_jax.model import Decoder, Linear, LoraParam

FACTORS = ("lora_A", "lora_B")


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


def is_adapter(name: str) -> bool:
    """Tells whether an array's dotted path is that of a low-rank factor."""
    return name.endswith(FACTORS)


def peft_name(module: str, factor: str) -> str:
    """Returns PEFT's name of a factor: `base_model.model.` + module + `.lora_A.weight`."""
    return f"base_model.model.{module}.{factor}.weight"
