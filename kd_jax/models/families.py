"""The table of model families: what each has beside Llama's decoder, and its config.json."""

import math
from dataclasses import dataclass, field
from typing import Any

from kd_jax.models.config_keys import show
from kd_jax.models.rope import is_positive


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """One model_type of config.json."""

    fields: dict[str, Any] = field(default_factory=dict)
    """Fields of Architecture that differ from Llama's."""
    defaults: dict[str, Any] = field(default_factory=dict)
    """transformers' defaults for keys that are missing, where they differ from null."""
    keys: tuple[str, ...] = ()
    """Keys of FLAGS and NUMBERS that the family has."""
    scales_embedding: bool = False
    """Embeddings are multiplied by sqrt(hidden_size)."""
    fixed: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    """Keys with the values that the decoder implements; () ignores the key."""


# Keys -> the fields of Architecture that they turn on.
FLAGS = {"attention_bias": ("qkv_bias", "o_bias"), "mlp_bias": ("mlp_bias",)}
# Keys -> the field of Architecture that they set, and its power of the value.
NUMBERS = {
    "embedding_multiplier": ("embedding_multiplier", 1.0),
    "residual_multiplier": ("residual_multiplier", 1.0),
    "logits_scaling": ("logits_scaling", 1.0),
    "attention_multiplier": ("attention_scale", 1.0),
    "query_pre_attn_scalar": ("attention_scale", -0.5),
}

_BIASES = ("attention_bias", "mlp_bias")
_QWEN = {"num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28}
FAMILIES: dict[str, Family] = {
    "llama": Family(keys=_BIASES),
    "mistral": Family(defaults={"num_key_value_heads": 8, "sliding_window": 4096}),
    "qwen2": Family(fields={"qkv_bias": True}, defaults=_QWEN),
    "qwen3": Family(
        fields={"qk_norm": "head"},
        defaults={**_QWEN, "head_dim": 128},
        keys=("attention_bias",),
    ),
    "granite": Family(
        defaults={"attention_multiplier": 1.0},
        keys=(
            *_BIASES,
            "embedding_multiplier",
            "residual_multiplier",
            "logits_scaling",
            "attention_multiplier",
        ),
    ),
    "smollm3": Family(
        defaults={
            "num_key_value_heads": 4,
            "rope_theta": 2000000.0,
            "tie_word_embeddings": True,
            "no_rope_layer_interval": 4,
            "no_rope_layers": None,
        },
        keys=_BIASES,
    ),
    "olmo2": Family(
        fields={"qk_norm": "all", "norms": "after"},
        defaults={"rms_norm_eps": 1e-5},
        keys=("attention_bias",),
    ),
    "phi3": Family(
        fields={"fused_projections": True},
        defaults={"rms_norm_eps": 1e-5, "partial_rotary_factor": 1.0},
    ),
    "gemma3_text": Family(
        fields={
            "qk_norm": "head",
            "norms": "around",
            "norm_offset": 1.0,
            "hidden_act": "gelu_pytorch_tanh",
        },
        defaults={
            "num_key_value_heads": 4,
            "head_dim": 256,
            "tie_word_embeddings": True,
            "sliding_window": 4096,
            "query_pre_attn_scalar": 256,
            "hidden_activation": "gelu_pytorch_tanh",
            "sliding_window_pattern": 6,
            "rope_theta": 1000000.0,
            "rope_local_base_freq": 10000.0,
        },
        keys=("attention_bias", "query_pre_attn_scalar"),
        scales_embedding=True,
        fixed={"hidden_activation": ("gelu_pytorch_tanh",), "hidden_act": ()},
    ),
}


def read_options(config: dict[str, Any], family: Family, problems: list[str]) -> dict[str, Any]:
    """Returns the fields of Architecture that a family's own keys set; adds errors to `problems`.

    Args:
      config: with the family's defaults.
    """
    fields: dict[str, Any] = {}
    for key in family.keys:
        value = config.get(key)
        if key in FLAGS:
            if not isinstance(value, bool | None):
                problems.append(f"{key}: expected true or false, got {show(value)}")
            fields |= dict.fromkeys(FLAGS[key] if value else (), True)
        elif value is not None:
            if not is_positive(value):
                problems.append(f"{key}: expected a finite number above 0, got {show(value)}")
            else:
                name, power = NUMBERS[key]
                fields[name] = float(value) ** power
    for key, values in family.fixed.items():
        if values and config.get(key) not in values:
            problems.append(f"{key}: expected {values[0]}, got {show(config.get(key))}")
    if family.scales_embedding and is_positive(config.get("hidden_size")):
        fields["embedding_multiplier"] = math.sqrt(config["hidden_size"])
    return fields
