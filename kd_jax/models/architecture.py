"""config.json: every constant of the decoder, checked."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from kd_jax.config import UserError


@dataclass(frozen=True, kw_only=True, slots=True)
class Rope:
    """Rotary position embedding (arXiv 2104.09864), with Llama 3's scaling where factor is set."""

    theta: float
    factor: float | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192

    def inverse_frequencies(self, head_dim: int) -> np.ndarray:
        """Returns radians per position, [H / 2] float32.

        Scaling multiplies wavelengths above original / low_freq_factor by `factor`, keeps those
        below original / high_freq_factor, and interpolates between.
        """
        # Rounded to float32 in the same places as the models' training code: at position 10,000
        # the last bit of a frequency is a thousandth of a radian.
        exponent = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
        power = (self.theta ** exponent.astype(np.float64)).astype(np.float32)
        frequency = np.float32(1) / power
        if self.factor is not None:
            turns = self.original_max_position_embeddings * frequency / np.float32(2 * math.pi)
            blend = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
            blend = np.clip(blend, 0.0, 1.0)
            frequency = (1 - blend) * frequency / self.factor + blend * frequency
        return frequency.astype(np.float32)


@dataclass(frozen=True, kw_only=True, slots=True)
class Architecture:
    """Every constant of the decoder, under its config.json name."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    rope: Rope
    qkv_bias: bool = False
    """q_proj, k_proj and v_proj have a bias; o_proj never has one. From model_type."""
    qk_norm: bool = False
    """RMSNorm on each query and key head before RoPE. From model_type."""


# model_type -> fields of Architecture that differ from Llama's.
FAMILIES: dict[str, dict[str, bool]] = {
    "llama": {},
    "mistral": {},
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qk_norm": True},
}

# transformers' defaults for keys missing in config.json, where they differ from null.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {"num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28},
    "qwen3": {
        "num_key_value_heads": 32, "head_dim": 128, "sliding_window": 4096, "max_window_layers": 28,
    },
}  # fmt: skip

# Keys of config.json that do not change what the decoder computes.
_IGNORED = {
    "architectures", "auto_map", "bos_token_id", "chunk_size_feed_forward",
    "dtype", "eos_token_id", "id2label", "initializer_range", "is_decoder", "is_encoder_decoder",
    "label2id", "max_position_embeddings", "name_or_path", "_name_or_path", "output_attentions",
    "output_hidden_states", "pad_token_id", "pretraining_tp", "problem_type", "return_dict",
    "torch_dtype", "transformers_version", "use_cache", "unsloth_fixed", "unsloth_version",
}  # fmt: skip

_SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
)  # fmt: skip
_OPTIONAL_SIZES = ("num_key_value_heads", "head_dim")

# Keys that change the computation, with the values that the decoder implements.
_FIXED: dict[str, tuple[Any, ...]] = {
    "model_type": tuple(FAMILIES),
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "attention_dropout": (0.0, None),
    "mlp_bias": (False,),
    "quantization_config": (None,),
    "add_cross_attention": (False,),
    "partial_rotary_factor": (None, 1.0),
}
_WINDOW = ("sliding_window", "use_sliding_window", "max_window_layers", "layer_types")
_SCALING = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def read_architecture(config: dict[str, Any], source: str) -> Architecture:
    """Returns the architecture in a parsed config.json; `source` is its path in errors.

    Raises:
      UserError: a key is missing, invalid, unknown, or set to what the decoder does not implement;
        all such keys are listed.
    """
    family = config.get("model_type")
    config = _DEFAULTS.get(family, {}) | config if isinstance(family, str) else config
    problems = _key_problems(config) + _window_problems(config)
    rope = _read_rope(config, problems)
    if problems:
        lines = "\n  ".join(problems)
        raise UserError(f"{source}: this model cannot be run as configured:\n  {lines}")
    assert rope is not None
    kv_heads, head_dim = _head_sizes(config)
    return Architecture(
        **{key: config[key] for key in _SIZES},
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        rms_norm_eps=config["rms_norm_eps"],
        tie_word_embeddings=bool(config.get("tie_word_embeddings")),
        rope=rope,
        **FAMILIES[config["model_type"]],
    )


def _key_problems(config: dict[str, Any]) -> list[str]:
    """Returns an error for each key outside RoPE and sliding windows that cannot be used."""
    problems = []
    for key in (*_SIZES, *_OPTIONAL_SIZES):
        value = config.get(key)
        optional = key in _OPTIONAL_SIZES and value is None
        if not optional and (type(value) is not int or value < 1):
            got = repr(value) if key in config else "none"
            problems.append(f"{key}: expected a whole number of at least 1, got {got}")
    if not problems:
        heads, (kv_heads, head_dim) = config["num_attention_heads"], _head_sizes(config)
        if heads % kv_heads:
            problems.append(f"num_key_value_heads: expected a divisor of {heads}, got {kv_heads}")
        if config.get("head_dim") is None and config["hidden_size"] % heads:
            problems.append(
                f"hidden_size: expected a multiple of num_attention_heads ({heads}), "
                f"got {config['hidden_size']}"
            )
        if head_dim % 2:
            problems.append(f"head_dim: expected an even number, got {head_dim}")
    if not _is_positive(config.get("rms_norm_eps")):
        problems.append(
            f"rms_norm_eps: expected a number above 0, got {config.get('rms_norm_eps')!r}"
        )
    if config.get("tie_word_embeddings") not in (True, False, None):
        got = config["tie_word_embeddings"]
        problems.append(f"tie_word_embeddings: expected true or false, got {got!r}")
    for key, values in _FIXED.items():
        if (key in config or key == "model_type") and config.get(key) not in values:
            wanted = "|".join(values) if key == "model_type" else repr(values[0])
            problems.append(f"{key}: expected {wanted}, got {config.get(key)!r}")
    read = {*_SIZES, *_OPTIONAL_SIZES, *_FIXED, *_IGNORED, *_WINDOW, "rms_norm_eps"}
    read |= {"tie_word_embeddings", "rope_theta", "rope_scaling", "rope_parameters"}
    return problems + [
        f"{key}: unknown, got {value!r}"
        for key, value in config.items()
        if key not in read and not (value is None or value is False or value in ([], {}))
    ]


def _window_problems(config: dict[str, Any]) -> list[str]:
    """Returns an error for each key that turns on a sliding window in some layer."""
    depth, window = config.get("num_hidden_layers"), config.get("sliding_window")
    switch = config.get("use_sliding_window")
    if config.get("model_type") in ("qwen2", "qwen3"):
        first = config["max_window_layers"]
        if not switch or window is None or (isinstance(first, int) and first >= (depth or 0)):
            window = switch = None
    keys = {"sliding_window": (window, None), "use_sliding_window": (switch, False)}
    problems = [
        f"{key}: expected {wanted}, got {got!r}"
        for key, (got, wanted) in keys.items()
        if got is not None and got is not wanted
    ]
    types = config.get("layer_types")
    if types is not None and types != ["full_attention"] * (depth or 0):
        problems.append(f"layer_types: expected full_attention for each layer, got {types!r:.80}")
    return problems


def _head_sizes(config: dict[str, Any]) -> tuple[int, int]:
    """Returns num_key_value_heads and head_dim, given or derived."""
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    return kv_heads, config.get("head_dim") or config["hidden_size"] // heads


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


def _read_rope(config: dict[str, Any], problems: list[str]) -> Rope | None:
    """Reads rope_theta with rope_scaling, or transformers 5's rope_parameters."""
    parts = [config.get(key) or {} for key in ("rope_scaling", "rope_parameters")]
    if not all(isinstance(part, dict) for part in parts):
        problems.append("rope_scaling, rope_parameters: expected an object or null")
        return None
    fields = {"rope_theta": config.get("rope_theta", 10000.0)} | parts[0] | parts[1]
    kind = fields.pop("rope_type", None) or fields.pop("type", None) or "default"
    fields.pop("type", None)
    if kind not in ("default", "llama3"):
        problems.append(f"rope_type: expected 'default' or 'llama3', got {kind!r}")
    if fields.pop("partial_rotary_factor", None) not in (None, 1.0):
        problems.append("partial_rotary_factor: expected 1.0")
    wanted = ("rope_theta", *(_SCALING if kind == "llama3" else ()))
    for key in wanted:
        if not _is_positive(fields.get(key)):
            got = repr(fields[key]) if key in fields else "none"
            problems.append(f"rope parameter {key}: expected a number above 0, got {got}")
    if kind == "llama3" and fields.get("low_freq_factor") == fields.get("high_freq_factor"):
        problems.append("rope parameter high_freq_factor: expected another than low_freq_factor")
    known = wanted if kind == "default" else ("rope_theta", *_SCALING)
    unknown = sorted(fields.keys() - set(known))
    problems += [f"rope parameter {key}: unknown, got {fields[key]!r}" for key in unknown]
    if problems:
        return None
    return Rope(
        theta=float(fields["rope_theta"]),
        **{key: fields[key] for key in _SCALING if kind == "llama3"},
    )
