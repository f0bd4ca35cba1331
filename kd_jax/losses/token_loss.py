"""Each token's loss, metrics and gradient from the logits of both models, in few passes."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kd_jax.config import LossConfig
from kd_jax.losses.divergences import divergence_terms, t2_factor
from kd_jax.losses.head_inputs import Targets
from kd_jax.losses.token_weights import token_weight
from kd_jax.losses.vocabulary import (
    NEGATIVE,
    Vocab,
    label_logits,
    max_over_vocab,
    sum_over_vocab,
)
from kd_jax.parallel.platforms import by_platform

# Metrics that training sums and that evaluation has of each token; SINGLE_ without a teacher.
SINGLE_METRICS = ("ce_loss", "entropy")
SINGLE_EVAL_METRICS = ("loss", "ce", "entropy", "confidence", "correct")
_PAIR_METRICS = (
    "kd_loss", "kl_forward", "kl_reverse", "top1_agreement", "acceptance", "teacher_ce",
    "teacher_entropy",
)  # fmt: skip
METRICS = (*SINGLE_METRICS, *_PAIR_METRICS)
EVAL_METRICS = (*SINGLE_EVAL_METRICS, *_PAIR_METRICS, "teacher_confidence", "teacher_correct")

# Divergences that equal a metric at temperature 1.
_METRIC_AT_ONE = {"forward_kl": "kl_forward", "reverse_kl": "kl_reverse"}


class LossScalars(NamedTuple):
    """Values that a schedule may change between steps: float32 scalars."""

    kd_ratio: jax.Array
    temperature: jax.Array


def static_temperature(config: LossConfig) -> float | None:
    """Returns the temperature as a compile-time constant; None if a schedule changes it."""
    return config.temperature if config.temperature_end is None else None


def token_losses(
    config: LossConfig,
    scalars: LossScalars | None,
    z_s: jax.Array,
    z_t: jax.Array | None,
    targets: Targets,
    vocab: Vocab,
    listed_only: bool = False,
) -> tuple[dict[str, jax.Array], jax.Array]:
    """Returns each token's loss and metrics, and the gradient of the masked loss.

    A token that the student sampled has kd_ratio 1. Makes four passes over the vocabulary: maxima,
    sums of exponentials, losses, gradient.

    Args:
      scalars: None without a teacher.
      z_s: [N, V] float32, the student's logits.
      z_t: [N, V] float32, the teacher's logits; None: the loss is cross-entropy.
      targets: labels and group [N] int32, mask [N] bool; the gradient is 0 where masked.
      vocab: the entries of these logits.
      listed_only: as in HeadConfig; metrics are those of the whole distributions all the same.

    Returns:
      (values, gradient): values by the names above, [N] float32, also of masked tokens; the
      gradient with respect to z_s, [N, V] float32.
    """
    labels, mask, group = targets
    if z_t is None:
        (student,) = _softmaxes([z_s], None, vocab.axis)
        values = _model_values(student, z_s, labels, vocab)
        values |= {"ce_loss": values["ce"], "loss": values["ce"]}
        return values, _ce_gradient(student, z_s, labels, mask, vocab)
    assert scalars is not None
    T, ratio = static_temperature(config) or scalars.temperature, scalars.kd_ratio
    if group is not None:
        ratio = jnp.where(group > 0, 1.0, ratio)
    z_q = jnp.where(z_t > NEGATIVE / 2, z_s, NEGATIVE) if listed_only else z_s
    student, teacher, *listed = _softmaxes([z_s, z_t, *[z_q] * listed_only], T, vocab.axis)
    log_q, log_p = _log_probs((listed or [student])[0], z_q, T), _log_probs(teacher, z_t, T)
    weight = token_weight(log_q, log_p, config, vocab.axis)
    terms = divergence_terms(log_q, log_p, config, weight)
    agreement = agreement_terms(_log_probs(student, z_s), _log_probs(teacher, z_t))
    agree = (z_s == student.highest) & (z_t == teacher.highest)
    agreement["top1_agreement"] = agree.astype(jnp.float32)
    metric = None if listed_only else _metric_of(config, T)
    sums, values = _pair_sums(terms, agreement, metric, vocab.axis)
    values |= _model_values(student, z_s, labels, vocab)
    values |= _model_values(teacher, z_t, labels, vocab, "teacher_")
    scale = t2_factor(T, config)
    values |= {"ce_loss": values["ce"], "kd_loss": sums.value[:, 0] * scale}
    values["loss"] = (1 - ratio) * values["ce"] + ratio * values["kd_loss"]
    # The barrier makes XLA recompute the exponentials instead of storing them.
    student, teacher, *listed = jax.lax.optimization_barrier((student, teacher, *listed))
    log_q, log_p = _log_probs((listed or [student])[0], z_q, T), _log_probs(teacher, z_t, T)
    slope = divergence_terms(log_q, log_p, config, weight).slope
    kd_weights = jnp.where(mask, ratio * scale / T, 0.0)[:, None]
    gradient = (slope - jnp.exp(log_q) * sums.slope) * kd_weights
    ce_weights = jnp.where(mask, 1 - ratio, 0.0)
    return values, gradient + _ce_gradient(student, z_s, labels, ce_weights, vocab)


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


def _metric_of(config, T):
    """Returns the metric that equals the divergence before its sum; None if there is none."""
    at_one = _is_one(T) and config.compat != "torchtune"
    return _METRIC_AT_ONE.get(config.divergence) if at_one else None


def _pair_sums(terms, agreement, same, axis):
    """Returns the divergence's Terms summed, [N, 1], and the agreement metrics, [N].

    Args:
      same: the metric that equals the divergence, which is summed once; or None.
    """
    others = {name: x for name, x in agreement.items() if name != same}
    sums, others = sum_over_vocab((terms, others), axis)
    metrics = others if same is None else {**others, same: sums.value}
    metrics = {name: x[:, 0] for name, x in metrics.items()}
    metrics["top1_agreement"] = jnp.minimum(metrics["top1_agreement"], 1.0)  # ties count once
    return sums, metrics


class _Softmax(NamedTuple):
    """Statistics of one model's logits that give log-probabilities, [N, 1] each."""

    highest: jax.Array
    """The largest logit."""
    log_sum: jax.Array
    """log sum_v exp(logit - highest)."""
    tempered_log_sum: jax.Array
    """log sum_v exp((logit - highest) / T)."""
    entropy: jax.Array
    """Nats, at temperature 1."""


