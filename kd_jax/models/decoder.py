"""The decoder of the Llama family, for training, evaluation and decoding.

Dimensions: B batch, S sequence, D embed, F mlp, N query heads, K key/value heads, H head dim,
V vocab, L layers. Weights have Hugging Face names and orientation, [out, in]. Layers are stacked on
a leading L and run by a scan; for decoding they are unstacked.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from kd_jax.models.architecture import Architecture
from kd_jax.models.attention import attention
from kd_jax.models.embedding import embed
from kd_jax.models.masks import Window
from kd_jax.models.modules import (
    DecoderSpec,
    Linear,
    RMSNorm,
    VocabWeight,
    optional_linear,
    optional_norm,
    rope_tables,
    rotate,
)
from kd_jax.models.residuals import SAVED_ATTENTION, SAVED_INPUT, SAVED_PRODUCT
from kd_jax.parallel.mesh import constrain

ACTIVATIONS: Mapping[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu_pytorch_tanh": partial(jax.nn.gelu, approximate=True),
}

Attend = Callable[[jax.Array, jax.Array, jax.Array, Any], tuple[jax.Array, Any]]
"""Maps q [B, S, N, H], k and v [B, S, K, H] and the layer's window, None or a scalar, to (output
[B, S, N, H], anything else)."""


class LayerType(NamedTuple):
    """Numbers in which layers differ, as data of one scan: [L] int32, scalars within a layer."""

    window: Any = None
    """Tokens that a layer attends to; None: all in every layer."""
    rope: Any = None
    """1 for the architecture's other RoPE, else 0; None: there is one RoPE."""


class Attention(nnx.Module):
    def __init__(self, spec: DecoderSpec, arrays: Mapping[str, Any]):
        self.qkv_proj = optional_linear(spec, arrays, "self_attn.qkv_proj")
        self.q_proj = optional_linear(spec, arrays, "self_attn.q_proj")
        self.k_proj = optional_linear(spec, arrays, "self_attn.k_proj")
        self.v_proj = optional_linear(spec, arrays, "self_attn.v_proj")
        self.o_proj = Linear(spec, arrays, "self_attn.o_proj")
        self.q_norm = optional_norm(spec, arrays, "self_attn.q_norm")
        self.k_norm = optional_norm(spec, arrays, "self_attn.k_norm")
        self.arch = spec.arch

    def __call__(self, x, rope, attend: Attend, layer_type: LayerType, keys):
        """Maps [B, S, D] to [B, S, D]; also returns the second output of `attend`."""
        q, k, v = self._project(x, keys)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = _norm_parts(self.q_norm, q), _norm_parts(self.k_norm, k)
        if layer_type.rope is not None:
            rope = [tables[layer_type.rope] for tables in rope]
        out, extra = attend(rotate(q, *rope), rotate(k, *rope), v, layer_type.window)
        return self.o_proj(out.reshape(*out.shape[:2], -1), keys[3]), extra

    def _project(self, x, keys):
        """Returns queries [B, S, N, H], keys and values [B, S, K, H]."""
        N, K, H = self.arch.num_attention_heads, self.arch.num_key_value_heads, self.arch.head_dim
        heads = (*x.shape[:2], -1, H)
        if self.qkv_proj is None:
            each = zip((self.q_proj, self.k_proj, self.v_proj), keys, strict=False)
            return [proj(x, key).reshape(heads) for proj, key in each]
        parts = jnp.split(self.qkv_proj(x, keys[0]), (N * H, (N + K) * H), axis=-1)
        return [part.reshape(heads) for part in parts]


def _norm_parts(norm: RMSNorm, x: jax.Array) -> jax.Array:
    """Returns x [B, S, heads, H], each head normed or all together, by the width of the weight."""
    return norm(x.reshape(*x.shape[:2], -1, norm.weight[...].shape[-1])).reshape(x.shape)


