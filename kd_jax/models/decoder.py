"""The decoder of the Llama family, for training, evaluation and decoding.

Dimensions: B batch, S sequence, D embed, F mlp, N query heads, K key/value heads, H head dim,
V vocab, L layers. Weights have Hugging Face names and orientation, [out, in]. Layers are stacked on
a leading L and run by a scan; for decoding they may be unstacked.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from kd_jax.models.architecture import Architecture, Rope
from kd_jax.models.attention import SAVED_ATTENTION, Implementation, Window, attention
from kd_jax.models.embedding import embed
from kd_jax.models.matmul import project
from kd_jax.models.weight_table import layer_weights
from kd_jax.parallel.mesh import Layout, constrain

SAVED_PRODUCT = "product"
"""Name of a projection's output; gradient checkpointing can save it."""

Attend = Callable[[jax.Array, jax.Array, jax.Array, Any], tuple[jax.Array, Any]]
"""Maps q [B, S, N, H], k and v [B, S, K, H] and the layer's window, None or a scalar, to (output
[B, S, N, H], anything else)."""


class Kind(NamedTuple):
    """Numbers in which layers differ, as data of one scan: [L] int32, scalars within a layer."""

    window: Any = None
    """Tokens that a layer attends to; None: all in every layer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DecoderSpec:
    """Static description of a decoder: architecture, dtype, sharding; a static argument of jit."""

    arch: Architecture
    dtype: Any
    """Dtype of activations and matmuls."""
    attention: Implementation = "xla"
    layout: Layout | None = None
    """Shardings of weights and rows; None: one device."""
    remat: Literal["none", "dots", "attention", "layer"] = "none"
    lora_scale: float = 0.0
    """alpha / rank of the adapters."""
    dropout: float = 0.0
    """Dropout probability of the adapters' input in training."""


class LoraParam(nnx.Param):
    """A trainable low-rank factor."""


