"""Choice of the next token from logits: greedy, or one uniform number per row."""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp

_ONE_BITS = 0x3F800000  # of the float32 1.0
_LEAST_TEMPERATURE = 1e-30  # below it float32 has subnormals, and 0 / 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """Selection of the next token; static under jit."""

    temperature: float = 0.0
    """0: greedy decoding."""
    top_k: int | None = None
    """Sample from the k likeliest tokens."""
    top_p: float | None = None
    """Nucleus sampling: sample from the fewest tokens whose probability reaches top_p."""


GREEDY = Sampling()


def draw(
    logits: jax.Array, sampling: Sampling, keys: jax.Array, counts: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns a token for each row, [B] int32, and its log-probability in nats, [B] float32.

    A row's token depends on its logits, key and count alone. The log-probability is the model's:
    temperature 1, without top-k or top-p.

    Args:
      logits: [B, V] float32; -inf for padding of the vocabulary.
      keys: [B, 2] uint32, key data of a jax PRNG key per row.
      counts: [B] int32, tokens that each row has drawn before.
    """
    highest = jnp.max(logits, axis=-1, keepdims=True)
    weights = jnp.exp(logits - highest)
    if sampling.temperature == 0:
        token = argmax(logits)
    else:
        uniforms = jax.vmap(_uniform)(keys, counts)
        token = invert(_kept(logits - highest, weights, sampling), uniforms)
    chosen = jnp.take_along_axis(logits, token[:, None], axis=-1)
    log_probs = chosen - highest - jnp.log(jnp.sum(weights, axis=-1, keepdims=True))
    return token, log_probs[:, 0]


def distribution(logits: jax.Array, sampling: Sampling) -> jax.Array:
    """Returns the probabilities [B, V] float32 that `draw` draws from; greedy: one entry is 1."""
    if sampling.temperature == 0:
        return jax.nn.one_hot(argmax(logits), logits.shape[-1], dtype=jnp.float32)
    logits = logits - jnp.max(logits, axis=-1, keepdims=True)
    weights = _kept(logits, jnp.exp(logits), sampling)
    return weights / jnp.sum(weights, axis=-1, keepdims=True)


def _uniform(key: jax.Array, count: jax.Array) -> jax.Array:
    return jax.random.uniform(jax.random.fold_in(jax.random.wrap_key_data(key), count))


def _kept(logits: jax.Array, weights: jax.Array, sampling: Sampling) -> jax.Array:
    """Returns unnormalised probabilities [B, V] to draw from; their maximum is 1 in every row.

    Args:
      logits: less their maximum.
      weights: their exponentials.
    """
    if sampling.temperature != 1:
        weights = jnp.exp(logits / max(sampling.temperature, _LEAST_TEMPERATURE))
    if sampling.top_k is not None and sampling.top_k < weights.shape[1]:
        weights = _without_tail(weights, jnp.ones_like(weights), jnp.float32(sampling.top_k))
    if sampling.top_p is not None:
        total = jnp.sum(weights, axis=-1, keepdims=True)
        weights = _without_tail(weights, weights, sampling.top_p * total)
    return weights


def _without_tail(weights: jax.Array, masses: jax.Array, limit: jax.Array) -> jax.Array:
    """Returns weights [B, V] without those whose greater ones have masses of at least `limit`.

    The least weight to keep is found by bisection over the bits of floats from 0 to 1: a CPU takes
    several times as long to sort the vocabulary.
    """

    def halve(_, ends):
        low, high = ends  # at `high` the greater ones have less than `limit`, at `low` perhaps not
        middle = low + (high - low) // 2
        greater = weights > jax.lax.bitcast_convert_type(middle, jnp.float32)
        fits = jnp.sum(jnp.where(greater, masses, 0), axis=-1, keepdims=True) < limit
        return jnp.where(fits, low, middle), jnp.where(fits, middle, high)

    low = jnp.full((len(weights), 1), -1, jnp.int32)
    _, least = jax.lax.fori_loop(0, 31, halve, (low, jnp.full_like(low, _ONE_BITS)))
    return jnp.where(weights < jax.lax.bitcast_convert_type(least, jnp.float32), 0, weights)


def invert(weights: jax.Array, uniforms: jax.Array) -> jax.Array:
    """Returns the first place where the cumulative weights exceed uniforms * total, [B] int32.

    Cumulative sums are of blocks of the vocabulary, then within one block. A CPU draws one number
    a row far faster than the vocabulary's Gumbel noise.
    """
    blocks = _blocks(weights)
    sums = jnp.sum(blocks, axis=-1)
    ends = jnp.cumsum(sums, axis=-1)
    wanted = (uniforms * ends[:, -1])[:, None]
    block = _first(ends > wanted, sums > 0)[:, None]
    before = jnp.take_along_axis(ends - sums, block, axis=1)
    inside = jnp.take_along_axis(blocks, block[:, :, None], axis=1)[:, 0]
    place = _first(before + jnp.cumsum(inside, axis=-1) > wanted, inside > 0)
    return (block[:, 0] * blocks.shape[-1] + place).astype(jnp.int32)


def _first(reached: jax.Array, possible: jax.Array) -> jax.Array:
    """Returns the first place [B] that is reached and possible; if rounding left none, the last
    possible one."""
    both = reached & possible
    last = possible.shape[1] - 1 - jnp.argmax(jnp.flip(possible, axis=-1), axis=-1)
    return jnp.where(jnp.any(both, axis=-1), jnp.argmax(both, axis=-1), last)


def argmax(x: jax.Array) -> jax.Array:
    """Returns jnp.argmax(x, axis=-1) of x [B, V], [B] int32.

    It works on blocks of V: on a CPU, jnp.max is ten times as fast as jnp.argmax.
    """
    blocks = _blocks(x)
    block = jnp.argmax(jnp.max(blocks, axis=-1), axis=-1)
    inside = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    return (block * blocks.shape[-1] + jnp.argmax(inside, axis=-1)).astype(jnp.int32)


def _blocks(x: jax.Array) -> jax.Array:
    """Returns x [B, V] as [B, V / C, C] with C at most 1024."""
    return x.reshape(x.shape[0], -1, math.gcd(x.shape[1], 1024))
