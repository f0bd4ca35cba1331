"""Divergences between teacher and student, with closed-form gradients, per token in float32.

log_q and log_p are log-probabilities of the student and of the teacher over the vocabulary, the
last dimension, at the loss's temperature. A divergence returns its entries before the sum over the
vocabulary, so that the fused head can take it in one pass: f, whose sum is the divergence, and
a = d(sum f) / d log_q with the entries of log_q independent. The gradient with respect to the
student's logits is (a - q sum(a)) / T. Terms c q of a cancel in it and are chosen so that a is 0
where the models agree. docs/losses.md has the table.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kd_jax.config import LossConfig
from kd_jax.config.loss import COMPATS
from kd_jax.losses.vocabulary import NEGATIVE, max_over_vocab, sum_over_vocab

# Exponents are clipped here, because powers of p / q are unbounded.
MAX_EXPONENT = 60.0

# The acceptance rate is clipped here, near the least positive float32.
LEAST_RATE = 1e-37
# Decay of the KL's weight in lk_hybrid with the acceptance rate.
HYBRID_DECAY = 3.0


class Terms(NamedTuple):
    """A divergence entry by entry, [..., V] float32, or its sums over the vocabulary, [..., 1]."""

    value: jax.Array
    """f."""
    own_slope: jax.Array | None = None
    """a; None where it equals f, because XLA materializes an array that is reduced twice."""

    @property
    def slope(self) -> jax.Array:
        """a."""
        return self.value if self.own_slope is None else self.own_slope


def forward_kl(log_q: jax.Array, log_p: jax.Array, config: LossConfig) -> Terms:
    """KL(teacher || student) = sum p (log p - log q), nats; a = q - p sums to 0 by itself."""
    p, q = jnp.exp(log_p), jnp.exp(log_q)
    return Terms(p * (log_p - log_q), q - p)


def reverse_kl(log_q: jax.Array, log_p: jax.Array, config: LossConfig) -> Terms:
    """KL(student || teacher) = sum q (log q - log p), nats."""
    return Terms(jnp.exp(log_q) * (log_q - log_p))


def symmetric_kl(log_q: jax.Array, log_p: jax.Array, config: LossConfig) -> Terms:
    """w KL(teacher || student) + (1 - w) KL(student || teacher), w = symmetric_weight."""
    return _mix(log_q, log_p, config, config.symmetric_weight, 1 - config.symmetric_weight)


def adaptive_kl(
    log_q: jax.Array, log_p: jax.Array, config: LossConfig, weight: jax.Array | None = None
) -> Terms:
    """w KL(teacher || student) + (1 - w) KL(student || teacher), w per token (arXiv 2404.02657).

    Args:
      weight: w, [..., 1], from adaptive_weight; None computes it.
    """
    weight = adaptive_weight(log_q, log_p, config.akl_mass) if weight is None else weight
    return _mix(log_q, log_p, config, weight, 1 - weight)


def _mix(log_q, log_p, config, forward_weight, reverse_weight):
    forward, reverse = forward_kl(log_q, log_p, config), reverse_kl(log_q, log_p, config)
    return Terms(
        forward_weight * forward.value + reverse_weight * reverse.value,
        forward_weight * forward.slope + reverse_weight * reverse.slope,
    )


def jsd(log_q: jax.Array, log_p: jax.Array, config: LossConfig) -> Terms:
    """b KL(p || m) + (1 - b) KL(q || m), m = b p + (1 - b) q, b = jsd_beta (arXiv 2306.13649).

    It vanishes as b approaches 0 or 1. At b = 0 it is the forward and at b = 1 the reverse KL, as
    in TRL.
    """
    b = config.jsd_beta
    if b in (0, 1):
        return (reverse_kl if b else forward_kl)(log_q, log_p, config)
    over_p, over_q, _ = _against_mixture(log_q, log_p, b)
    a = (1 - b) * jnp.exp(log_q) * over_q
    return Terms(b * jnp.exp(log_p) * over_p + a, a)


def jsd_cross(log_q: jax.Array, log_p: jax.Array, config: LossConfig) -> Terms:
    """(1 - b) KL(p || m) + b KL(q || m), m = b p + (1 - b) q: from forward to reverse KL."""
    b = config.jsd_beta
    if b in (0, 1):
        return (reverse_kl if b else forward_kl)(log_q, log_p, config)
    p, q = jnp.exp(log_p), jnp.exp(log_q)
    over_p, over_q, ratio = _against_mixture(log_q, log_p, b)
    reverse = b * q * over_q
    mixture = ratio * ((1 - b) * p + b * q)
    return Terms((1 - b) * p * over_p + reverse, reverse + (1 - b) * (q - mixture))


def skew_forward_kl(log_q: jax.Array, log_p: jax.Array, config: LossConfig) -> Terms:
    """KL(p || s p + (1 - s) q), s = skew_alpha (arXiv 2402.03898)."""
    s = config.skew_alpha
    if s == 0:
        return forward_kl(log_q, log_p, config)
    m_over_p = _mixture_over(log_p, log_q, s)
    a = (1 - s) * jnp.exp(log_q) * (1 - 1 / m_over_p)
    return Terms(-jnp.exp(log_p) * jnp.log(m_over_p), a)


def skew_reverse_kl(log_q: jax.Array, log_p: jax.Array, config: LossConfig) -> Terms:
    """KL(q || (1 - s) p + s q), s = skew_alpha (arXiv 2402.03898)."""
    s = config.skew_alpha
    if s == 0:
        return reverse_kl(log_q, log_p, config)
    m_over_q = _mixture_over(log_q, log_p, s)
    q, log_m_over_q = jnp.exp(log_q), jnp.log(m_over_q)
    return Terms(-q * log_m_over_q, q * (s * (1 - 1 / m_over_q) - log_m_over_q))


def _mixture_over(log_own, log_other, share):
    """Returns (share own + (1 - share) other) / own, clipped where own is almost 0."""
    return share + (1 - share) * jnp.exp(jnp.minimum(log_other - log_own, MAX_EXPONENT))


def _against_mixture(log_q, log_p, weight):
    """Returns log(p / m), log(q / m) and q / m, m = weight p + (1 - weight) q, 0 < weight < 1.

    Computed from the smaller of p and q over the larger, which cannot overflow or be 0 / 0.
    """
    gap = log_q - log_p
    small = jnp.exp(-jnp.abs(gap))
    teacher_leads = gap < 0
    m = jnp.where(teacher_leads, weight + (1 - weight) * small, 1 - weight + weight * small)
    log_m = jnp.log(m)  # of m over the larger
    ratio = jnp.where(teacher_leads, small, 1.0) / m
    return -jnp.maximum(gap, 0.0) - log_m, jnp.minimum(gap, 0.0) - log_m, ratio


def tvd(log_q: jax.Array, log_p: jax.Array, config: LossConfig) -> Terms:
    """Total variation distance, sum |p - q| / 2: the rejection rate of draft tokens."""
    q = jnp.exp(log_q)
    excess = q - jnp.exp(log_p)
    return Terms(0.5 * jnp.abs(excess), 0.5 * q * jnp.sign(excess))


def nla(
    log_q: jax.Array, log_p: jax.Array, config: LossConfig, weight: jax.Array | None = None
) -> Terms:
    """-log of the acceptance rate A = sum min(p, q) of draft tokens, nats (arXiv 2602.23881).

    Args:
      weight: A, [..., 1], from acceptance_rate; None computes it.
    """
    rate = acceptance_rate(log_q, log_p) if weight is None else weight
    rate = jnp.maximum(rate, LEAST_RATE)
    p, q = jnp.exp(log_p), jnp.exp(log_q)
    # The entries with q below p, and half of the ties. In this form no term is above A.
    below = jnp.where(q < p, q, jnp.where(q > p, 0.0, 0.5 * q))
    return Terms(-jnp.log(rate) * (jnp.minimum(p, q) / rate), -below / rate)


def lk_hybrid(
    log_q: jax.Array, log_p: jax.Array, config: LossConfig, weight: jax.Array | None = None
) -> Terms:
    """w KL(teacher || student) + (1 - w) TVD, w = exp(-3 A) without gradient (arXiv 2602.23881).

    Args:
      weight: w, [..., 1], from hybrid_weight; None computes it.
    """
    weight = hybrid_weight(log_q, log_p) if weight is None else weight
    kl, distance = forward_kl(log_q, log_p, config), tvd(log_q, log_p, config)
    return Terms(
        weight * kl.value + (1 - weight) * distance.value,
        weight * kl.slope + (1 - weight) * distance.slope,
    )


def acceptance_rate(log_q: jax.Array, log_p: jax.Array, axis: str | None = None) -> jax.Array:
    """Returns A = sum min(p, q), [..., 1], of log-probabilities [..., V] (arXiv 2211.17192).

    Args:
      axis: mesh axis that shards the vocabulary, inside a shard_map.
    """
    return sum_over_vocab(jnp.exp(jnp.minimum(log_q, log_p)), axis)


def hybrid_weight(log_q: jax.Array, log_p: jax.Array, axis: str | None = None) -> jax.Array:
    """Returns the weight of the KL in lk_hybrid, [..., 1]: from 1 at A = 0 to exp(-3) at A = 1."""
    return jnp.exp(-HYBRID_DECAY * acceptance_rate(log_q, log_p, axis))


def alpha_beta(log_q: jax.Array, log_p: jax.Array, config: LossConfig) -> Terms:
    """Alpha-beta divergence (ABKD, arXiv 2505.04560): forward KL at (1, 0), reverse at (0, 1).

    -1 / (A B) sum [p^A q^B - A / (A + B) p^(A + B) - B / (A + B) q^(A + B)], A = ab_alpha and
    B = ab_beta; where A, B or A + B is 0, its limit.
    """
    A, B = config.ab_alpha, config.ab_beta
    gap = log_q - log_p
    if A == 0 and B == 0:
        return Terms(0.5 * gap * gap, gap)
    if A + B == 0:
        power = jnp.expm1(jnp.minimum(-A * gap, MAX_EXPONENT))
        return Terms((A * gap + power) / A**2, -power / A)
    if A == 0:
        p, q = jnp.exp(B * log_p), jnp.exp(B * log_q)
        return Terms((B * q * gap - q + p) / B**2, q * gap)
    if B == 0:
        p, q = jnp.exp(A * log_p), jnp.exp(A * log_q)
        return Terms((q - p - A * p * gap) / A**2, (q - p) / A)
    # Divided by max(p, q)^(A + B), so that no small number is a difference of large ones.
    fall, student_leads = -jnp.abs(gap), gap > 0
    power = jnp.where(student_leads, A, B)
    cross = jnp.expm1(jnp.minimum(power * fall, MAX_EXPONENT))
    small = jnp.expm1((A + B) * fall)
    large = jnp.exp((A + B) * jnp.maximum(log_q, log_p))
    f = -large * (cross - power / (A + B) * small) / (A * B)
    return Terms(f, -large * (cross - jnp.where(student_leads, 0.0, small)) / A)


DIVERGENCES: dict[str, Callable[..., Terms]] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "symmetric_kl": symmetric_kl,
    "jsd": jsd,
    "jsd_cross": jsd_cross,
    "skew_forward_kl": skew_forward_kl,
    "skew_reverse_kl": skew_reverse_kl,
    "tvd": tvd,
    "adaptive_kl": adaptive_kl,
    "alpha_beta": alpha_beta,
    "nla": nla,
    "lk_hybrid": lk_hybrid,
}


def divergence_terms(
    log_q: jax.Array, log_p: jax.Array, config: LossConfig, weight: jax.Array | None = None
) -> Terms:
    """Returns the entries of the configured divergence, with the terms that config.compat reports.

    Args:
      log_q, log_p: [..., V] float32.
      weight: from token_weight, [..., 1]; None computes it.
    """
    log_q, log_p = jnp.maximum(log_q, NEGATIVE), jnp.maximum(log_p, NEGATIVE)
    precomputed = () if weight is None else (weight,)
    terms = DIVERGENCES[config.divergence](log_q, log_p, config, *precomputed)
    if config.compat == "torchtune":  # its forward KL lacks the teacher's entropy
        shares = {"forward_kl": 1.0, "symmetric_kl": config.symmetric_weight, "reverse_kl": 0.0}
        negative_entropy = jnp.exp(log_p) * log_p
        terms = Terms(terms.value - shares[config.divergence] * negative_entropy, terms.slope)
    return terms


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


def divergence(
    log_q: jax.Array, log_p: jax.Array, config: LossConfig
) -> tuple[jax.Array, jax.Array]:
    """Returns the divergence, [...], and T times its gradient in the student's logits, [..., V]."""
    terms = divergence_terms(log_q, log_p, config)
    sums = sum_over_vocab(terms)
    return sums.value[..., 0], terms.slope - jnp.exp(log_q) * sums.slope