def _softmaxes(logits, T, axis):
    """Returns the _Softmax of each model's logits [N, V]."""
    T = None if _is_one(T) else T
    # A reduction cannot close over a temperature that a schedule changes.
    one_pass = _sums if isinstance(T, jax.Array) else _sums_in_one_pass
    choice = by_platform("one_pass_softmax", partial(one_pass, T=T), partial(_sums, T=T))
    sums = choice(logits)
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
    """Sums of a softmax, [N, 1] each, with x = logit - highest."""

    highest: jax.Array
    total: jax.Array
    """sum_v exp(x)."""
    moment: jax.Array
    """sum_v x exp(x)."""
    tempered: jax.Array
    """sum_v exp(x / T); the total at temperature 1."""


def _sums(logits, T):
    """Returns the _Sums of each model's logits: one pass for all maxima, one for all sums."""
    highest = max_over_vocab(logits)
    terms = []
    for z, m in zip(logits, highest, strict=True):
        e = jnp.exp(z - m)
        tempered = () if T is None else (jnp.exp((z - m) / T),)
        terms.append((e, e * (z - m), *tempered))
    return [_filled(m, *x) for m, x in zip(highest, sum_over_vocab(terms), strict=True)]


def _sums_in_one_pass(logits, T):
    """Returns the _Sums of each model's logits, which are read once."""
    return [_running_sums(z, T) for z in logits]


def _running_sums(z, T):
    """Returns the _Sums of logits [N, V] by a reduction that rescales them as the maximum grows."""

    def combine(one, other):
        gap = one[0] - other[0]
        keep = partial(jnp.where, gap > 0)
        high, low = tuple(map(keep, one, other)), tuple(map(keep, other, one))
        rest = _rescaled(_filled(*low), -jnp.abs(gap), T)  # one exponential, not one per side
        return high[0], *map(jnp.add, high[1:], rest)  # at temperature 1 there is no fourth

    z = jnp.maximum(z, NEGATIVE)  # a difference of infinities would be NaN
    ones, zeros = jnp.ones_like(z), jnp.zeros_like(z)
    entries = (z, ones, zeros) if T is None else (z, ones, zeros, ones)
    starts = (jnp.float32(NEGATIVE), *[jnp.float32(0)] * len(entries[1:]))
    sums = jax.lax.reduce(entries, starts, combine, dimensions=(1,))
    return _filled(*(x[:, None] for x in sums))


def _filled(highest, total, moment, tempered=None):
    return _Sums(highest, total, moment, total if tempered is None else tempered)


def _rescaled(sums, fall, T):
    """Returns total, moment and tempered of _Sums for the maximum `highest - fall`."""
    scale = jnp.exp(fall)
    hot = scale if T is None else jnp.exp(fall / T)
    return scale * sums.total, scale * (sums.moment + fall * sums.total), hot * sums.tempered


def _is_one(T):
    return T is None or (isinstance(T, (int, float)) and T == 1)


def _log_probs(softmax, logits, T=None):
    """Returns log-probabilities [N, V] at temperature T, 1 by default."""
    if _is_one(T):
        return logits - softmax.highest - softmax.log_sum
    return (logits - softmax.highest) / T - softmax.tempered_log_sum


def _ce_gradient(softmax, logits, labels, weights, vocab):
    """Returns weights (q - onehot), the gradient of weighted cross-entropy in the logits, [N, V].

    Args:
      weights: [N].
    """
    weights = weights[:, None].astype(jnp.float32)
    onehot = jnp.where(labels[:, None] == vocab.entries[None], weights, 0.0)
    return jnp.exp(_log_probs(softmax, logits)) * weights - onehot


def _model_values(softmax, logits, labels, vocab, prefix=""):
    """Returns the metrics that need only one model, [N] float32, with prefixed names."""
    at_label = label_logits(logits, labels, vocab)
    values = {
        "ce": softmax.log_sum - (at_label - softmax.highest),
        "entropy": softmax.entropy,
        "confidence": jnp.exp(-softmax.log_sum),
        "correct": (at_label == softmax.highest).astype(jnp.float32),
    }
    return {prefix + name: x[:, 0] for name, x in values.items()}
