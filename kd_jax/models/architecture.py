"""config.json: every constant of the decoder, checked."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from kd_jax.config import UserError
from kd_jax.models.config_keys import is_number, show, sort_keys
from kd_jax.models.layer_types import MOST_LAYERS, WINDOW_KEYS, read_windows
from kd_jax.parallel.processes import say


@dataclass(frozen=True, kw_only=True, slots=True)
class Rope:
    """Rotary position embedding (arXiv 2104.09864)."""

    theta: float
    rope_type: str = "default"
    """default; linear: all frequencies are divided by `factor`; llama3: the low ones are."""
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: float = 8192.0

    def inverse_frequencies(self, head_dim: int) -> np.ndarray:
        """Returns radians per position, [H / 2] float32.

        Llama 3's scaling multiplies wavelengths above original / low_freq_factor by `factor`, keeps
        those below original / high_freq_factor, and interpolates between.
        """
        # Rounded to float32 in the same places as the models' training code: at position 10,000
        # the last bit of a frequency is a thousandth of a radian.
        exponent = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
        power = (self.theta ** exponent.astype(np.float64)).astype(np.float32)
        frequency = np.float32(1) / power
        if self.rope_type == "linear":
            frequency = frequency / np.float32(self.factor)
        if self.rope_type == "llama3":
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
    layer_windows: tuple[int | None, ...] = ()
    """Tokens that each layer attends to, its own included; None: all before it. (): all in every
    layer."""


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

# Sizes, and a limit of each far above those of known models.
_SIZES = {
    "vocab_size": 2**24, "hidden_size": 2**20, "intermediate_size": 2**20,
    "num_hidden_layers": MOST_LAYERS, "num_attention_heads": 2**16,
}  # fmt: skip
_OPTIONAL_SIZES = {"num_key_value_heads": 2**16, "head_dim": 2**16}
_LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
# rope_type -> its parameters beside rope_theta.
_ROPE_FIELDS = {"default": (), "linear": ("factor",), "dynamic": ("factor",), "llama3": _LLAMA3}
_UNUSED = {"rope_type", "type", "original_max_position_embeddings"}
_LARGEST = float(np.finfo(np.float32).max)
_ROPE = (
    "rope_theta", "rope_scaling", "rope_parameters", "original_max_position_embeddings",
)  # fmt: skip
# Keys that are read by every family; all others are sorted by config_keys.
_READ = {*_SIZES, *_OPTIONAL_SIZES, *WINDOW_KEYS, *_ROPE}
_READ |= {"model_type", "rms_norm_eps", "tie_word_embeddings"}


def read_architecture(config: dict[str, Any], source: str) -> Architecture:
    """Returns the architecture in a parsed config.json; `source` is its path in messages.

    Keys that are left out have transformers' defaults. Unknown keys are named in a warning.

    Raises:
      UserError: a key is missing, invalid, or set to what the decoder does not implement; all such
        keys are listed.
    """
    family = config.get("model_type")
    defaults = _DEFAULTS.get(family, {}) if isinstance(family, str) else {}
    config = {"rms_norm_eps": 1e-6} | defaults | config
    key_problems, warnings = sort_keys(config, _READ)
    problems = _size_problems(config) + key_problems
    windows = read_windows(config, problems)
    rope = _read_rope(config, problems, warnings)
    if problems:
        lines = "\n  ".join(problems)
        raise UserError(f"{source}: this model cannot be run as configured:\n  {lines}")
    assert rope is not None
    for warning in warnings:
        say(f"warning: {source}: {warning}")
    kv_heads, head_dim = _head_sizes(config)
    return Architecture(
        **{key: config[key] for key in _SIZES},
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        rms_norm_eps=float(config["rms_norm_eps"]),
        tie_word_embeddings=bool(config.get("tie_word_embeddings")),
        rope=rope,
        layer_windows=windows,
        **FAMILIES[config["model_type"]],
    )


def _size_problems(config: dict[str, Any]) -> list[str]:
    """Returns an error for the family, each size and each plain number that cannot be used."""
    problems = []
    for key, most in {**_SIZES, **_OPTIONAL_SIZES}.items():
        value = config.get(key)
        optional = key in _OPTIONAL_SIZES and value is None
        if not optional and (type(value) is not int or not 1 <= value <= most):
            got = show(value) if key in config else "none"
            problems.append(f"{key}: expected a whole number from 1 to {most:,}, got {got}")
    if not problems:
        problems += _head_problems(config)
    family = config.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        problems.append(f"model_type: expected {'|'.join(FAMILIES)}, got {show(family)}")
    if not _is_positive(config["rms_norm_eps"]):
        got = show(config["rms_norm_eps"])
        problems.append(f"rms_norm_eps: expected a finite number above 0, got {got}")
    if not isinstance(config.get("tie_word_embeddings"), bool | None):
        got = show(config["tie_word_embeddings"])
        problems.append(f"tie_word_embeddings: expected true or false, got {got}")
    return problems


def _head_problems(config: dict[str, Any]) -> list[str]:
    """Returns an error for numbers of heads that do not divide what they share."""
    problems = []
    heads, (kv_heads, head_dim) = config["num_attention_heads"], _head_sizes(config)
    if heads % kv_heads:
        problems.append(f"num_key_value_heads: expected a divisor of {heads}, got {kv_heads}")
    if config.get("head_dim") is None and config["hidden_size"] % heads:
        problems.append(
            f"hidden_size: expected a multiple of num_attention_heads ({heads}), "
            f"got {config['hidden_size']}"
        )
    if head_dim % 2 or not head_dim:
        problems.append(f"head_dim: expected an even number, got {head_dim}")
    return problems


def _head_sizes(config: dict[str, Any]) -> tuple[int, int]:
    """Returns num_key_value_heads and head_dim, given or derived."""
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    return kv_heads, config.get("head_dim") or config["hidden_size"] // heads


def _is_positive(value: Any) -> bool:
    """Returns True for a number above 0 that is finite in float32."""
    return is_number(value) and 0 < value <= _LARGEST


def _read_rope(config: dict[str, Any], problems: list[str], warnings: list[str]) -> Rope | None:
    """Reads rope_theta with rope_scaling, or transformers 5's rope_parameters."""
    part = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(part, dict):
        problems.append(f"rope_scaling, rope_parameters: expected an object, got {show(part)}")
        return None
    fields = {"rope_theta": config.get("rope_theta", 10000.0)} | part
    kind = part.get("rope_type") or part.get("type") or "default"
    if not isinstance(kind, str) or kind not in _ROPE_FIELDS:
        problems.append(f"rope_type: expected {'|'.join(_ROPE_FIELDS)}, got {show(kind)}")
        return None
    if kind == "llama3":
        length = config.get("max_position_embeddings")
        fields.setdefault("original_max_position_embeddings", length)
    if kind == "llama3" and config.get("original_max_position_embeddings") is not None:
        fields["original_max_position_embeddings"] = config["original_max_position_embeddings"]
    wanted = ("rope_theta", *_ROPE_FIELDS[kind])
    for key in wanted:
        if not _is_positive(fields.get(key)):
            got = show(fields[key]) if key in fields else "none"
            problems.append(f"rope parameter {key}: expected a finite number above 0, got {got}")
    if kind == "llama3" and fields.get("low_freq_factor") == fields.get("high_freq_factor"):
        problems.append("rope parameter high_freq_factor: expected another than low_freq_factor")
    rest = {f"rope parameter {x}": fields[x] for x in fields.keys() - {*wanted, *_UNUSED}}
    rope_problems, rope_warnings = sort_keys(rest, ())
    problems += rope_problems
    warnings += rope_warnings
    if problems:
        return None
    if kind == "dynamic":
        warnings.append(
            "rope_type dynamic: computed without its scaling, as in transformers for texts of at "
            f"most {config.get('max_position_embeddings')} tokens (max_position_embeddings)"
        )
    if kind in ("default", "dynamic") or (kind == "linear" and fields["factor"] == 1):
        return Rope(theta=float(fields["rope_theta"]))
    scaling = {key: float(fields[key]) for key in _ROPE_FIELDS[kind]}
    return Rope(theta=float(fields["rope_theta"]), rope_type=kind, **scaling)