def t2_factor(temperature: float | jax.Array, config: LossConfig) -> float | jax.Array:
    """Returns the factor of the divergence and its gradient: T^2 or 1 (arXiv 1503.02531)."""
    scale = config.scale_by_t2
    if scale is None:
        scale = COMPATS[config.compat].scale_by_t2
    return temperature * temperature if scale else 1.0


# Log-probabilities closer than this are ties: four times the rounding error near -10.
RESOLUTION = 4e-6

# Intervals that one pass of the search divides the remaining range into.
NUM_INTERVALS = 8


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


def agreement_terms(log_q: jax.Array, log_p: jax.Array) -> dict[str, jax.Array]:
    """Returns the entries, [..., V] float32, whose sums over V measure how close two models are.

    KL(teacher || student) and KL(student || teacher) in nats, and the acceptance rate sum min(p, q)
    of the student's draft tokens in speculative decoding (arXiv 2211.17192).
    """
    log_q, log_p = jnp.maximum(log_q, NEGATIVE), jnp.maximum(log_p, NEGATIVE)
    p, q = jnp.exp(log_p), jnp.exp(log_q)
    return {
        "kl_forward": p * (log_p - log_q),
        "kl_reverse": q * (log_q - log_p),
        "acceptance": jnp.minimum(p, q),
    }


def overlap(entries: jax.Array, others: jax.Array) -> jax.Array:
    """Returns the share of `entries`, [..., k] int32, that is among `others`, [..., k]."""
    same = entries[..., :, None] == others[..., None, :]
    return jnp.sum(same, axis=(-1, -2)).astype(jnp.float32) / entries.shape[-1]
