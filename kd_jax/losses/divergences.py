"""Every divergence once: its value and its closed-form gradient, per token, in float32.

u = log q are the student's log-probabilities and v = log p the teacher's, over the last dimension,
both at the temperature of the loss. A divergence is given entry by entry, before any sum, so that
the fused head can take it in one pass: as f, whose sum over V is the value, and a = dL/du with the
entries of u taken as free. The softmax then makes of a the gradient with respect to the student's
logits over the temperature, a - q sum(a); terms c q of a cancel there, and are chosen so that a is
0 where the models agree. docs/losses.md has the table.
"""

import math
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp

from kd_jax.config import LossConfig
from kd_jax.config.loss import COMPATS

# Stands for log 0 at vocabulary entries that are padding; finite, so that 0 * it is 0.
NEGATIVE = -1e30


# Powers of p / q have no bound; exponents are cut here.
MAX_EXPONENT = 60.0


Terms = tuple[jax.Array, jax.Array]


Divergence = Callable[..., Terms]


def forward_kl(log_q: jax.Array, log_p: jax.Array, config: LossConfig) -> Terms:
    """KL(teacher || student) = sum p (log p - log q), nats; a = q - p sums to 0 by itself."""
    p, q = jnp.exp(log_p), jnp.exp(log_q)
    return p * (log_p - log_q), q - p


def reverse_kl(log_q: jax.Array, log_p: jax.Array, config: LossConfig) -> Terms:
    """KL(student || teacher) = sum q (log q - log p), nats."""
    f = jnp.exp(log_q) * (log_q - log_p)
    return f, f


def symmetric_kl(log_q: jax.Array, log_p: jax.Array, config: LossConfig) -> Terms:
    """w KL(teacher || student) + (1 - w) KL(student || teacher), w = symmetric_weight."""
    return _mix(log_q, log_p, config, config.symmetric_weight, 1 - config.symmetric_weight)


def adaptive_kl(
    log_q: jax.Array, log_p: jax.Array, config: LossConfig, weight: jax.Array | None = None
) -> Terms:
    """w KL(teacher || student) + (1 - w) KL(student || teacher), w a token's own (2404.02657)."""
    weight = adaptive_weight(log_q, log_p, config.akl_mass) if weight is None else weight
    return _mix(log_q, log_p, config, weight, 1 - weight)


def _mix(log_q, log_p, config, forward_weight, reverse_weight):
    forward, reverse = forward_kl(log_q, log_p, config), reverse_kl(log_q, log_p, config)
    pairs = zip(forward, reverse, strict=True)
    f, a = (forward_weight * x + reverse_weight * y for x, y in pairs)
    return f, a


def jsd(log_q: jax.Array, log_p: jax.Array, config: LossConfig) -> Terms:
    """b KL(p || m) + (1 - b) KL(q || m), m = b p + (1 - b) q, b = jsd_beta (arXiv 2306.13649).

    It vanishes as b nears 0 or 1; exactly there it is the forward or the reverse KL, as in TRL.
    """
    b = config.jsd_beta
    if b in (0, 1):
        return (reverse_kl if b else forward_kl)(log_q, log_p, config)
    over_p, over_q, _ = _against_mixture(log_q, log_p, b)
    a = (1 - b) * jnp.exp(log_q) * over_q
    return b * jnp.exp(log_p) * over_p + a, a


def jsd_cross(log_q: jax.Array, log_p: jax.Array, config: LossConfig) -> Terms:
    """(1 - b) KL(p || m) + b KL(q || m), m = b p + (1 - b) q: from forward to reverse KL."""
    b = config.jsd_beta
    if b in (0, 1):
        return (reverse_kl if b else forward_kl)(log_q, log_p, config)
    p, q = jnp.exp(log_p), jnp.exp(log_q)
    over_p, over_q, ratio = _against_mixture(log_q, log_p, b)
    reverse = b * q * over_q
    mixture = ratio * ((1 - b) * p + b * q)
    return (1 - b) * p * over_p + reverse, reverse + (1 - b) * (q - mixture)


def skew_forward_kl(log_q: jax.Array, log_p: jax.Array, config: LossConfig) -> Terms:
    """KL(p || s p + (1 - s) q), s = skew_alpha (arXiv 2402.03898)."""
    s = config.skew_alpha
    if s == 0:
        return forward_kl(log_q, log_p, config)
    m_over_p = _mixture_over(log_p, log_q, s)
    return -jnp.exp(log_p) * jnp.log(m_over_p), (1 - s) * jnp.exp(log_q) * (1 - 1 / m_over_p)


def skew_reverse_kl(log_q: jax.Array, log_p: jax.Array, config: LossConfig) -> Terms:
    """KL(q || (1 - s) p + s q), s = skew_alpha (arXiv 2402.03898)."""
    s = config.skew_alpha
    if s == 0:
        return reverse_kl(log_q, log_p, config)
    m_over_q = _mixture_over(log_q, log_p, s)
    q, log_m_over_q = jnp.exp(log_q), jnp.log(m_over_q)
    return -q * log_m_over_q, q * (s * (1 - 1 / m_over_q) - log_m_over_q)