class Linear(nnx.Module):
    """y = x Wᵀ (+ b) (+ lora_scale (x Aᵀ) Bᵀ), by the arrays present."""

    def __init__(self, spec: DecoderSpec, arrays: Mapping[str, Any], path: str):
        """Takes `path`.weight [out, in], and bias and LoRA factors if present."""

        def optional(name: str, kind: type[nnx.Param]) -> Any:
            value = arrays.get(f"{path}.{name}")
            return nnx.data(None if value is None else kind(value))

        self.weight = nnx.Param(arrays[f"{path}.weight"])
        self.bias = optional("bias", nnx.Param)
        self.lora_A = optional("lora_A", LoraParam)
        self.lora_B = optional("lora_B", LoraParam)
        self.dims = layer_weights(spec.arch)[f"{path}.weight"].dims
        self.spec = spec

    def __call__(self, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """Maps [B, S, in] to [B, S, out] in the model's dtype; a `key` enables dropout."""
        out, into = self.dims
        y = self._project(x, self.weight[...], out, into)
        if self.bias is not None:
            bias = self.bias[...].astype(self.spec.dtype)  # like weights in project
            y = y + bias[None, None]
        if self.lora_A is not None:
            dropout = self.spec.dropout
            if key is not None and dropout > 0:
                keep = jax.random.bernoulli(key, 1 - dropout, x.shape)
                x = jnp.where(keep, x / (1 - dropout), 0).astype(x.dtype)
            low = self._project(x, self.lora_A[...], "rank", into)
            low = checkpoint_name(low, SAVED_PRODUCT)
            y = y + self.spec.lora_scale * self._project(low, self.lora_B[...], out, "rank")
        return checkpoint_name(y, SAVED_PRODUCT)  # the backward pass needs only the sum

    def _project(self, x: jax.Array, weight: jax.Array, *dims: str) -> jax.Array:
        layout, in_use = self.spec.layout, None
        if layout is not None and layout.mesh.size > 1:
            in_use = layout.in_use(dims, weight.shape)
        return project(x, weight, self.spec.dtype, in_use)


class RMSNorm(nnx.Module):
    """x / rms(x) * weight (arXiv 1910.07467)."""

    def __init__(self, weight: Any, eps: float):
        self.weight = nnx.Param(weight)
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        x32 = x.astype(jnp.float32)  # squares lose precision in bfloat16
        scale = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
        normed = (x32 * scale).astype(x.dtype)  # before the weight, as in transformers
        weight = self.weight[...].astype(x.dtype)
        return normed * jnp.expand_dims(weight, range(x.ndim - 1))


class Attention(nnx.Module):
    def __init__(self, spec: DecoderSpec, arrays: Mapping[str, Any]):
        self.q_proj = Linear(spec, arrays, "self_attn.q_proj")
        self.k_proj = Linear(spec, arrays, "self_attn.k_proj")
        self.v_proj = Linear(spec, arrays, "self_attn.v_proj")
        self.o_proj = Linear(spec, arrays, "self_attn.o_proj")
        self.q_norm = nnx.data(_head_norm(spec, arrays, "q_norm"))
        self.k_norm = nnx.data(_head_norm(spec, arrays, "k_norm"))
        self.head_dim = spec.arch.head_dim

    def __call__(self, x, rope, attend: Attend, kind: Kind, keys):
        """Maps [B, S, D] to [B, S, D]; also returns the second output of `attend`."""
        B, S, _ = x.shape
        q = self.q_proj(x, keys[0]).reshape(B, S, -1, self.head_dim)
        k = self.k_proj(x, keys[1]).reshape(B, S, -1, self.head_dim)
        v = self.v_proj(x, keys[2]).reshape(B, S, -1, self.head_dim)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        out, extra = attend(rotate(q, *rope), rotate(k, *rope), v, kind.window)
        return self.o_proj(out.reshape(B, S, -1), keys[3]), extra


def _head_norm(spec: DecoderSpec, arrays: Mapping[str, Any], name: str) -> RMSNorm | None:
    weight = arrays.get(f"self_attn.{name}.weight")
    return None if weight is None else RMSNorm(weight, spec.arch.rms_norm_eps)


class MLP(nnx.Module):
    def __init__(self, spec: DecoderSpec, arrays: Mapping[str, Any]):
        self.gate_proj = Linear(spec, arrays, "mlp.gate_proj")
        self.up_proj = Linear(spec, arrays, "mlp.up_proj")
        self.down_proj = Linear(spec, arrays, "mlp.down_proj")

    def __call__(self, x, keys):
        gate = jax.nn.silu(self.gate_proj(x, keys[0]))
        return self.down_proj(gate * self.up_proj(x, keys[1]), keys[2])


class Layer(nnx.Module):
    def __init__(self, spec: DecoderSpec, arrays: Mapping[str, Any]):
        eps = spec.arch.rms_norm_eps
        self.input_layernorm = RMSNorm(arrays["input_layernorm.weight"], eps)
        self.self_attn = Attention(spec, arrays)
        self.post_attention_layernorm = RMSNorm(arrays["post_attention_layernorm.weight"], eps)
        self.mlp = MLP(spec, arrays)

    def __call__(self, x, rope, attend: Attend, kind: Kind, key: jax.Array | None = None):
        """Returns the residual stream [B, S, D] after the layer, and attend's second output."""
        keys = [None] * 7 if key is None else list(jax.random.split(key, 7))
        added, extra = self.self_attn(self.input_layernorm(x), rope, attend, kind, keys[:4])
        x = x + added
        return x + self.mlp(self.post_attention_layernorm(x), keys[4:]), extra


class Table(nnx.Module):
    """A weight [V, D]: the embedding or the lm_head."""

    def __init__(self, weight: Any):
        self.weight = nnx.Param(weight)


class Decoder(nnx.Module):
    """A decoder of the Llama family; with tied embeddings `lm_head` is None."""

    def __init__(self, spec: DecoderSpec, arrays: Mapping[str, Any]):
        """Takes arrays by path of the weight table; unstacked layers are layers.0.NAME, ..."""
        self.embed_tokens = Table(arrays["embed_tokens.weight"])
        self.layers: Any
        if "layers.input_layernorm.weight" in arrays:
            self.layers = Layer(spec, _below(arrays, "layers."))
        else:
            every = range(spec.arch.num_hidden_layers)
            self.layers = nnx.List([Layer(spec, _below(arrays, f"layers.{i}.")) for i in every])
        self.norm = RMSNorm(arrays["norm.weight"], spec.arch.rms_norm_eps)
        tied = spec.arch.tie_word_embeddings
        self.lm_head = nnx.data(None if tied else Table(arrays["lm_head.weight"]))
        self.spec = spec

    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        segment_ids: jax.Array | tuple[jax.Array, jax.Array],
        dropout_key: jax.Array | None = None,
    ) -> jax.Array:
        """Maps tokens, positions and segment ids, [B, S] int32 each, to hidden states [B, S, D]."""
        return self.with_layers(tokens, positions, segment_ids, (), dropout_key)[0]

    def with_layers(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        segment_ids: jax.Array | tuple[jax.Array, jax.Array],
        layers: tuple[int, ...],
        dropout_key: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array | None]:
        """Returns the hidden states [B, S, D], and outputs [len(layers), B, S, D] of some layers.

        A layer's output is the residual stream after it, before the final norm. Negative layers
        count from the last. Without layers the outputs are None.
        """
        x, rope = self.embed(tokens, positions)

        def attend(q, k, v, window):
            return self.attend(q, k, v, segment_ids, positions, window), None

        def run_layer(x, layer, kind, key):
            return self.on_rows(layer(x, rope, attend, kind, key)[0])

        run_layer = _with_remat(run_layer, self.spec.remat)

        def run_and_store(carry, layer, kind, key_and_slot):
            x, outputs = carry
            key, slot = key_and_slot
            x = run_layer(x, layer, kind, key)
            if outputs is not None:  # outside gradient checkpointing: no residual of it is needed
                outputs = jax.lax.dynamic_update_index_in_dim(outputs, x, slot, 0)
            return (x, outputs), None

        depth = self.spec.arch.num_hidden_layers
        keys = None if dropout_key is None else jax.random.split(dropout_key, depth)
        slots, order = _slots(layers, depth)
        outputs = jnp.zeros((slots[-1] + 1, *x.shape), x.dtype) if layers else None
        xs = (keys, slots if layers else None)
        (x, outputs), _ = self.over_layers(run_and_store, (x, outputs), xs, tokens.shape[1])
        if outputs is not None:
            in_order = order == sorted(set(order))
            outputs = outputs[: len(order)] if in_order else outputs[np.array(order)]
        return self.norm(x), outputs

    def embed(self, tokens: jax.Array, positions: jax.Array) -> tuple[jax.Array, Any]:
        """Returns the embeddings [B, S, D] of tokens [B, S], and the positions' RoPE tables."""
        x = embed(self.embed_tokens.weight[...], tokens, self.spec.layout)
        x = self.on_rows(x).astype(self.spec.dtype)
        arch = self.spec.arch
        return x, rope_tables(positions, arch.rope, arch.head_dim, self.spec.dtype)

    def attend(self, q, k, v, segment_ids, positions, size: jax.Array | None) -> jax.Array:
        """Returns attention of whole rows, [B, S, N, H], with a sliding window of `size`."""
        window = None if size is None else Window(positions, size)
        kernel, layout = self.spec.attention, self.spec.layout
        return attention(
            q, k, v, segment_ids, window=window, implementation=kernel, layout=layout
        )  # fmt: skip

    def over_layers(self, step: Callable, carry: Any, xs: Any, length: int) -> tuple[Any, Any]:
        """Scans `step(carry, layer, kind, x) -> (carry, y)` over the layers; returns (carry, ys).

        Args:
          xs: arrays [L, ...]; for unstacked layers, optionally a list of length L.
          length: of the rows, or of the cache, tokens.
        """
        kinds = _kinds(self.spec.arch, length)
        if isinstance(self.layers, Layer):
            return jax.lax.scan(lambda carry, x: step(carry, *x), carry, (self.layers, kinds, xs))
        ys = []
        for i, layer in enumerate(self.layers):
            kind, x = jax.tree.map(
                lambda x, i=i: x[i], (kinds, None if isinstance(xs, list) else xs)
            )
            carry, y = step(carry, layer, kind, xs[i] if isinstance(xs, list) else x)
            ys.append(y)
        return carry, ys

    def on_rows(self, x: jax.Array) -> jax.Array:
        """Returns hidden states [B, S, D] sharded over rows only."""
        layout = self.spec.layout
        return x if layout is None else constrain(x, layout.mesh, layout.row_axes(len(x)))

    def head_weight(self) -> jax.Array:
        """Returns the lm_head, [V, D]."""
        source = self.embed_tokens if self.lm_head is None else self.lm_head
        return source.weight[...]


