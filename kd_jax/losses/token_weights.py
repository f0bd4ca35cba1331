"""Weights per token of some divergences, from a pass over the vocabulary before their own."""

import math

import jax
import jax.numpy as jnp

from kd_jax.config import LossConfig
from kd_jax.losses.vocabulary import max_over_vocab, sum_over_vocab

# Decay of the KL's weight in lk_hybrid with the acceptance rate.
HYBRID_DECAY = 3.0
# Log-probabilities closer than this are ties: four times the rounding error near -10.
RESOLUTION = 4e-6

# Intervals that one pass of the search divides the remaining range into.
NUM_INTERVALS = 8


def token_weight(
    log_q: jax.Array, log_p: jax.Array, config: LossConfig, axis: str | None = None
) -> jax.Array | None:
    """Returns each token's weight in divergence_terms, [..., 1]; None if it has none.

    Args:
      log_q, log_p: [..., V] float32.
      axis: mesh axis that shards the vocabulary, inside a shard_map.
    """
    if config.divergence == "adaptive_kl":
        return adaptive_weight(log_q, log_p, config.akl_mass, axis)
    weights = {"nla": acceptance_rate, "lk_hybrid": hybrid_weight}
    weight = weights.get(config.divergence)
    return None if weight is None else weight(log_q, log_p, axis)


def acceptance_rate(log_q: jax.Array, log_p: jax.Array, axis: str | None = None) -> jax.Array:
    """Returns A = sum min(p, q), [..., 1], of log-probabilities [..., V] (arXiv 2211.17192).

    Args:
      axis: mesh axis that shards the vocabulary, inside a shard_map.
    """
    return sum_over_vocab(jnp.exp(jnp.minimum(log_q, log_p)), axis)


def hybrid_weight(log_q: jax.Array, log_p: jax.Array, axis: str | None = None) -> jax.Array:
    """Returns the weight of the KL in lk_hybrid, [..., 1]: from 1 at A = 0 to exp(-3) at A = 1."""
    return jnp.exp(-HYBRID_DECAY * acceptance_rate(log_q, log_p, axis))


def adaptive_weight(
    log_q: jax.Array, log_p: jax.Array, mass: float, axis: str | None = None
) -> jax.Array:
    """Returns the forward KL's weight, [..., 1], without gradient: the head's share of sum |p - q|.

    The head is the set of the teacher's most probable entries with a total of at most `mass`, and
    always the first entry. Ties are all inside or all outside. A search for the head's smallest
    probability, with several thresholds in a pass, is much faster than a sort of the vocabulary.

    Args:
      log_q, log_p: [..., V] float32.
      axis: mesh axis that shards the vocabulary, inside a shard_map.
    """
    p = jnp.exp(log_p)
    # The most probable entry outside has at least 1 / V of the mass outside.
    parts = 1 if axis is None else jax.lax.axis_size(axis)
    depth = math.log(log_p.shape[-1] * parts / (1 - mass))
    high = max_over_vocab(log_p, axis) - RESOLUTION
    low = jnp.minimum(high, -depth - RESOLUTION)

    def narrow(_, bounds):
        low, high = bounds
        thresholds = [low + (high - low) * (i / NUM_INTERVALS) for i in range(1, NUM_INTERVALS)]
        inside = [jnp.where(p >= jnp.exp(threshold), p, 0.0) for threshold in thresholds]
        for threshold, total in zip(thresholds, sum_over_vocab(inside, axis), strict=True):
            high = jnp.where(total <= mass, jnp.minimum(high, threshold), high)
            low = jnp.where(total <= mass, low, jnp.maximum(low, threshold))
        return low, high

    num_passes = math.ceil(math.log(depth / RESOLUTION, NUM_INTERVALS))
    _, high = jax.lax.fori_loop(0, num_passes, narrow, (low, high))
    difference = jnp.abs(p - jnp.exp(log_q))
    # `high` is just above an entry outside, and p may round differently than in the search.
    in_head = jnp.where(p >= jnp.exp(high + 0.5 * RESOLUTION), difference, 0.0)
    head, total = sum_over_vocab([in_head, difference], axis)
    return head / jnp.maximum(total, 1e-30)  # 0 for equal models
