"""From both models' logits to each token's loss, metrics and gradient, in few passes."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kd_jax import losses
from kd_jax.config import LossConfig

# What training sums up, and what an evaluation says of each token; without a teacher the SINGLE_.
SINGLE_METRICS = ("ce_loss", "entropy")
METRICS = (
    *SINGLE_METRICS, "kd_loss", "kl_forward", "kl_reverse", "top1_agreement", "acceptance",
    "teacher_ce", "teacher_entropy",
)  # fmt: skip
SINGLE_EVAL_METRICS = ("loss", "ce", "entropy", "confidence", "correct")
EVAL_METRICS = (
    *SINGLE_EVAL_METRICS, "kd_loss", "kl_forward", "kl_reverse", "top1_agreement", "acceptance",
    "teacher_ce", "teacher_entropy", "teacher_confidence", "teacher_correct",
)  # fmt: skip


_SAME_AS = {"forward_kl": "kl_forward", "reverse_kl": "kl_reverse"}


class LossScalars(NamedTuple):
    """What a schedule may change from step to step: float32 scalars."""

    kd_ratio: jax.Array
    temperature: jax.Array


def static_temperature(config: LossConfig) -> float | None:
    """Returns the temperature that is known while compiling; None where it follows a schedule."""
    return config.temperature if config.temperature_end is None else None


def token_losses(config, scalars, z_s, z_t, labels, mask, entries, axis=None):
    """Returns each token's loss and metrics, and the gradient of the masked loss.

    Four passes over the vocabulary: maxima, sums of exponentials, losses, gradient. On a GPU the
    first two are one, and so are the last two where the gradient needs no sum of the third.

    Args:
      config: LossConfig.
      scalars: LossScalars; None for no teacher.
      z_s: [N, V] float32, the student's logits.
      z_t: [N, V] float32, the teacher's; None for no teacher, where the loss is CE.
      labels: [N] int32.
      mask: [N] bool; a token without a loss has no gradient.
      entries: [V] int32, the vocabulary entries of these logits: 0 to V - 1, or a device's share.
      axis: mesh axis that the vocabulary is split over, inside a shard_map; None where it is whole.

    Returns:
      values by the names above, [N] float32, mask or not; the gradient in z_s, [N, V] float32.
    """
    T = None if z_t is None else static_temperature(config) or scalars.temperature
    student, *teachers = _softmaxes([z_s] if z_t is None else [z_s, z_t], T, axis)
    values = _model_values(student, z_s, labels, entries, axis)
    values["ce_loss"] = values["ce"]
    if not teachers:
        return values | {"loss": values["ce"]}, _d_ce(student, z_s, labels, mask, entries)
    (teacher,), ratio = teachers, scalars.kd_ratio
    for name, value in _model_values(teacher, z_t, labels, entries, axis).items():
        values[f"teacher_{name}"] = value
    log_q, log_p = _log_probs(student, z_s, T), _log_probs(teacher, z_t, T)
    weight = losses.token_weight(log_q, log_p, config, axis)
    value, slope = losses.divergence_terms(log_q, log_p, config, weight)
    agree = (z_s == student.highest) & (z_t == teacher.highest)
    terms = losses.agreement_terms(_log_probs(student, z_s), _log_probs(teacher, z_t))
    if _is_one(T) and config.compat != "torchtune":  # what is minimised may be one of them
        value = terms.get(_SAME_AS.get(config.divergence), value)
    terms |= {"kd_loss": value, "top1_agreement": agree.astype(jnp.float32)}
    if config.divergence not in losses.SLOPE_SUMS_TO_ZERO:
        terms["slope"] = slope
    sums = dict(zip(terms, losses.over_vocab(jnp.add, 0.0, terms.values(), axis), strict=True))
    total_slope, scale = sums.pop("slope", None), losses.t2_factor(T, config)
    values |= {name: x[:, 0] for name, x in sums.items()}
    values["kd_loss"] *= scale
    values["top1_agreement"] = jnp.minimum(values["top1_agreement"], 1.0)  # several may tie
    values["loss"] = (1 - ratio) * values["ce"] + ratio * values["kd_loss"]
    # The barrier has XLA compute the exponentials again rather than store them.
    student, teacher = jax.lax.optimization_barrier((student, teacher))
    log_q = _log_probs(student, z_s, T)
    _, slope = losses.divergence_terms(log_q, _log_probs(teacher, z_t, T), config, weight)
    if total_slope is not None:
        slope -= jnp.exp(log_q) * total_slope
    d_kd = slope * jnp.where(mask, ratio * scale / T, 0.0)[:, None]
    return values, d_kd + _d_ce(student, z_s, labels, jnp.where(mask, 1 - ratio, 0.0), entries)


class _Softmax(NamedTuple):
    """What the softmax of one model's logits needs besides them, [N, 1] each."""

    highest: jax.Array
    """The largest logit."""
    log_sum: jax.Array
    """log sum_v exp(logit - highest)."""
    tempered_log_sum: jax.Array
    """log sum_v exp((logit - highest) / T)."""
    entropy: jax.Array
    """Nats, at temperature 1."""


