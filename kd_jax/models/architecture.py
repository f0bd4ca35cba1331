"""config.json: every constant of the decoder, checked."""

from dataclasses import dataclass, field
from typing import Any, Literal

from kd_jax.config import UserError
from kd_jax.models.config_keys import show, sort_keys
from kd_jax.models.families import FAMILIES, Family, read_options
from kd_jax.models.layer_types import MOST_LAYERS, WINDOW_KEYS, read_ropes, read_windows
from kd_jax.models.rope import ROPE_KEYS, Rope, is_positive
from kd_jax.parallel.processes import say


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
    other_rope: Rope | None = None
    """RoPE of the layers in `other_rope_layers`."""
    other_rope_layers: tuple[bool, ...] = ()
    """() if there is no other RoPE."""
    hidden_act: Literal["silu", "gelu_pytorch_tanh"] = "silu"
    fused_projections: bool = False
    """qkv_proj in place of q_proj, k_proj and v_proj, gate_up_proj in place of gate_proj and
    up_proj."""
    qkv_bias: bool = False
    """q_proj, k_proj and v_proj have a bias."""
    o_bias: bool = False
    mlp_bias: bool = False
    """gate_proj, up_proj and down_proj have a bias."""
    qk_norm: Literal["none", "head", "all"] = "none"
    """RMSNorm of queries and keys before RoPE: of each head, or of all heads together."""
    norms: Literal["before", "after", "around"] = "before"
    """Places of a layer's RMSNorms: at the inputs of attention and MLP, their outputs, or both."""
    norm_offset: float = 0.0
    """Added to the weight of each RMSNorm."""
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    """Factor of what attention and MLP add to the residual stream."""
    logits_scaling: float = 1.0
    """Divides the logits."""
    attention_scale: float | None = None
    """Factor of q kᵀ; None: 1 / sqrt(head_dim)."""
    layer_windows: tuple[int | None, ...] = ()
    """Tokens that each layer attends to, its own included; None: all before it. (): all in every
    layer."""
    max_position_embeddings: int | None = field(default=None, compare=False)
    """Tokens of the longest text the model was made for; no computation depends on it. None:
    unknown."""


# Sizes, and a limit of each far above those of known models.
_SIZES = {
    "vocab_size": 2**24, "hidden_size": 2**20, "intermediate_size": 2**20,
    "num_hidden_layers": MOST_LAYERS, "num_attention_heads": 2**16,
}  # fmt: skip
_OPTIONAL_SIZES = {"num_key_value_heads": 2**16, "head_dim": 2**16}
# Keys that are read by every family; all others are sorted by config_keys.
_READ = {*_SIZES, *_OPTIONAL_SIZES, *WINDOW_KEYS, *ROPE_KEYS}
_READ |= {"model_type", "rms_norm_eps", "tie_word_embeddings"}


def read_architecture(config: dict[str, Any], source: str) -> Architecture:
    """Returns the architecture in a parsed config.json; `source` is its path in messages.

    Keys that are left out have transformers' defaults. Unknown keys are named in a warning.

    Raises:
      UserError: a key is missing, invalid, or set to what the decoder does not implement; all such
        keys are listed.
    """
    family = FAMILIES.get(str(config.get("model_type")), Family())
    config = {"rms_norm_eps": 1e-6} | family.defaults | config
    own = (*family.keys, *family.fixed, *family.defaults)
    key_problems, warnings = sort_keys(config, _READ.union(own))
    problems = _size_problems(config) + key_problems
    fields = family.fields | read_options(config, family, problems)
    windows = read_windows(config, problems)
    ropes = read_ropes(config, windows, problems, warnings)
    if problems:
        lines = "\n  ".join(problems)
        raise UserError(f"{source}: this model cannot be run as configured:\n  {lines}")
    for warning in warnings:
        say(f"warning: {source}: {warning}")
    kv_heads, head_dim = _head_sizes(config)
    return Architecture(
        **{key: config[key] for key in _SIZES},
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        rms_norm_eps=float(config["rms_norm_eps"]),
        tie_word_embeddings=bool(config.get("tie_word_embeddings")),
        layer_windows=windows,
        max_position_embeddings=_context(config),
        **ropes,
        **fields,
    )


def _context(config: dict[str, Any]) -> int | None:
    context = config.get("max_position_embeddings")
    return context if type(context) is int and context > 0 else None


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
    if not is_positive(config["rms_norm_eps"]):
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


def describe_context(
    arch: Architecture, seq_len: int, field: str, option: str = "data.seq-len"
) -> str:
    """Returns a warning if rows are longer than the model's context, else ""."""
    context = arch.max_position_embeddings
    if context is None or seq_len <= context:
        return ""
    return (
        f"warning: {option}: rows of {seq_len:,} tokens exceed the {field}'s context "
        f"(max_position_embeddings {context:,}). A longer document is read at positions that the "
        "model has not seen"
    )
