"""Decoding: a compiled prefill of the prompts, then one compiled step a token, with a KV cache."""

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kd_jax.models.architecture import Architecture
from kd_jax.models.attention import attention, choose_attention
from kd_jax.models.decoder import Decoder, Layer, Placement, RMSNorm, named_arrays, rope_tables
from kd_jax.models.lora import merge_adapters
from kd_jax.parallel.platforms import PLATFORMS

Cache = tuple[tuple[jax.Array, jax.Array], ...]  # keys and values [B, T, K, H], a pair a layer


NO_KEYS = (None,) * 4  # no dropout


class Weights(NamedTuple):
    """A decoder's arrays, all in its dtype, without adapters.

    Each layer's are apart, so that no step has to slice a stack, and plain, so that the arguments
    of a step are gathered in no time.
    """

    embed_tokens: jax.Array
    """[V, D]."""
    layers: tuple[dict[str, jax.Array], ...]
    """By their names in `layer_weights`."""
    norm: jax.Array
    """[D]."""
    head: jax.Array
    """[V, D]."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How the next token is chosen; static under jit."""

    temperature: float = 0.0
    """0 takes the likeliest token."""
    top_k: int | None = None
    """Draw from the k likeliest alone."""
    top_p: float | None = None
    """Draw from the fewest likeliest tokens that have this probability together."""


def unstack(model: Decoder) -> Weights:
    """Returns the decoder's weights for `generate`; the stacked ones can be dropped."""
    layers = []
    for i in range(model.arch.num_hidden_layers):
        layer = jax.tree.map(lambda x, i=i: x[i], model.layers)
        merge_adapters(layer)
        layers.append(named_arrays(layer)[0])
    weights = Weights(
        model.embed_tokens.weight[...], tuple(layers), model.norm.weight[...], model.head_weight()
    )
    return jax.tree.map(lambda x: x.astype(model.dtype), weights)


def generate(
    arch: Architecture,
    weights: Weights,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_tokens: Collection[int] = (),
    sampling: Sampling = Sampling(),
    seed: int = 0,
    vocab_size: int | None = None,
) -> Iterator[list[int | None]]:
    """Yields each row's next token, step by step; None for rows that have ended.

    A row ends before a stop token, which is not given, or after `max_new_tokens`.

    Args:
      prompts: token ids, none empty, of any lengths.
      vocab_size: entries of the vocabulary with a meaning; None takes all.
    """
    num_rows = len(prompts)
    platform = next(iter(weights.norm.devices())).platform
    if num_rows < PLATFORMS[platform].decoded_rows and _dtype(weights) == jnp.bfloat16:
        prompts = [*prompts, prompts[0]]
    tokens, start = _left_pad(prompts)
    P = tokens.shape[1]
    # The prompt's length and the number of new tokens are rounded up: few programs serve all.
    length = P + _round_up(max_new_tokens, 64)
    fixed = (arch, sampling, vocab_size or arch.vocab_size)
    key = jax.random.key(seed)
    kernel = choose_attention("auto", platform, _dtype(weights), arch.head_dim)
    cache, ids = _prefill(fixed, length, kernel, weights, tokens, start, key)
    alive = np.ones(num_rows, bool)
    for i in range(max_new_tokens):
        here = ids
        if i + 1 < max_new_tokens:  # begun before this step's tokens are looked at
            cache, ids = _step(fixed, weights, cache, here, np.int32(P + i), start, key)
        found = np.asarray(here)[:num_rows]
        alive &= ~np.isin(found, list(stop_tokens))
        if not alive.any():
            return
        yield [int(token) if on else None for token, on in zip(found, alive, strict=True)]


def generate_all(
    arch: Architecture, weights: Weights, prompts: Sequence[Sequence[int]], **options
) -> list[list[int]]:
    """Returns what `generate` yields, gathered for each row."""
    rows: list[list[int]] = [[] for _ in prompts]
    for tokens in generate(arch, weights, prompts, **options):
        for row, token in zip(rows, tokens, strict=True):
            if token is not None:
                row.append(token)
    return rows