def _kinds(arch: Architecture, length: int) -> Kind:
    """Returns the kinds of the layers, [L] each, for rows of `length` tokens."""
    sizes = [length if size is None else size for size in arch.layer_windows]
    return Kind(window=np.array(sizes, np.int32) if any(x < length for x in sizes) else None)


def _slots(layers: tuple[int, ...], depth: int) -> tuple[np.ndarray, list[int]]:
    """Returns the slot that each layer's output is written to, [L], and the slots of `layers`.

    Every layer writes, so that the scan has no branch. Outputs not chosen are overwritten by the
    next chosen layer; those after the last go to one extra slot.
    """
    wanted = [range(depth)[layer] for layer in layers]
    chosen = sorted(set(wanted))
    return np.searchsorted(chosen, np.arange(depth)), [chosen.index(layer) for layer in wanted]


def _with_remat(run_layer, policy: str):
    if policy == "none":
        return run_layer
    names = {
        "layer": (),
        "attention": (SAVED_ATTENTION,),
        "dots": (SAVED_ATTENTION, SAVED_PRODUCT),
    }[policy]
    saved = jax.checkpoint_policies.save_only_these_names(*names)
    return jax.checkpoint(run_layer, policy=saved, prevent_cse=False)


def _below(tree: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {name.removeprefix(prefix): v for name, v in tree.items() if name.startswith(prefix)}


def rope_tables(
    positions: jax.Array, rope: Rope, head_dim: int, dtype: Any
) -> tuple[jax.Array, jax.Array]:
    """Returns cos and sin of the RoPE angles, [B, S, 1, H / 2] each."""
    frequency = jnp.asarray(rope.inverse_frequencies(head_dim))
    angle = positions.astype(jnp.float32)[:, :, None, None] * frequency[None, None, None]
    return jnp.cos(angle).astype(dtype), jnp.sin(angle).astype(dtype)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Applies RoPE to x [B, S, heads, H], pairing entries i and i + H / 2."""
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def logits(model: Decoder, tokens, positions, segment_ids) -> jax.Array:
    """Returns the logits [B, S, V] float32, for tests."""
    hidden = model(tokens, positions, segment_ids)
    head = model.head_weight().astype(hidden.dtype)
    return jnp.einsum("BSD,VD->BSV", hidden, head, preferred_element_type=jnp.float32)
