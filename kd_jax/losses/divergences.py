"""Divergences between teacher and student, with closed-form gradients, per token in float32.

log_q and log_p are log-probabilities of the student and of the teacher over the vocabulary, the
last dimension, at the loss's temperature. A divergence returns its Terms, entries before the sum
over the vocabulary, so that the fused head can take it in one pass. The gradient with respect to
the student's logits is (grad_log_q - q sum(grad_log_q)) / temperature. Terms c q of grad_log_q
cancel in it and are chosen so that grad_log_q is 0 where the models agree. docs/losses.md has the
table.

Each takes (log_q, log_p, config, weight).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kd_jax.config import LossConfig
from kd_jax.config.loss import COMPATS
from kd_jax.losses.vocabulary import NEGATIVE

# Exponents are clipped here, because powers of p / q are unbounded.
MAX_EXPONENT = 60.0
# The acceptance rate is clipped here, near the least positive float32.
LEAST_RATE = 1e-37

Weight = jax.Array | None
"""A number of each token, [..., 1], from token_weights.py; None for a divergence without one."""


class Terms(NamedTuple):
    """A divergence entry by entry, [..., V] float32, or its sums over the vocabulary, [..., 1]."""

    value: jax.Array
    """Its sum is the divergence."""
    grad_log_q: jax.Array
    """d(sum of value) / d log_q with the entries of log_q independent. The same array as value
    where the two are equal, so that it is summed once."""


def forward_kl(log_q: jax.Array, log_p: jax.Array, config: LossConfig, weight: Weight) -> Terms:
    """KL(teacher || student) = sum p (log p - log q), nats; q - p sums to 0 by itself."""
    p, q = jnp.exp(log_p), jnp.exp(log_q)
    return Terms(p * (log_p - log_q), q - p)


def reverse_kl(log_q: jax.Array, log_p: jax.Array, config: LossConfig, weight: Weight) -> Terms:
    """KL(student || teacher) = sum q (log q - log p), nats."""
    value = jnp.exp(log_q) * (log_q - log_p)
    return Terms(value, value)


def symmetric_kl(log_q: jax.Array, log_p: jax.Array, config: LossConfig, weight: Weight) -> Terms:
    """w KL(teacher || student) + (1 - w) KL(student || teacher), w = symmetric_weight."""
    return _mix(forward_kl, reverse_kl, log_q, log_p, config, config.symmetric_weight)


def adaptive_kl(log_q: jax.Array, log_p: jax.Array, config: LossConfig, weight: jax.Array) -> Terms:
    """w KL(teacher || student) + (1 - w) KL(student || teacher), w per token (arXiv 2404.02657).

    Args:
      weight: w, from adaptive_weight.
    """
    return _mix(forward_kl, reverse_kl, log_q, log_p, config, weight)


def _mix(first, second, log_q, log_p, config, weight):
    """Returns weight times the first divergence's Terms and 1 - weight times the second's."""
    one, other = first(log_q, log_p, config, None), second(log_q, log_p, config, None)
    return Terms(
        weight * one.value + (1 - weight) * other.value,
        weight * one.grad_log_q + (1 - weight) * other.grad_log_q,
    )


def jsd(log_q: jax.Array, log_p: jax.Array, config: LossConfig, weight: Weight) -> Terms:
    """b KL(p || m) + (1 - b) KL(q || m), m = b p + (1 - b) q, b = jsd_beta (arXiv 2306.13649).

    It vanishes as b approaches 0 or 1. At b = 0 it is the forward and at b = 1 the reverse KL, as
    in TRL.
    """
    b = config.jsd_beta
    if b in (0, 1):
        return (reverse_kl if b else forward_kl)(log_q, log_p, config, weight)
    over_p, over_q, _ = _against_mixture(log_q, log_p, b)
    grad_log_q = (1 - b) * jnp.exp(log_q) * over_q
    return Terms(b * jnp.exp(log_p) * over_p + grad_log_q, grad_log_q)


def jsd_cross(log_q: jax.Array, log_p: jax.Array, config: LossConfig, weight: Weight) -> Terms:
    """(1 - b) KL(p || m) + b KL(q || m), m = b p + (1 - b) q: from forward to reverse KL."""
    b = config.jsd_beta
    if b in (0, 1):
        return (reverse_kl if b else forward_kl)(log_q, log_p, config, weight)
    p, q = jnp.exp(log_p), jnp.exp(log_q)
    over_p, over_q, ratio = _against_mixture(log_q, log_p, b)
    reverse = b * q * over_q
    mixture = ratio * ((1 - b) * p + b * q)
    return Terms((1 - b) * p * over_p + reverse, reverse + (1 - b) * (q - mixture))


def skew_forward_kl(
    log_q: jax.Array, log_p: jax.Array, config: LossConfig, weight: Weight
) -> Terms:
    """KL(p || s p + (1 - s) q), s = skew_alpha (arXiv 2402.03898)."""
    s = config.skew_alpha
    if s == 0:
        return forward_kl(log_q, log_p, config, weight)
    m_over_p = _mixture_over(log_p, log_q, s)
    grad_log_q = (1 - s) * jnp.exp(log_q) * (1 - 1 / m_over_p)
    return Terms(-jnp.exp(log_p) * jnp.log(m_over_p), grad_log_q)


def skew_reverse_kl(
    log_q: jax.Array, log_p: jax.Array, config: LossConfig, weight: Weight
) -> Terms:
    """KL(q || (1 - s) p + s q), s = skew_alpha (arXiv 2402.03898)."""
    s = config.skew_alpha
    if s == 0:
        return reverse_kl(log_q, log_p, config, weight)
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


def tvd(log_q: jax.Array, log_p: jax.Array, config: LossConfig, weight: Weight) -> Terms:
    """Total variation distance, sum |p - q| / 2: the rejection rate of draft tokens."""
    q = jnp.exp(log_q)
    excess = q - jnp.exp(log_p)
    return Terms(0.5 * jnp.abs(excess), 0.5 * q * jnp.sign(excess))


def nla(log_q: jax.Array, log_p: jax.Array, config: LossConfig, acceptance: jax.Array) -> Terms:
    """-log of the acceptance rate A = sum min(p, q) of draft tokens, nats (arXiv 2602.23881).

    Args:
      acceptance: A, from acceptance_rate.
    """
    rate = jnp.maximum(acceptance, LEAST_RATE)
    p, q = jnp.exp(log_p), jnp.exp(log_q)
    # The entries with q below p, and half of the ties. In this form no term is above A.
    below = jnp.where(q < p, q, jnp.where(q > p, 0.0, 0.5 * q))
    return Terms(-jnp.log(rate) * (jnp.minimum(p, q) / rate), -below / rate)


def lk_hybrid(log_q: jax.Array, log_p: jax.Array, config: LossConfig, weight: jax.Array) -> Terms:
    """w KL(teacher || student) + (1 - w) TVD, w = exp(-3 A) without gradient (arXiv 2602.23881).

    Args:
      weight: w, from hybrid_weight.
    """
    return _mix(forward_kl, tvd, log_q, log_p, config, weight)


def alpha_beta(log_q: jax.Array, log_p: jax.Array, config: LossConfig, weight: Weight) -> Terms:
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
    value = -large * (cross - power / (A + B) * small) / (A * B)
    return Terms(value, -large * (cross - jnp.where(student_leads, 0.0, small)) / A)


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
    log_q: jax.Array, log_p: jax.Array, config: LossConfig, weight: Weight
) -> Terms:
    """Returns the entries of the configured divergence, with the terms that config.compat reports.

    Args:
      log_q, log_p: [..., V] float32.
      weight: token_weight(log_q, log_p, config), [..., 1] or None.
    """
    log_q, log_p = jnp.maximum(log_q, NEGATIVE), jnp.maximum(log_p, NEGATIVE)
    terms = DIVERGENCES[config.divergence](log_q, log_p, config, weight)
    if config.compat == "torchtune":  # its forward KL lacks the teacher's entropy
        shares = {"forward_kl": 1.0, "symmetric_kl": config.symmetric_weight, "reverse_kl": 0.0}
        negative_entropy = jnp.exp(log_p) * log_p
        reported = terms.value - shares[config.divergence] * negative_entropy
        terms = Terms(reported, terms.grad_log_q)
    return terms


def t2_factor(temperature: float | jax.Array, config: LossConfig) -> float | jax.Array:
    """Returns the divergence's factor: temperature^2 (arXiv 1503.02531) or 1."""
    scale = config.scale_by_t2
    if scale is None:
        scale = COMPATS[config.compat].scale_by_t2
    return temperature * temperature if scale else 1.0