def _softmaxes(logits, T, axis):
    """Returns the _Softmax of each model's logits."""
    tempered = () if _is_one(T) else (T,)
    sums = jax.lax.platform_dependent(logits, *tempered, cuda=_sums_in_one_pass, default=_sums)
    if axis is not None:
        highest = jax.lax.pmax([m for m, *_ in sums], axis)
        parts = [_relative_to(m, x, *tempered) for m, x in zip(highest, sums, strict=True)]
        totals = jax.lax.psum(parts, axis)
        sums = [(m, *x) for m, x in zip(highest, totals, strict=True)]
    return [
        _Softmax(
            m, jnp.log(total), jnp.log(hot[0] if hot else total), jnp.log(total) - moment / total
        )
        for m, total, moment, *hot in sums
    ]


def _sums(logits, T=None):
    """Returns what softmaxes are made of: one pass for all maxima, one for all sums.

    Returns:
      of each model's logits, with x = logit - maximum: the maximum, and the sums over V of exp(x),
      x exp(x) and, for a T, exp(x / T); [N, 1] each.
    """
    highest = losses.over_vocab(jnp.maximum, -jnp.inf, logits)
    shifted = [z - m for z, m in zip(logits, highest, strict=True)]
    terms = [[jnp.exp(x), jnp.exp(x) * x] for x in shifted]
    if T is not None:
        terms = [[*of_one, jnp.exp(x / T)] for of_one, x in zip(terms, shifted, strict=True)]
    sums = iter(losses.over_vocab(jnp.add, 0.0, [term for of_one in terms for term in of_one]))
    return [(m, *(next(sums) for _ in of_one)) for m, of_one in zip(highest, terms, strict=True)]


def _sums_in_one_pass(logits, T=None):
    """Returns what `_sums` does, reading the logits once: a GPU waits for its memory."""
    found = []
    for z in logits:
        sums = _running_sums(z)
        found.append(sums if T is None else (*sums, _running_sums(z / T)[1]))
    return found


def _running_sums(z):
    """Returns the maximum, and the sums of exp(x) and x exp(x), corrected as the maximum grows."""

    def combine(one, other):
        gap = one[0] - other[0]
        keep = partial(jnp.where, gap > 0)
        highest, total, moment = map(keep, one, other)
        _, low_total, low_moment = map(keep, other, one)
        fall = -jnp.abs(gap)
        scale = jnp.exp(fall)  # one exponential, not one of each side
        return highest, total + scale * low_total, moment + scale * (low_moment + fall * low_total)

    z = jnp.maximum(z, losses.NEGATIVE)  # no difference of two is NaN
    starts = (jnp.float32(losses.NEGATIVE), jnp.float32(0), jnp.float32(0))
    sums = jax.lax.reduce(
        (z, jnp.ones_like(z), jnp.zeros_like(z)), starts, combine, dimensions=(1,)
    )
    return tuple(x[:, None] for x in sums)


def _relative_to(highest, sums, T=None):
    """Returns the sums of `_sums` for a maximum that is not their own."""
    m, total, moment, *hot = sums
    fall = m - highest
    scale = jnp.exp(fall)
    return scale * total, scale * (moment + fall * total), *(jnp.exp(fall / T) * x for x in hot)


def _pick(logits, labels, entries, axis):
    """Returns each token's logit of its label, [N, 1]."""
    if axis is None:
        return jnp.take_along_axis(logits, labels[:, None], axis=-1)
    place = labels[:, None] - entries[0]
    here = (place >= 0) & (place < logits.shape[1])
    picked = jnp.take_along_axis(logits, jnp.clip(place, 0, logits.shape[1] - 1), axis=-1)
    return jax.lax.psum(jnp.where(here, picked, 0.0), axis)


def _is_one(T):
    return T is None or (isinstance(T, (int, float)) and T == 1)


def _log_probs(softmax, logits, T=None):
    """Returns log-probabilities [N, V] at temperature T, 1 by default."""
    if _is_one(T):
        return logits - softmax.highest - softmax.log_sum
    return (logits - softmax.highest) / T - softmax.tempered_log_sum


def _d_ce(softmax, logits, labels, weights, entries):
    """Returns the gradient of -log q[label] in the logits, weights (q - onehot), [N, V]."""
    weights = weights[:, None].astype(jnp.float32)
    onehot = jnp.where(labels[:, None] == entries[None], weights, 0.0)
    return jnp.exp(_log_probs(softmax, logits)) * weights - onehot


def _model_values(softmax, logits, labels, entries, axis):
    """Returns what is said of each token of one model alone, [N]."""
    picked = _pick(logits, labels, entries, axis)
    return {
        "ce": (softmax.log_sum - (picked - softmax.highest))[:, 0],
        "entropy": softmax.entropy[:, 0],
        "confidence": jnp.exp(-softmax.log_sum)[:, 0],
        "correct": (picked == softmax.highest)[:, 0].astype(jnp.float32),
    }
