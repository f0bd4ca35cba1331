"""Decoding with a KV cache: a compiled prefill, then one compiled step per token."""

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kd_jax.models.decoder import Decoder, DecoderSpec
from kd_jax.models.weight_table import FACTORS, is_adapter
from kd_jax.parallel.placement import Arrays
from kd_jax.parallel.platforms import PLATFORMS

Cache = Any  # (keys, values), [B, T, K, H] of each layer or stacked [L, B, T, K, H]


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """Selection of the next token; static under jit."""

    temperature: float = 0.0
    """0: greedy decoding."""
    top_k: int | None = None
    """Sample from the k likeliest tokens."""
    top_p: float | None = None
    """Nucleus sampling: sample from the fewest tokens whose probability reaches top_p."""


def unstack_layers(spec: DecoderSpec, arrays: Arrays) -> None:
    """Replaces stacked arrays by one per layer, in place: adapters merged, in the spec's dtype.

    At most one stack is in memory twice. On a CPU, slicing the stacks takes longer than the
    matmuls of one token.
    """
    stacked = "layers.self_attn.o_proj.weight" in arrays
    for path in [path for path in arrays if not is_adapter(path)]:
        value = arrays.pop(path).astype(spec.dtype)
        if not stacked or not path.startswith("layers."):
            arrays[path] = value
            continue
        module, name = path.removeprefix("layers.").rsplit(".", 1)
        factors = [f"layers.{module}.{factor}" for factor in FACTORS]
        merges = name == "weight" and factors[0] in arrays
        A, B = (arrays.pop(factor) for factor in factors) if merges else (None, None)
        for i, layer in enumerate(value):
            if A is not None and B is not None:
                delta = spec.lora_scale * (B[i] @ A[i])  # float32, rounded once
                layer = (layer.astype(jnp.float32) + delta).astype(spec.dtype)
            arrays[f"layers.{i}.{module}.{name}"] = layer


def generate(
    spec: DecoderSpec,
    arrays: Arrays,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_tokens: Collection[int] = (),
    sampling: Sampling = Sampling(),
    seed: int = 0,
    vocab_size: int | None = None,
) -> Iterator[list[int | None]]:
    """Yields each row's next token at every step; None for rows that have ended.

    A row ends before its first stop token or after `max_new_tokens`.

    Args:
      arrays: the decoder's arrays by path, stacked or unstacked by `unstack_layers` (faster on a
        CPU).
      prompts: token ids, of any lengths above 0.
      vocab_size: vocabulary entries without padding; None: all.
    """
    num_rows = len(prompts)
    platform = next(iter(arrays["norm.weight"].devices())).platform
    if num_rows < PLATFORMS[platform].decoded_rows and spec.dtype == jnp.bfloat16:
        prompts = [*prompts, prompts[0]]
    tokens, start = _left_pad(prompts)
    P = tokens.shape[1]
    # Lengths are rounded up, so that few programs are compiled.
    length = P + _round_up(max_new_tokens, 64)
    fixed = (spec, sampling, vocab_size or spec.arch.vocab_size)
    key = jax.random.key(seed)
    cache, ids = _prefill(fixed, length, arrays, tokens, start, key)
    alive = np.ones(num_rows, bool)
    for i in range(max_new_tokens):
        here = ids
        if i + 1 < max_new_tokens:  # dispatched before this step's tokens are read
            cache, ids = _step(fixed, arrays, cache, here, np.int32(P + i), start, key)
        found = np.asarray(here)[:num_rows]
        alive &= ~np.isin(found, list(stop_tokens))
        if not alive.any():
            return
        yield [int(token) if on else None for token, on in zip(found, alive, strict=True)]


def generate_all(
    spec: DecoderSpec, arrays: Arrays, prompts: Sequence[Sequence[int]], **options
) -> list[list[int]]:
    """Returns all new tokens of each row; options as for `generate`."""
    rows: list[list[int]] = [[] for _ in prompts]
    for tokens in generate(spec, arrays, prompts, **options):
        for row, token in zip(rows, tokens, strict=True):
            if token is not None:
                row.append(token)
    return rows


