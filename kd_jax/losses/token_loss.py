"""From both models' logits to each token's loss, metrics and gradient, in few passes."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kd_jax.config import LossConfig
from kd_jax.losses import divergences
from kd_jax.parallel.platforms import by_platform

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
    first two are one.

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
    weight = divergences.token_weight(log_q, log_p, config, axis)
    value, slope = divergences.divergence_terms(log_q, log_p, config, weight)
    agree = (z_s == student.highest) & (z_t == teacher.highest)
    terms = divergences.agreement_terms(_log_probs(student, z_s), _log_probs(teacher, z_t))
    if _is_one(T) and config.compat != "torchtune":  # what is minimised may be one of them
        value = terms.get(_SAME_AS.get(config.divergence), value)
    terms |= {"kd_loss": value, "slope": slope, "top1_agreement": agree.astype(jnp.float32)}
    sums = dict(zip(terms, divergences.over_vocab(jnp.add, 0.0, terms.values(), axis), strict=True))
    total_slope, scale = sums.pop("slope"), divergences.t2_factor(T, config)
    values |= {name: x[:, 0] for name, x in sums.items()}
    values["kd_loss"] *= scale
    values["top1_agreement"] = jnp.minimum(values["top1_agreement"], 1.0)  # several may tie
    values["loss"] = (1 - ratio) * values["ce"] + ratio * values["kd_loss"]
    # The barrier has XLA compute the exponentials again rather than store them.
    student, teacher = jax.lax.optimization_barrier((student, teacher))
    log_q = _log_probs(student, z_s, T)
    _, slope = divergences.divergence_terms(log_q, _log_probs(teacher, z_t, T), config, weight)
    d_kd = (slope - jnp.exp(log_q) * total_slope) * jnp.where(mask, ratio * scale / T, 0.0)[:, None]
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
    T = None if _is_one(T) else T
    # A reduction cannot take a temperature that follows a schedule.
    on_gpu = _sums if isinstance(T, jax.Array) else _sums_in_one_pass
    in_one_pass, plain = partial(on_gpu, T=T), partial(_sums, T=T)
    sums = by_platform("one_pass_softmax", in_one_pass, plain)(logits)
    if axis is not None:
        highest = jax.lax.pmax([x.highest for x in sums], axis)
        rests = [_rescaled(x, x.highest - m, T) for x, m in zip(sums, highest, strict=True)]
        sums = list(map(_Sums, highest, *zip(*jax.lax.psum(rests, axis), strict=True)))
    return [
        _Softmax(
            x.highest, jnp.log(x.total), jnp.log(x.tempered), jnp.log(x.total) - x.moment / x.total
        )
        for x in sums
    ]


class _Sums(NamedTuple):
    """What a softmax is made of, [N, 1] each, with x = logit - highest."""

    highest: jax.Array
    total: jax.Array
    """sum_v exp(x)."""
    moment: jax.Array
    """sum_v x exp(x)."""
    tempered: jax.Array
    """sum_v exp(x / T); without a T the total."""


def _sums(logits, T):
    """Returns the _Sums of each model's logits: one pass for all maxima, one for all sums."""
    highest = divergences.over_vocab(jnp.maximum, -jnp.inf, logits)
    terms = []
    for z, m in zip(logits, highest, strict=True):
        e = jnp.exp(z - m)
        terms += [e, e * (z - m), e if T is None else jnp.exp((z - m) / T)]
    sums = divergences.over_vocab(jnp.add, 0.0, terms)
    return list(map(_Sums, highest, sums[::3], sums[1::3], sums[2::3]))


def _sums_in_one_pass(logits, T):
    """Returns what `_sums` does, reading the logits once: a GPU waits for its memory."""
    return [_running_sums(z, T) for z in logits]


def _running_sums(z, T):
    """Returns the _Sums of logits [N, V] by a reduction that corrects them as the maximum grows."""

    def combine(one, other):
        gap = one[0] - other[0]
        keep = partial(jnp.where, gap > 0)
        high, low = tuple(map(keep, one, other)), tuple(map(keep, other, one))
        rest = _rescaled(_filled(*low), -jnp.abs(gap), T)  # one exponential, not one of each side
        return high[0], *map(jnp.add, high[1:], rest)  # without a T there is no fourth

    z = jnp.maximum(z, divergences.NEGATIVE)  # no difference of two is NaN
    ones, zeros = jnp.ones_like(z), jnp.zeros_like(z)
    entries = (z, ones, zeros) if T is None else (z, ones, zeros, ones)
    starts = (jnp.float32(divergences.NEGATIVE), *[jnp.float32(0)] * len(entries[1:]))
    sums = jax.lax.reduce(entries, starts, combine, dimensions=(1,))
    return _filled(*(x[:, None] for x in sums))


def _filled(highest, total, moment, tempered=None):
    return _Sums(highest, total, moment, total if tempered is None else tempered)


def _rescaled(sums, fall, T):
    """Returns total, moment and tempered of _Sums for a maximum that is theirs less `fall`."""
    scale = jnp.exp(fall)
    hot = scale if T is None else jnp.exp(fall / T)
    return scale * sums.total, scale * (sums.moment + fall * sums.total), hot * sums.tempered


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
