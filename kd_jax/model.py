"""The decoder, its architecture read from a Hugging Face config.json.

Dimensions: B batch, S sequence, D embed, F mlp, N query heads, K key/value heads, H head dim,
V vocab, L layers. Weights keep Hugging Face names and orientation, [out, in]; those of the layers
are stacked on a leading L and run by a scan.
"""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from kd_jax.attention import attention
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

        With scaling, wavelengths above original / low_freq_factor are stretched by `factor`, those
        below original / high_freq_factor are kept, and the ones between are blended.
        """
        # Rounded to float32 where the models' own training code rounds: at position 10,000 the
        # last bit of a frequency is a thousandth of a radian.
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


# Keys of config.json that do not change what the decoder computes.
_IGNORED = {
    "architectures", "attention_dropout", "auto_map", "bos_token_id", "chunk_size_feed_forward",
    "dtype", "eos_token_id", "id2label", "initializer_range", "is_decoder", "is_encoder_decoder",
    "label2id", "max_position_embeddings", "name_or_path", "_name_or_path", "output_attentions",
    "output_hidden_states", "pad_token_id", "pretraining_tp", "problem_type", "return_dict",
    "torch_dtype", "transformers_version", "use_cache", "unsloth_fixed", "unsloth_version",
}  # fmt: skip
_REQUIRED = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "rms_norm_eps",
)  # fmt: skip
# Keys that change the computation, with the only values under which the decoder is right.
_FIXED: dict[str, tuple[Any, ...]] = {
    "model_type": ("llama",),
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "sliding_window": (None,),
    "use_sliding_window": (False,),
    "quantization_config": (None,),
    "add_cross_attention": (False,),
    "partial_rotary_factor": (None, 1.0),
}
_ROPE_KEYS = {
    "rope_type", "type", "rope_theta", "factor", "low_freq_factor", "high_freq_factor",
    "original_max_position_embeddings",
}  # fmt: skip


def read_architecture(config: dict[str, Any], source: str) -> Architecture:
    """Returns the architecture in a parsed config.json, whose place `source` names in errors.

    Raises:
      UserError: a key is missing, or asks for a computation that the decoder does not do; all
        such keys are listed.
    """
    problems = [f"{key}: missing" for key in _REQUIRED if key not in config]
    read = {*_REQUIRED, *_FIXED, *_IGNORED, "num_key_value_heads", "head_dim"}
    read |= {"tie_word_embeddings", "rope_theta", "rope_scaling", "rope_parameters"}
    for key, values in _FIXED.items():
        absent_is_wrong = key == "model_type"
        if (key in config or absent_is_wrong) and config.get(key) not in values:
            problems.append(f"{key}: expected {values[0]!r}, got {config.get(key)!r}")
    problems += [
        f"{key}: unknown, got {value!r}"
        for key, value in config.items()
        if key not in read and value not in (None, False, [], {})
    ]
    rope = _read_rope(config, problems)
    heads, hidden = config.get("num_attention_heads", 1), config.get("hidden_size", 0)
    kv_heads = config.get("num_key_value_heads") or heads
    if heads % kv_heads:
        problems.append(f"num_key_value_heads: expected a divisor of {heads}, got {kv_heads}")
    if problems:
        lines = "\n  ".join(problems)
        raise UserError(f"{source}: this model cannot be run as configured:\n  {lines}")
    return Architecture(
        **{key: config[key] for key in _REQUIRED},
        num_key_value_heads=kv_heads,
        head_dim=config.get("head_dim") or hidden // heads,
        tie_word_embeddings=config.get("tie_word_embeddings", False),
        rope=rope,
    )


def _read_rope(config: dict[str, Any], problems: list[str]) -> Rope:
    """Reads both spellings: rope_theta with rope_scaling, and transformers 5's rope_parameters."""
    fields = {"rope_theta": config.get("rope_theta", 10000.0)}
    fields |= config.get("rope_scaling") or {}
    fields |= config.get("rope_parameters") or {}
    kind = fields.get("rope_type", fields.get("type", "default"))
    if kind not in ("default", "llama3"):
        problems.append(f"rope_type: expected 'default' or 'llama3', got {kind!r}")
    partial = fields.get("partial_rotary_factor", 1.0)
    if partial != 1.0:
        problems.append(f"partial_rotary_factor: expected 1.0, got {partial!r}")
    unknown = sorted(fields.keys() - _ROPE_KEYS - {"partial_rotary_factor"})
    problems += [f"rope parameter {key}: unknown, got {fields[key]!r}" for key in unknown]
    theta = float(fields["rope_theta"])
    if kind != "llama3":
        return Rope(theta=theta)
    scaling = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    missing = [key for key in scaling if key not in fields]
    problems += [f"rope parameter {key}: missing" for key in missing]
    return Rope(theta=theta, **{key: fields[key] for key in scaling if key in fields})


@dataclass(frozen=True, slots=True)
class Weight:
    """What one tensor looks like: its shape and the logical names of its dimensions."""

    shape: tuple[int, ...]
    dims: tuple[str, ...]


