"""Low-rank adapters: add them to a model, merge them, and PEFT's names and configuration."""

import math
import re
from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from kd_jax.config import LoraConfig
from kd_jax.config.run import LINEAR_NAMES
from kd_jax.models.decoder import Decoder, Layer, Linear, LoraParam

FACTORS = ("lora_A", "lora_B")


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


def is_adapter(name: str) -> bool:
    """Tells whether an array's dotted path is that of a low-rank factor."""
    return name.endswith(FACTORS)


def merge(weight: np.ndarray, factors: tuple[np.ndarray, np.ndarray], scale: float) -> np.ndarray:
    """Returns weight + scale B A, summed in float32 and rounded to the weight's dtype.

    Entries that the adapter leaves alone keep their bits, the sign of zero too.
    """
    A, B = factors
    delta = np.float32(scale) * (B.astype(np.float32) @ A.astype(np.float32))
    merged = (weight.astype(np.float32) + delta).astype(weight.dtype)
    return np.where(delta == 0, weight, merged)


def peft_name(module: str, factor: str) -> str:
    """Returns PEFT's name of a factor: `base_model.model.` + module + `.lora_A.weight`."""
    return f"base_model.model.{module}.{factor}.weight"


# Keys of adapter_config.json that do not change what a saved adapter computes.
_IGNORED = {
    "auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode",
    "peft_version", "lora_dropout", "loftq_config", "eva_config", "corda_config", "lora_ga_config",
    "megatron_core", "qalora_group_size", "runtime_config", "ensure_weight_tying",
}  # fmt: skip


_READ = {
    "r", "lora_alpha", "use_rslora", "target_modules", "exclude_modules", "layers_to_transform",
    "layers_pattern",
}  # fmt: skip


# Keys that change the computation, with the only values under which plain LoRA is right. The other
# initialisations (pissa, olora, loftq, ...) change the base model's weights as well.
_FIXED: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "use_dora": (False, None),
    "bias": ("none", None),
    "modules_to_save": (None, []),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "fan_in_fan_out": (False, None),
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
}


def peft_problems(config: Mapping[str, Any]) -> list[str]:
    """Returns what a parsed adapter_config.json asks for that plain LoRA does not do."""
    problems = [
        f"{key}: expected {values[0]!r}, got {config.get(key)!r}"
        for key, values in _FIXED.items()
        if config.get(key) not in values
    ]
    problems += [
        f"{key}: unknown, got {value!r}"
        for key, value in config.items()
        if key not in _FIXED.keys() | _IGNORED | _READ and value not in (None, False, [], {})
    ]
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if type(rank) is not int or rank < 1:
        problems.append(f"r: expected a whole number of at least 1, got {rank!r}")
    if not isinstance(alpha, int | float) or alpha <= 0:
        problems.append(f"lora_alpha: expected a number above 0, got {alpha!r}")
    return problems


def peft_targets(
    config: Mapping[str, Any], modules: Collection[str], problems: list[str]
) -> set[str]:
    """Returns those of the `model.layers.N...` modules that PEFT adapts under this config."""
    wanted, excluded = config.get("target_modules") or [], config.get("exclude_modules") or []
    layers = config.get("layers_to_transform")
    chosen = {layers} if isinstance(layers, int) else set(layers or [])
    try:
        for part in [wanted] if isinstance(wanted, str) else [[name] for name in wanted]:
            if not any(_is_named(module, part) for module in modules):
                known = ", ".join(LINEAR_NAMES)
                problems.append(f"target_modules: expected some of {known}, got {part}")
        found = {m for m in modules if _is_named(m, wanted) and not _is_named(m, excluded)}
    except re.error as error:
        problems.append(f"target_modules, exclude_modules: not a regular expression ({error})")
        return set()
    return {m for m in found if not chosen or int(m.split(".")[2]) in chosen}


def _is_named(module: str, names: str | list[str]) -> bool:
    """Tells whether PEFT's `names`, an expression or endings, mean this module."""
    if isinstance(names, str):
        return names == "all-linear" or re.fullmatch(names, module) is not None
    return any(f".{module}".endswith(f".{name}") for name in names)