def _left_pad(prompts: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Returns left-padded tokens [B, P] and each prompt's first position [B], both int32."""
    assert prompts and all(prompts)
    longest = max(map(len, prompts))
    size = _round_up(longest, 32 if longest <= 256 else 256)
    tokens = np.zeros((len(prompts), size), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[size - len(prompt) :] = prompt
    return tokens, np.array([size - len(prompt) for prompt in prompts], np.int32)


def _round_up(number: int, unit: int) -> int:
    return -(-number // unit) * unit


@partial(jax.jit, static_argnums=(0, 1))
def _prefill(fixed, length, arrays: Arrays, tokens, start, key):
    """Returns the cache of T = `length` with the prompts [B, P], and the next tokens [B]."""
    spec = fixed[0]
    model = Decoder(spec, arrays)
    B, P = tokens.shape
    place = jnp.broadcast_to(jnp.arange(P)[None], (B, P))
    segment_ids = (place >= start[:, None]).astype(jnp.int32)  # padding attends to padding
    x, rope = model.embed(tokens, jnp.maximum(place - start[:, None], 0))
    room = ((0, 0), (0, length - P), (0, 0), (0, 0))

    def attend(q, k, v, window):
        out = model.attend(q, k, v, segment_ids, place, window)
        return out, (jnp.pad(k, room), jnp.pad(v, room))

    def run_layer(x, layer, kind, _):
        return layer(x, rope, attend, kind)

    x, cache = model.over_layers(run_layer, x, None, P)
    return cache, _next_tokens(fixed, model, x[:, -1], jax.random.fold_in(key, P))


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def _step(fixed, arrays: Arrays, cache: Cache, tokens, index, start, key):
    """Returns the cache with `tokens` [B] written at `index`, and the next tokens [B]."""
    model = Decoder(fixed[0], arrays)
    length = jax.tree.leaves(cache)[0].shape[-3]
    place = jnp.arange(length)[None]
    seen = (place >= start[:, None]) & (place <= index)  # [B, T]
    x, rope = model.embed(tokens[:, None], (index - start)[:, None])

    def run_layer(x, layer, kind, pair):
        def attend(q, k, v, window):
            keys, values = (
                jax.lax.dynamic_update_slice_in_dim(old, new, index, axis=1)
                for old, new in zip(pair, (k, v), strict=True)
            )
            recent = seen if window is None else seen & (index - place < window)
            mask = recent[:, None, None]
            scale = model.spec.arch.attention_scale
            out = jax.nn.dot_product_attention(q, keys, values, mask=mask, scale=scale)
            return out, (keys, values)

        return layer(x, rope, attend, kind)

    x, cache = model.over_layers(run_layer, x, cache, length)
    return cache, _next_tokens(fixed, model, x[:, 0], jax.random.fold_in(key, index + 1))


def _next_tokens(fixed, model: Decoder, x, key) -> jax.Array:
    """Returns the next tokens [B] for the last layer's hidden states x [B, D]."""
    _, sampling, vocab_size = fixed
    hidden = model.final_norm(x[:, None])[:, 0]
    head = model.head_weight().astype(hidden.dtype)
    # Head first, as in matmul.project; the barrier keeps XLA from reordering the operands.
    z = jnp.einsum("VD,BD->VB", head, hidden, preferred_element_type=jnp.float32)
    logits = jax.lax.optimization_barrier(z).T
    if vocab_size < logits.shape[1]:
        real = jnp.arange(logits.shape[1]) < vocab_size
        logits = jnp.where(real[None], logits, -jnp.inf)
    return choose(logits, sampling, key)


def choose(logits: jax.Array, sampling: Sampling, key: jax.Array) -> jax.Array:
    """Returns one token [B] int32 for each row of logits [B, V] float32."""
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
    return argmax(logits + jax.random.gumbel(key, logits.shape))  # Gumbel-max


def argmax(x: jax.Array) -> jax.Array:
    """Returns jnp.argmax(x, axis=-1) of x [B, V], [B] int32.

    It works on blocks of V: on a CPU, jnp.max is ten times as fast as jnp.argmax.
    """
    length = math.gcd(x.shape[1], 1024)
    blocks = x.reshape(x.shape[0], -1, length)
    block = jnp.argmax(jnp.max(blocks, axis=-1), axis=-1)
    inside = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    return (block * length + jnp.argmax(inside, axis=-1)).astype(jnp.int32)