def _left_pad(prompts: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Returns tokens [B, P] that end together, and where each prompt starts, [B]; both int32."""
    assert prompts and all(prompts)
    longest = max(map(len, prompts))
    size = _round_up(longest, 32 if longest <= 256 else 256)
    tokens = np.zeros((len(prompts), size), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[size - len(prompt) :] = prompt
    return tokens, np.array([size - len(prompt) for prompt in prompts], np.int32)


def _round_up(number: int, unit: int) -> int:
    return -(-number // unit) * unit


@partial(jax.jit, static_argnums=(0, 1, 2))
def _prefill(fixed, length, kernel, weights: Weights, tokens, start, key):
    """Returns the cache [B, length, ...] filled with the prompts, and the next tokens, [B]."""
    arch = fixed[0]
    B, P = tokens.shape
    place = jnp.broadcast_to(jnp.arange(P)[None], (B, P))
    segment_ids = (place >= start[:, None]).astype(jnp.int32)  # padding sees padding alone
    positions = jnp.maximum(place - start[:, None], 0)
    rope = rope_tables(positions, arch.rope, arch.head_dim, _dtype(weights))
    x = weights.embed_tokens[tokens]
    cache = []

    def attend(q, k, v):
        return attention(q, k, v, segment_ids, implementation=kernel), (k, v)

    for layer in weights.layers:
        x, (k, v) = _run_layer(arch, layer, x, rope, attend)
        room = ((0, 0), (0, length - P), (0, 0), (0, 0))
        cache.append((jnp.pad(k, room), jnp.pad(v, room)))
    return tuple(cache), _next_tokens(fixed, weights, x[:, -1], jax.random.fold_in(key, P))


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def _step(fixed, weights: Weights, cache: Cache, tokens, index, start, key):
    """Returns the cache with `tokens` [B] at place `index`, and the next tokens, [B]."""
    T = cache[0][0].shape[1]
    place = jnp.arange(T)[None]
    seen = (place >= start[:, None]) & (place <= index)  # [B, T]
    arch = fixed[0]
    positions = (index - start)[:, None]
    rope = rope_tables(positions, arch.rope, arch.head_dim, _dtype(weights))
    x = weights.embed_tokens[tokens[:, None]]
    after = []
    for layer, (keys, values) in zip(weights.layers, cache, strict=True):

        def attend(q, k, v, keys=keys, values=values):
            keys = jax.lax.dynamic_update_slice_in_dim(keys, k, index, axis=1)
            values = jax.lax.dynamic_update_slice_in_dim(values, v, index, axis=1)
            mask = seen[:, None, None]
            return jax.nn.dot_product_attention(q, keys, values, mask=mask), (keys, values)

        x, pair = _run_layer(arch, layer, x, rope, attend)
        after.append(pair)
    return tuple(after), _next_tokens(fixed, weights, x[:, 0], jax.random.fold_in(key, index + 1))


def _run_layer(arch: Architecture, arrays: dict[str, jax.Array], x, rope, attend):
    """Returns the layer's output [B, S, D], and what `attend` gives besides the attention's."""
    layer = Layer(arrays, arch, x.dtype, Placement())
    heads = layer.self_attn.heads(layer.input_layernorm(x), rope, NO_KEYS)
    out, pair = attend(*heads)
    x = x + layer.self_attn.o_proj(out.reshape(*x.shape[:2], -1))
    return x + layer.mlp(layer.post_attention_layernorm(x), NO_KEYS), pair


def _dtype(weights: Weights):
    return weights.norm.dtype


def _next_tokens(fixed, weights: Weights, x, key) -> jax.Array:
    """Returns the tokens [B] chosen after hidden states [B, D] of the last layer."""
    arch, sampling, vocab_size = fixed
    hidden = RMSNorm(weights.norm, arch.rms_norm_eps)(x[:, None])[:, 0]
    # The head first, as in matmul.project; the barrier keeps XLA from turning the product around.
    z = jnp.einsum("VD,BD->VB", weights.head, hidden, preferred_element_type=jnp.float32)
    logits = jax.lax.optimization_barrier(z).T
    if vocab_size < logits.shape[1]:
        real = jnp.arange(logits.shape[1]) < vocab_size
        logits = jnp.where(real[None], logits, -jnp.inf)
    return choose(logits, sampling, key)


def choose(logits: jax.Array, sampling: Sampling, key: jax.Array) -> jax.Array:
    """Returns a token for each row of logits [B, V] float32, [B] int32."""
    if sampling.temperature == 0:
        return argmax(logits)
    logits = logits / sampling.temperature
    if sampling.top_k is not None:
        least = jax.lax.top_k(logits, min(sampling.top_k, logits.shape[-1]))[0][:, -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if sampling.top_p is not None:
        ordered = jnp.flip(jnp.sort(logits, axis=-1), axis=-1)
        probabilities = jax.nn.softmax(ordered, axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        last = jnp.sum(before < sampling.top_p, axis=-1, keepdims=True) - 1
        least = jnp.take_along_axis(ordered, jnp.maximum(last, 0), axis=-1)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    return argmax(logits + jax.random.gumbel(key, logits.shape))  # a draw from the softmax


def argmax(x: jax.Array) -> jax.Array:
    """Returns the place of each row's first maximum, [B] int32, as jnp.argmax does.

    By blocks of [B, V], because a CPU finds maxima ten times as fast as their places.
    """
    length = math.gcd(x.shape[1], 1024)
    blocks = x.reshape(x.shape[0], -1, length)
    block = jnp.argmax(jnp.max(blocks, axis=-1), axis=-1)
    inside = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    return (block * length + jnp.argmax(inside, axis=-1)).astype(jnp.int32)