def _mixture_over(log_own, log_other, share):
    """Returns (share own + (1 - share) other) / own; where it is cut, own is next to nothing."""
    return share + (1 - share) * jnp.exp(jnp.minimum(log_other - log_own, MAX_EXPONENT))


def _against_mixture(log_q, log_p, weight):
    """Returns log(p / m), log(q / m) and q / m, m = weight p + (1 - weight) q, 0 < weight < 1.

    By the smaller of p and q over the larger, which neither overflows nor is 0 / 0.
    """
    gap = log_q - log_p
    small = jnp.exp(-jnp.abs(gap))
    teacher_leads = gap < 0
    m = jnp.where(teacher_leads, weight + (1 - weight) * small, 1 - weight + weight * small)
    log_m = jnp.log(m)  # of m over the larger
    ratio = jnp.where(teacher_leads, small, 1.0) / m
    return -jnp.maximum(gap, 0.0) - log_m, jnp.minimum(gap, 0.0) - log_m, ratio


def tvd(log_q: jax.Array, log_p: jax.Array, config: LossConfig) -> Terms:
    """Total variation distance, sum |p - q| / 2: the chance that a draft token is refused."""
    q = jnp.exp(log_q)
    more = q - jnp.exp(log_p)
    return 0.5 * jnp.abs(more), 0.5 * q * jnp.sign(more)


def alpha_beta(log_q: jax.Array, log_p: jax.Array, config: LossConfig) -> Terms:
    """The alpha-beta divergence of ABKD (arXiv 2505.04560): (1, 0) forward, (0, 1) reverse KL.

    -1 / (A B) sum [p^A q^B - A / (A + B) p^(A + B) - B / (A + B) q^(A + B)], A = ab_alpha and
    B = ab_beta; its limits where A, B or A + B is 0.
    """
    A, B = config.ab_alpha, config.ab_beta
    gap = log_q - log_p
    if A == 0 and B == 0:
        return 0.5 * gap * gap, gap
    if A + B == 0:
        power = jnp.expm1(jnp.minimum(-A * gap, MAX_EXPONENT))
        return (A * gap + power) / A**2, -power / A
    if A == 0:
        p, q = jnp.exp(B * log_p), jnp.exp(B * log_q)
        return (B * q * gap - q + p) / B**2, q * gap
    if B == 0:
        p, q = jnp.exp(A * log_p), jnp.exp(A * log_q)
        return (q - p - A * p * gap) / A**2, (q - p) / A
    # Over the larger of p and q, to the power A + B: small numbers are not differences of large.
    fall, student_leads = -jnp.abs(gap), gap > 0
    power = jnp.where(student_leads, A, B)
    cross = jnp.expm1(jnp.minimum(power * fall, MAX_EXPONENT))
    small = jnp.expm1((A + B) * fall)
    large = jnp.exp((A + B) * jnp.maximum(log_q, log_p))
    f = -large * (cross - power / (A + B) * small) / (A * B)
    return f, -large * (cross - jnp.where(student_leads, 0.0, small)) / A


DIVERGENCES: dict[str, Divergence] = {
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
}


def divergence_terms(
    log_q: jax.Array, log_p: jax.Array, config: LossConfig, weight: jax.Array | None = None
) -> Terms:
    """Returns f and a, [..., V] float32, of the divergence that is configured, as it reports it.

    Args:
      weight: token_weight's, of which whole rows are needed; None finds it anew.
    """
    log_q, log_p = jnp.maximum(log_q, NEGATIVE), jnp.maximum(log_p, NEGATIVE)
    whole_rows = () if weight is None else (weight,)
    f, a = DIVERGENCES[config.divergence](log_q, log_p, config, *whole_rows)
    if config.compat == "torchtune":  # its forward KL lacks the teacher's entropy
        shares = {"forward_kl": 1.0, "symmetric_kl": config.symmetric_weight, "reverse_kl": 0.0}
        f -= shares[config.divergence] * jnp.exp(log_p) * log_p
    return f, a


def token_weight(
    log_q: jax.Array, log_p: jax.Array, config: LossConfig, axis: str | None = None
) -> jax.Array | None:
    """Returns what divergence_terms needs of whole rows, [..., 1]; None for most divergences."""
    adaptive = config.divergence == "adaptive_kl"
    return adaptive_weight(log_q, log_p, config.akl_mass, axis) if adaptive else None


def divergence(
    log_q: jax.Array, log_p: jax.Array, config: LossConfig
) -> tuple[jax.Array, jax.Array]:
    """Returns the divergence, [...], and its gradient in the student's logits / T, [..., V]."""
    f, a = divergence_terms(log_q, log_p, config)
    value, slope = over_vocab(jnp.add, 0.0, [f, a])
    return value[..., 0], a - jnp.exp(log_q) * slope