@partial(jax.checkpoint, static_argnums=0)  # the only residual is x
def activate(name: str, x: jax.Array) -> jax.Array:
    """Returns an activation of x in its dtype, computed in float32 and rounded once.

    That is how torch computes it. Rounded after each operation it is slower on a CPU too.
    """
    return ACTIVATIONS[name](x.astype(jnp.float32)).astype(x.dtype)


class MLP(nnx.Module):
    def __init__(self, spec: DecoderSpec, arrays: Mapping[str, Any]):
        self.gate_up_proj = optional_linear(spec, arrays, "mlp.gate_up_proj")
        self.gate_proj = optional_linear(spec, arrays, "mlp.gate_proj")
        self.up_proj = optional_linear(spec, arrays, "mlp.up_proj")
        self.down_proj = Linear(spec, arrays, "mlp.down_proj")
        self.hidden_act = spec.arch.hidden_act

    def __call__(self, x, keys):
        if self.gate_up_proj is None:
            gate, up = self.gate_proj(x, keys[0]), self.up_proj(x, keys[1])
        else:
            gate, up = jnp.split(self.gate_up_proj(x, keys[0]), 2, axis=-1)
        return self.down_proj(activate(self.hidden_act, gate) * up, keys[2])


class Layer(nnx.Module):
    def __init__(self, spec: DecoderSpec, arrays: Mapping[str, Any]):
        self.input_layernorm = optional_norm(spec, arrays, "input_layernorm")
        self.self_attn = Attention(spec, arrays)
        self.post_attention_layernorm = optional_norm(spec, arrays, "post_attention_layernorm")
        self.pre_feedforward_layernorm = optional_norm(spec, arrays, "pre_feedforward_layernorm")
        self.mlp = MLP(spec, arrays)
        self.post_feedforward_layernorm = optional_norm(spec, arrays, "post_feedforward_layernorm")
        self.arch = spec.arch

    def __call__(
        self, x, rope, attend: Attend, layer_type: LayerType, key: jax.Array | None = None
    ):
        """Returns the residual stream [B, S, D] after the layer, and attend's second output."""
        keys = [None] * 7 if key is None else list(jax.random.split(key, 7))
        before, after, before_mlp, after_mlp = self._norms()
        added, extra = self.self_attn(before(x), rope, attend, layer_type, keys[:4])
        x = x + self._weighted(after(added))
        return x + self._weighted(after_mlp(self.mlp(before_mlp(x), keys[4:]))), extra

    def _norms(self) -> list[Callable[[jax.Array], jax.Array]]:
        """Returns the norms before and after attention, before and after the MLP."""
        middle, last = self.post_attention_layernorm, self.post_feedforward_layernorm
        four = [self.input_layernorm, middle, self.pre_feedforward_layernorm, last]
        if self.arch.norms == "before":  # there, the one named after attention precedes the MLP
            four = [self.input_layernorm, None, middle, None]
        return [norm or (lambda x: x) for norm in four]

    def _weighted(self, added: jax.Array) -> jax.Array:
        weight = self.arch.residual_multiplier
        return added if weight == 1 else added * weight


