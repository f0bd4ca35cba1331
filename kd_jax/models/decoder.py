"""The decoder.

Dimensions: B batch, S sequence, D embed, F mlp, N query heads, K key/value heads, H head dim,
V vocab, L layers. Weights keep Hugging Face names and orientation, [out, in]; those of the layers
are stacked on a leading L and run by a scan.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from kd_jax.models.architecture import Architecture, Rope
from kd_jax.models.attention import SAVED_ATTENTION, Implementation, attention
from kd_jax.models.embedding import embed
from kd_jax.models.matmul import project
from kd_jax.models.table import layer_weights
from kd_jax.parallel.mesh import Layout, constrain

SAVED_PRODUCT = "product"
"""Name of a projection's output, by which remat can keep it."""


@dataclass(frozen=True, slots=True)
class Placement:
    """Where and how a model runs; changes no result."""

    implementation: Implementation = "xla"
    """Attention kernel."""
    layout: Layout | None = None
    """Of its weights and rows on the mesh."""


class LoraParam(nnx.Param):
    """A trainable low-rank factor."""


class Linear(nnx.Module):
    """y = x Wᵀ (+ b), plus scale (x Aᵀ) Bᵀ where adapters were added."""

    def __init__(
        self, weight: Any, bias: Any, dims: tuple[str, ...], dtype: Any, layout: Layout | None
    ):
        """Takes a weight [out, in], and the logical names of these dimensions."""
        self.weight = nnx.Param(weight)
        self.bias = nnx.data(None if bias is None else nnx.Param(bias))
        self.dims = dims
        self.dtype = dtype
        self.layout = layout
        self.lora_A: LoraParam | None = nnx.data(None)
        self.lora_B: LoraParam | None = nnx.data(None)
        self.scale = 0.0
        self.dropout = 0.0

    def __call__(self, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """Maps [B, S, in] to [B, S, out] in the model's dtype; `key` turns dropout on."""
        out, into = self.dims
        y = self._project(x, self.weight[...], out, into)
        if self.bias is not None:
            bias = self.bias[...].astype(self.dtype)  # as project casts weights
            y = y + bias[None, None]
        if self.lora_A is not None and self.lora_B is not None:
            if key is not None and self.dropout > 0:
                keep = jax.random.bernoulli(key, 1 - self.dropout, x.shape)
                x = jnp.where(keep, x / (1 - self.dropout), 0).astype(x.dtype)
            low = self._project(x, self.lora_A[...], "rank", into)
            low = checkpoint_name(low, SAVED_PRODUCT)
            y = y + self.scale * self._project(low, self.lora_B[...], out, "rank")
        return checkpoint_name(y, SAVED_PRODUCT)  # the sum, whose parts no gradient takes

    def _project(self, x, weight, *dims):
        alone = self.layout is None or self.layout.mesh.size == 1
        in_use = None if alone else self.layout.in_use(dims, weight.shape)
        return project(x, weight, self.dtype, in_use)


def _linear(
    w: dict[str, Any], block: str, name: str, arch: Architecture, dtype: Any, place: Placement
) -> Linear:
    """Returns one projection of the arrays in its block."""
    dims = layer_weights(arch)[f"{block}.{name}.weight"].dims
    return Linear(w[f"{name}.weight"], w.get(f"{name}.bias"), dims, dtype, place.layout)


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
        return normed * jnp.expand_dims(weight, range(x.ndim - 1))


class Attention(nnx.Module):
    def __init__(self, w: dict[str, Any], arch: Architecture, dtype: Any, place: Placement):
        self.q_proj = _linear(w, "self_attn", "q_proj", arch, dtype, place)
        self.k_proj = _linear(w, "self_attn", "k_proj", arch, dtype, place)
        self.v_proj = _linear(w, "self_attn", "v_proj", arch, dtype, place)
        self.o_proj = _linear(w, "self_attn", "o_proj", arch, dtype, place)
        eps, normed = arch.rms_norm_eps, arch.qk_norm
        self.q_norm = nnx.data(RMSNorm(w["q_norm.weight"], eps) if normed else None)
        self.k_norm = nnx.data(RMSNorm(w["k_norm.weight"], eps) if normed else None)
        self.head_dim = arch.head_dim
        self.place = place

    def __call__(self, x, rope, segment_ids, keys):
        q, k, v = self.heads(x, rope, keys)
        layout = self.place.layout
        out = attention(
            q, k, v, segment_ids, implementation=self.place.implementation, layout=layout
        )
        return self.o_proj(out.reshape(*x.shape[:2], -1), keys[3])

    def heads(self, x, rope, keys):
        """Maps [B, S, D] to rotated queries [B, S, N, H] and keys, and values, [B, S, K, H]."""
        B, S, _ = x.shape
        q = self.q_proj(x, keys[0]).reshape(B, S, -1, self.head_dim)
        k = self.k_proj(x, keys[1]).reshape(B, S, -1, self.head_dim)
        v = self.v_proj(x, keys[2]).reshape(B, S, -1, self.head_dim)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return rotate(q, *rope), rotate(k, *rope), v


class MLP(nnx.Module):
    def __init__(self, w: dict[str, Any], arch: Architecture, dtype: Any, place: Placement):
        self.gate_proj = _linear(w, "mlp", "gate_proj", arch, dtype, place)
        self.up_proj = _linear(w, "mlp", "up_proj", arch, dtype, place)
        self.down_proj = _linear(w, "mlp", "down_proj", arch, dtype, place)

    def __call__(self, x, keys):
        gate = jax.nn.silu(self.gate_proj(x, keys[0]))
        return self.down_proj(gate * self.up_proj(x, keys[1]), keys[2])


class Layer(nnx.Module):
    def __init__(self, w: dict[str, Any], arch: Architecture, dtype: Any, place: Placement):
        self.input_layernorm = RMSNorm(w["input_layernorm.weight"], arch.rms_norm_eps)
        self.self_attn = Attention(_below(w, "self_attn."), arch, dtype, place)
        self.post_attention_layernorm = RMSNorm(
            w["post_attention_layernorm.weight"], arch.rms_norm_eps
        )
        self.mlp = MLP(_below(w, "mlp."), arch, dtype, place)

    def __call__(self, x, rope, segment_ids, key):
        keys = [None] * 7 if key is None else list(jax.random.split(key, 7))
        x = x + self.self_attn(self.input_layernorm(x), rope, segment_ids, keys[:4])
        return x + self.mlp(self.post_attention_layernorm(x), keys[4:])


class Table(nnx.Module):
    """A weight of [V, D]: the embedding, or the head, whose product kd_head takes in chunks."""

    def __init__(self, weight: Any):
        self.weight = nnx.Param(weight)


class Decoder(nnx.Module):
    """A decoder of the Llama family; a tied head is the absence of `lm_head`."""

    def __init__(
        self,
        arch: Architecture,
        arrays: dict[str, Any],
        *,
        dtype: Any,
        place: Placement = Placement(),
        remat: str = "none",
    ):
        """Takes every array of `weights(arch)` by name."""
        self.embed_tokens = Table(arrays["embed_tokens.weight"])
        self.layers = Layer(_below(arrays, "layers."), arch, dtype, place)
        self.norm = RMSNorm(arrays["norm.weight"], arch.rms_norm_eps)
        tied = arch.tie_word_embeddings
        self.lm_head = nnx.data(None if tied else Table(arrays["lm_head.weight"]))
        self.arch = arch
        self.dtype = dtype
        self.remat = remat
        self.place = place

    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        segment_ids: jax.Array,
        dropout_key: jax.Array | None = None,
    ) -> jax.Array:
        """Maps tokens, positions and segment ids, each [B, S] int32, to hidden states [B, S, D]."""
        return self.with_layers(tokens, positions, segment_ids, (), dropout_key)[0]

    def with_layers(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        segment_ids: jax.Array,
        layers: tuple[int, ...],
        dropout_key: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array | None]:
        """Returns the hidden states, and the outputs of chosen layers [len(layers), B, S, D].

        A layer's output is the residual stream behind it, before the final norm. Negative layers
        count from the last one; no layers have None. Outputs of other layers are not kept.
        """
        x = embed(self.embed_tokens.weight[...], tokens, self.place.layout)
        x = _on_rows(x, self.place.layout).astype(self.dtype)
        rope = rope_tables(positions, self.arch.rope, self.arch.head_dim, self.dtype)

        def run_layer(x, layer, key):
            return _on_rows(layer(x, rope, segment_ids, key), self.place.layout)

        run_layer = _with_remat(run_layer, self.remat)

        def run_and_keep(carry, layer_key_and_slot):
            x, kept = carry
            layer, key, slot = layer_key_and_slot
            x = run_layer(x, layer, key)
            if kept is not None:  # outside what is recomputed, whose backward pass needs none of it
                kept = jax.lax.dynamic_update_index_in_dim(kept, x, slot, 0)
            return (x, kept), None

        depth = self.arch.num_hidden_layers
        keys = None if dropout_key is None else jax.random.split(dropout_key, depth)
        slots, order = _slots(layers, depth)
        kept = jnp.zeros((slots[-1] + 1, *x.shape), x.dtype) if layers else None
        xs = (self.layers, keys, slots if layers else None)
        (x, kept), _ = jax.lax.scan(run_and_keep, (x, kept), xs)
        if kept is not None:
            kept = kept[: len(order)] if order == sorted(set(order)) else kept[np.array(order)]
        return self.norm(x), kept

    def head_weight(self) -> jax.Array:
        """Returns the output head, [V, D]."""
        source = self.embed_tokens if self.lm_head is None else self.lm_head
        return source.weight[...]


def _on_rows(x: jax.Array, layout: Layout | None) -> jax.Array:
    """Returns hidden states [B, S, D], whole on each device that has their rows."""
    return x if layout is None else constrain(x, layout.mesh, layout.row_axes(len(x)))


def _slots(layers: tuple[int, ...], depth: int) -> tuple[np.ndarray, list[int]]:
    """Returns the slot that each layer's output is written to, [L], and the slots of `layers`.

    A layer that was not chosen writes where the next chosen one follows, or, behind the last of
    them, to a slot that is not read: every layer does the same, without a branch.
    """
    wanted = [range(depth)[layer] for layer in layers]
    chosen = sorted(set(wanted))
    return np.searchsorted(chosen, np.arange(depth)), [chosen.index(layer) for layer in wanted]


def _with_remat(run_layer, policy: str):
    if policy == "none":
        return run_layer
    kept = {
        "layer": (),
        "attention": (SAVED_ATTENTION,),
        "dots": (SAVED_ATTENTION, SAVED_PRODUCT),
    }[policy]
    saved = jax.checkpoint_policies.save_only_these_names(*kept)
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