def t2_factor(temperature: float | jax.Array, config: LossConfig) -> float | jax.Array:
    """Returns what the divergence and its gradient are multiplied by (arXiv 1503.02531)."""
    scale = config.scale_by_t2
    if scale is None:
        scale = COMPATS[config.compat].scale_by_t2
    return temperature * temperature if scale else 1.0


# Log-probabilities nearer than this count as ties: four times the rounding of those near -10.
RESOLUTION = 4e-6


THRESHOLDS = 8
"""Parts that a pass of the search divides what is left into."""


def adaptive_weight(
    log_q: jax.Array, log_p: jax.Array, mass: float, axis: str | None = None
) -> jax.Array:
    """Returns the forward KL's weight, [..., 1], a constant: the head's share of sum |p - q|.

    The head is the likeliest entries of the teacher that together have at most `mass`, and the
    first in any case. Entries that tie are in it together or not at all. Its least probability is
    searched for, several thresholds in a pass, between bounds that draw nearer: much faster than
    sorting the vocabulary. `axis` is over_vocab's.
    """
    p = jnp.exp(log_p)
    # The likeliest entry outside has at least a V-th of the mass outside.
    parts = 1 if axis is None else jax.lax.axis_size(axis)
    depth = math.log(log_p.shape[-1] * parts / (1 - mass))
    (highest,) = over_vocab(jnp.maximum, -jnp.inf, [log_p], axis)
    high = highest - RESOLUTION
    low = jnp.minimum(high, -depth - RESOLUTION)

    def narrow(_, bounds):
        low, high = bounds
        thresholds = [low + (high - low) * (i / THRESHOLDS) for i in range(1, THRESHOLDS)]
        inside = [jnp.where(p >= jnp.exp(threshold), p, 0.0) for threshold in thresholds]
        for threshold, total in zip(
            thresholds, over_vocab(jnp.add, 0.0, inside, axis), strict=True
        ):
            high = jnp.where(total <= mass, jnp.minimum(high, threshold), high)
            low = jnp.where(total <= mass, low, jnp.maximum(low, threshold))
        return low, high

    num_passes = math.ceil(math.log(depth / RESOLUTION, THRESHOLDS))
    _, high = jax.lax.fori_loop(0, num_passes, narrow, (low, high))
    difference = jnp.abs(p - jnp.exp(log_q))
    # The bound is next above an entry outside, and p may be rounded otherwise than in the search.
    in_head = jnp.where(p >= jnp.exp(high + 0.5 * RESOLUTION), difference, 0.0)
    head, total = over_vocab(jnp.add, 0.0, [in_head, difference], axis)
    return head / jnp.maximum(total, 1e-30)  # of equal models, 0


def over_vocab(
    combine, start: float, arrays: Iterable[jax.Array], axis: str | None = None
) -> list[jax.Array]:
    """Returns each float32 array [..., V] reduced over V, [..., 1]: all of them in one pass.

    Args:
      combine: jnp.add or jnp.maximum.
      axis: mesh axis that the vocabulary is split over, inside a shard_map; None where it is whole.
    """
    arrays = list(arrays)
    distinct = {id(x): x for x in arrays}  # XLA would store what is reduced twice
    operands = tuple(distinct.values())
    starts = (jnp.float32(start),) * len(operands)

    def combine_all(some, others):
        return tuple(map(combine, some, others))

    reduced = jax.lax.reduce(operands, starts, combine_all, dimensions=(operands[0].ndim - 1,))
    if axis is not None:
        reduced = {jnp.add: jax.lax.psum, jnp.maximum: jax.lax.pmax}[combine](reduced, axis)
    found = dict(zip(distinct, reduced, strict=True))
    return [found[id(x)][..., None] for x in arrays]


def agreement_terms(log_q: jax.Array, log_p: jax.Array) -> dict[str, jax.Array]:
    """Returns what says how near two models are, to be summed over V, [..., V].

    KL(teacher || student) and KL(student || teacher), nats, and the acceptance, sum min(p, q): the
    chance that a draft token of the student's is accepted by the teacher (arXiv 2211.17192).
    """
    log_q, log_p = jnp.maximum(log_q, NEGATIVE), jnp.maximum(log_p, NEGATIVE)
    p, q = jnp.exp(log_p), jnp.exp(log_q)
    return {
        "kl_forward": p * (log_p - log_q),
        "kl_reverse": q * (log_q - log_p),
        "acceptance": jnp.minimum(p, q),
    }


def overlap(places: jax.Array, others: jax.Array) -> jax.Array:
    """Returns the share of k entries [..., k] that are among the k others."""
    same = places[..., :, None] == others[..., None, :]
    return jnp.sum(same, axis=(-1, -2)).astype(jnp.float32) / places.shape[-1]