class Decoder(nnx.Module):
    """A decoder of the Llama family; with tied embeddings `lm_head` is None."""

    def __init__(self, spec: DecoderSpec, arrays: Mapping[str, Any]):
        """Takes arrays by path of the weight table; unstacked layers are layers.0.NAME, ..."""
        self.embed_tokens = VocabWeight(arrays["embed_tokens.weight"])
        self.layers: Any
        if "layers.self_attn.o_proj.weight" in arrays:
            self.layers = Layer(spec, _below(arrays, "layers."))
        else:
            every = range(spec.arch.num_hidden_layers)
            self.layers = nnx.List([Layer(spec, _below(arrays, f"layers.{i}.")) for i in every])
        self.norm = RMSNorm(arrays["norm.weight"], spec.arch)
        tied = spec.arch.tie_word_embeddings
        self.lm_head = nnx.data(None if tied else VocabWeight(arrays["lm_head.weight"]))
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

        def run_layer(x, layer, layer_type, key):
            if self.spec.saves_bits:
                x = self.spec.save(x, SAVED_INPUT)
            return self.sharded(layer(x, rope, attend, layer_type, key)[0])

        run_layer = _with_remat(run_layer, self.spec.remat)

        def run_and_store(carry, layer, layer_type, key_and_slot):
            x, outputs = carry
            key, slot = key_and_slot
            x = run_layer(x, layer, layer_type, key)
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
        return self.final_norm(x), outputs

    def final_norm(self, x: jax.Array) -> jax.Array:
        """Returns the head's input: the last layer's hidden states [B, S, D], normed and scaled."""
        x, scaling = self.norm(x), self.spec.arch.logits_scaling
        return x if scaling == 1 else x / scaling

    def embed(self, tokens: jax.Array, positions: jax.Array) -> tuple[jax.Array, Any]:
        """Returns the embeddings [B, S, D] of tokens [B, S], and the positions' RoPE tables.

        Tables of two RoPEs are stacked on a leading axis.
        """
        x = embed(self.embed_tokens.weight[...], tokens, self.spec.layout)
        x = self.sharded(x).astype(self.spec.dtype)
        arch, dtype = self.spec.arch, self.spec.dtype
        if arch.embedding_multiplier != 1:
            x = x * arch.embedding_multiplier
        tables = rope_tables(positions, arch.rope, arch.head_dim, dtype)
        if arch.other_rope is None:
            return x, tables
        other = rope_tables(positions, arch.other_rope, arch.head_dim, dtype)
        return x, [jnp.stack(pair) for pair in zip(tables, other, strict=True)]

    def attend(self, q, k, v, segment_ids, positions, size: jax.Array | None) -> jax.Array:
        """Returns attention of whole rows, [B, S, N, H], with a sliding window of `size`."""
        window = None if size is None else Window(positions, size)
        return attention(
            q, k, v, segment_ids, self.spec.layout, window=window,
            scale=self.spec.arch.attention_scale, implementation=self.spec.attention,
        )  # fmt: skip

    def over_layers(self, step: Callable, carry: Any, xs: Any, length: int) -> tuple[Any, Any]:
        """Returns (carry, ys) of a scan over the layers: `step(carry, layer, layer_type, x)`.

        Args:
          xs: arrays [L, ...]; for unstacked layers, optionally a list of length L.
          length: of the rows, or of the cache, tokens.
        """
        types = _layer_types(self.spec.arch, length)
        if isinstance(self.layers, Layer):
            return jax.lax.scan(lambda carry, x: step(carry, *x), carry, (self.layers, types, xs))
        ys = []
        for i, layer in enumerate(self.layers):
            layer_type, x = jax.tree.map(
                lambda x, i=i: x[i], (types, None if isinstance(xs, list) else xs)
            )
            carry, y = step(carry, layer, layer_type, xs[i] if isinstance(xs, list) else x)
            ys.append(y)
        return carry, ys

    def sharded(self, x: jax.Array) -> jax.Array:
        """Returns hidden states [B, S, D] with rows and tokens sharded, and their width whole."""
        layout = self.spec.layout
        return constrain(x, layout.mesh, *layout.activations(x.shape))

    def head_weight(self) -> jax.Array:
        """Returns the lm_head, [V, D]."""
        source = self.embed_tokens if self.lm_head is None else self.lm_head
        return source.weight[...]


def _layer_types(arch: Architecture, length: int) -> LayerType:
    """Returns the types of the layers, [L] each, for rows of `length` tokens."""
    sizes = [length if size is None else size for size in arch.layer_windows]
    return LayerType(
        window=np.array(sizes, np.int32) if any(x < length for x in sizes) else None,
        rope=np.array(arch.other_rope_layers, np.int32) if arch.other_rope_layers else None,
    )


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
    saved = jax.checkpoint_policies.save_only_these_names(SAVED_INPUT, *names)
    return jax.checkpoint(run_layer, policy=saved, prevent_cse=False)


def _below(tree: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {name.removeprefix(prefix): v for name, v in tree.items() if name.startswith(prefix)}