def layer_weights(arch: Architecture) -> dict[str, Weight]:
    """Returns each tensor of one layer by its name below `model.layers.N.`."""
    D, F, H = arch.hidden_size, arch.intermediate_size, arch.head_dim
    NH, KH = arch.num_attention_heads * H, arch.num_key_value_heads * H
    column, row = ("out", "in"), ("in", "out")  # which side tensor parallelism splits
    return {
        "input_layernorm.weight": Weight((D,), ("norm",)),
        "self_attn.q_proj.weight": Weight((NH, D), row),
        "self_attn.k_proj.weight": Weight((KH, D), row),
        "self_attn.v_proj.weight": Weight((KH, D), row),
        "self_attn.o_proj.weight": Weight((D, NH), column),
        "post_attention_layernorm.weight": Weight((D,), ("norm",)),
        "mlp.gate_proj.weight": Weight((F, D), row),
        "mlp.up_proj.weight": Weight((F, D), row),
        "mlp.down_proj.weight": Weight((D, F), column),
    }


def weights(arch: Architecture) -> dict[str, Weight]:
    """Returns every tensor of the model by dotted path; those of the layers have a leading L."""
    V, D, L = arch.vocab_size, arch.hidden_size, arch.num_hidden_layers
    table = {
        f"layers.{name}": Weight((L, *weight.shape), ("layers", *weight.dims))
        for name, weight in layer_weights(arch).items()
    }
    table["embed_tokens.weight"] = Weight((V, D), ("vocab", "embed"))
    table["norm.weight"] = Weight((D,), ("norm",))
    if not arch.tie_word_embeddings:
        table["lm_head.weight"] = Weight((V, D), ("vocab", "embed"))
    return table


class LoraParam(nnx.Param):
    """A trainable low-rank factor."""


class Linear(nnx.Module):
    """y = x Wᵀ, plus scale (x Aᵀ) Bᵀ where adapters were added."""

    def __init__(self, weight: Any, dtype: Any):
        self.weight = nnx.Param(weight)
        self.dtype = dtype
        self.lora_A: LoraParam | None = nnx.data(None)
        self.lora_B: LoraParam | None = nnx.data(None)
        self.scale = 0.0
        self.dropout = 0.0

    def __call__(self, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """Maps [B, S, in] to [B, S, out] in the model's dtype; `key` turns dropout on."""
        y = _project(x, self.weight[...], self.dtype)
        if self.lora_A is None or self.lora_B is None:
            return y
        if key is not None and self.dropout > 0:
            keep = jax.random.bernoulli(key, 1 - self.dropout, x.shape)
            x = jnp.where(keep, x / (1 - self.dropout), 0).astype(x.dtype)
        low = _project(x, self.lora_A[...], self.dtype)
        return y + self.scale * _project(low, self.lora_B[...], self.dtype)


def _project(x: jax.Array, weight: jax.Array, dtype: Any) -> jax.Array:
    weight = weight.astype(dtype)  # float32 master weights multiply in the model's dtype
    return jnp.einsum("BSi,oi->BSo", x, weight)


class RMSNorm(nnx.Module):
    """x / rms(x) * weight (arXiv 1910.07467)."""

    def __init__(self, weight: Any, eps: float):
        self.weight = nnx.Param(weight)
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        x32 = x.astype(jnp.float32)  # the mean of squares overflows and rounds in bfloat16
        scale = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
        normed = (x32 * scale).astype(x.dtype)  # before the weight, as in transformers
        weight = self.weight[...].astype(x.dtype)
        return normed * weight[None, None]


class Attention(nnx.Module):
    def __init__(self, w: dict[str, Any], arch: Architecture, dtype: Any, implementation: str):
        self.q_proj = Linear(w["q_proj.weight"], dtype)
        self.k_proj = Linear(w["k_proj.weight"], dtype)
        self.v_proj = Linear(w["v_proj.weight"], dtype)
        self.o_proj = Linear(w["o_proj.weight"], dtype)
        self.head_dim = arch.head_dim
        self.implementation = implementation

    def __call__(self, x, rope, segment_ids, keys):
        B, S, _ = x.shape
        q = self.q_proj(x, keys[0]).reshape(B, S, -1, self.head_dim)
        k = self.k_proj(x, keys[1]).reshape(B, S, -1, self.head_dim)
        v = self.v_proj(x, keys[2]).reshape(B, S, -1, self.head_dim)
        q, k = rotate(q, *rope), rotate(k, *rope)
        out = attention(q, k, v, segment_ids, implementation=self.implementation)
        return self.o_proj(out.reshape(B, S, -1), keys[3])


class MLP(nnx.Module):
    def __init__(self, w: dict[str, Any], dtype: Any):
        self.gate_proj = Linear(w["gate_proj.weight"], dtype)
        self.up_proj = Linear(w["up_proj.weight"], dtype)
        self.down_proj = Linear(w["down_proj.weight"], dtype)

    def __call__(self, x, keys):
        gate = jax.nn.silu(self.gate_proj(x, keys[0]))
        return self.down_proj(gate * self.up_proj(x, keys[1]), keys[2])


class Layer(nnx.Module):
    def __init__(self, w: dict[str, Any], arch: Architecture, dtype: Any, implementation: str):
        self.input_layernorm = RMSNorm(w["input_layernorm.weight"], arch.rms_norm_eps)
        self.self_attn = Attention(_below(w, "self_attn."), arch, dtype, implementation)
        self.post_attention_layernorm = RMSNorm(
            w["post_attention_layernorm.weight"], arch.rms_norm_eps
        )
        self.mlp = MLP(_below(w, "mlp."), dtype)

    def __call__(self, x, rope, segment_ids, key):
        keys = [None] * 7 if key is None else list(jax.random.split(key, 7))
        x = x + self.self_attn(self.input_layernorm(x), rope, segment_ids, keys[:4])
        return x + self.mlp(self.post_attention_layernorm(x), keys[4:])


class Embedding(nnx.Module):
    def __init__(self, weight: Any):
        self.weight = nnx.Param(weight)


class Head(nnx.Module):
    """The output head's weight; the product is taken by kd_head, chunk by chunk."""

    def __init__(self, weight: Any):
        self.weight = nnx.Param(weight)


class Decoder(nnx.Module):
    """A Llama decoder; a tied head is the absence of `lm_head`."""

    def __init__(
        self,
        arch: Architecture,
        arrays: dict[str, Any],
        *,
        dtype: Any,
        implementation: str = "auto",
        remat: str = "none",
    ):
        """Takes every array of `weights(arch)` by name."""
        self.embed_tokens = Embedding(arrays["embed_tokens.weight"])
        self.layers = Layer(_below(arrays, "layers."), arch, dtype, implementation)
        self.norm = RMSNorm(arrays["norm.weight"], arch.rms_norm_eps)
        tied = arch.tie_word_embeddings
        self.lm_head = nnx.data(None if tied else Head(arrays["lm_head.weight"]))
        self.arch = arch
        self.dtype = dtype
        self.remat = remat

    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        segment_ids: jax.Array,
        dropout_key: jax.Array | None = None,
    ) -> jax.Array:
        """Maps tokens, positions and segment ids, each [B, S] int32, to hidden states [B, S, D]."""
        x = self.embed_tokens.weight[...][tokens].astype(self.dtype)
        rope = rope_tables(positions, self.arch.rope, self.arch.head_dim, self.dtype)

        def run_layer(x, layer_and_key):
            layer, key = layer_and_key
            return layer(x, rope, segment_ids, key), None

        depth = self.arch.num_hidden_layers
        keys = None if dropout_key is None else jax.random.split(dropout_key, depth)
        x, _ = jax.lax.scan(_with_remat(run_layer, self.remat), x, (self.layers, keys))
        return self.norm(x)

    def head_weight(self) -> jax.Array:
        """Returns the output head, [V, D]."""
        source = self.embed_tokens if self.lm_head is None else self.lm_head
        return source.weight[...]


def _with_remat(run_layer, policy: str):
    if policy == "none":
        return run_layer
    dots = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    saved = {"layer": None, "dots": dots}[policy]
    return jax.checkpoint(run_layer, policy=saved, prevent_cse=False)


def _below(tree: dict[str, Any], prefix: str) -> dict[str, Any]:
    return {name.removeprefix(prefix): v for name, v in tree.items() if name.startswith(prefix)}


def rope_tables(
    positions: jax.Array, rope: Rope, head_dim: int, dtype: Any
) -> tuple[jax.Array, jax.Array]:
    """Returns cos and sin of each position's angles, [B, S, 1, H / 2]."""
    frequency = jnp.asarray(rope.inverse_frequencies(head_dim))
    angle = positions.astype(jnp.float32)[:, :, None, None] * frequency[None, None, None]
    return jnp.cos(angle).astype(dtype), jnp.sin(angle).astype(dtype)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates [B, S, heads, H] by its position's angles, pairing entry i with i + H / 2."""
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


@dataclass(frozen=True, slots=True)
class Structure:
    """A model without its arrays; static under jit."""

    treedef: Any
    names: tuple[str, ...]


def named_arrays(model: Decoder) -> tuple[dict[str, jax.Array], Structure]:
    """Returns the model's arrays by dotted path, and what `rebuild` needs besides them."""
    leaves, treedef = jax.tree_util.tree_flatten_with_path(model)
    names = tuple(".".join(key.name for key in path[:-1]) for path, _ in leaves)
    return {name: leaf for name, (_, leaf) in zip(names, leaves, strict=True)}, Structure(
        treedef, names
    )


def rebuild(structure: Structure, *arrays: dict[str, jax.Array]) -> Decoder:
    """Returns the model whose arrays are in the given dicts together."""
    merged: dict[str, jax.Array] = {}
    for part in arrays:
        merged |= part
    return jax.tree.unflatten(structure.treedef, [merged[name] for name in structure.names])


def logits(model: Decoder, tokens, positions, segment_ids) -> jax.Array:
    """Returns [B, S, V] float32: for tests and generation; training never makes this array."""
    hidden = model(tokens, positions, segment_ids)
    head = model.head_weight().astype(hidden.dtype)
    return jnp.einsum("BSD,VD->BSV", hidden, head, preferred_element_type=jnp.float32)
