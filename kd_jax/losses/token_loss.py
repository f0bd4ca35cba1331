"""Each token's loss, metrics and gradient from the logits of both models, in few passes."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from kd_jax.config import LossConfig
from kd_jax.losses.divergences import divergence_terms, t2_factor
from kd_jax.losses.head_inputs import Targets
from kd_jax.losses.softmax import Softmax, is_one, softmaxes
from kd_jax.losses.token_weights import token_weight
from kd_jax.losses.vocabulary import NEGATIVE, Vocab, label_logits, sum_over_vocab

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

    A token that the student sampled has kd_ratio 1. Passes over the vocabulary: the softmaxes (one
    pass or two, by platform), the token's weight where the divergence has one, the sums of losses
    and metrics, the gradient.

    Args:
      scalars: None without a teacher.
      z_s: [C, V] float32, the student's logits.
      z_t: [C, V] float32, the teacher's logits; None: the loss is cross-entropy.
      targets: labels and group [C] int32, mask [C] bool; the gradient is 0 where masked.
      vocab: the entries of these logits.
      listed_only: as in HeadConfig; metrics are those of the whole distributions all the same.

    Returns:
      (values, gradient): values by the names above, [C] float32, also of masked tokens; the
      gradient with respect to z_s, [C, V] float32.
    """
    labels, mask, group = targets
    if z_t is None:
        return _cross_entropy(z_s, targets, vocab)
    assert scalars is not None
    temperature = static_temperature(config) or scalars.temperature
    ratio = scalars.kd_ratio if group is None else jnp.where(group > 0, 1.0, scalars.kd_ratio)
    pair = _make_pair(z_s, z_t, temperature, listed_only, vocab.axis)
    log_q, log_p = pair.log_probs()
    weight = token_weight(log_q, log_p, config, vocab.axis)
    terms = divergence_terms(log_q, log_p, config, weight)
    sums, values = _sums_and_metrics(config, pair, terms, labels, vocab)
    scale = t2_factor(temperature, config)
    values |= {"ce_loss": values["ce"], "kd_loss": sums.value[:, 0] * scale}
    values["loss"] = (1 - ratio) * values["ce"] + ratio * values["kd_loss"]
    pair = pair.behind_barrier()
    log_q, log_p = pair.log_probs()
    grad_log_q = divergence_terms(log_q, log_p, config, weight).grad_log_q
    kd_weights = jnp.where(mask, ratio * scale / temperature, 0.0)[:, None]
    kd_gradient = (grad_log_q - jnp.exp(log_q) * sums.grad_log_q) * kd_weights
    ce_weights = jnp.where(mask, 1 - ratio, 0.0)
    return values, kd_gradient + _ce_gradient(pair.student, z_s, labels, ce_weights, vocab)


def _cross_entropy(z_s, targets, vocab):
    """Returns token_losses without a teacher."""
    (student,) = softmaxes([z_s], 1, vocab.axis)
    values = _model_values(student, z_s, targets.labels, vocab)
    values |= {"ce_loss": values["ce"], "loss": values["ce"]}
    return values, _ce_gradient(student, z_s, targets.labels, targets.mask, vocab)


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


class _Pair(NamedTuple):
    """Both models' logits, [C, V] float32, and the statistics of their softmaxes."""

    z_s: jax.Array
    z_t: jax.Array
    z_q: jax.Array
    """z_s in the divergence: NEGATIVE at entries that the divergence leaves out."""
    student: Softmax
    teacher: Softmax
    listed: Softmax | None
    """Softmax of z_q; None: no entry is left out."""
    temperature: float | jax.Array

    def log_probs(self) -> tuple[jax.Array, jax.Array]:
        """Returns log q and log p of the divergence, [C, V]."""
        student = self.student if self.listed is None else self.listed
        log_q = student.log_probs(self.z_q, self.temperature)
        return log_q, self.teacher.log_probs(self.z_t, self.temperature)

    def behind_barrier(self) -> "_Pair":
        """Returns the pair, of which XLA recomputes the exponentials instead of storing them."""
        student, teacher, listed = jax.lax.optimization_barrier(
            (self.student, self.teacher, self.listed)
        )
        return self._replace(student=student, teacher=teacher, listed=listed)


def _make_pair(z_s, z_t, temperature, listed_only, axis):
    logits, z_q = [z_s, z_t], z_s
    if listed_only:
        z_q = jnp.where(z_t > NEGATIVE / 2, z_s, NEGATIVE)
        logits.append(z_q)
    student, teacher, *listed = softmaxes(logits, temperature, axis)
    return _Pair(z_s, z_t, z_q, student, teacher, listed[0] if listed else None, temperature)


def _sums_and_metrics(config, pair, terms, labels, vocab):
    """Returns the divergence's Terms summed, [C, 1], and the metrics, [C], in one pass.

    A metric that equals the divergence is summed once.
    """
    z_s, z_t = pair.z_s, pair.z_t
    agreement = agreement_terms(pair.student.log_probs(z_s), pair.teacher.log_probs(z_t))
    agree = (z_s == pair.student.highest) & (z_t == pair.teacher.highest)
    agreement["top1_agreement"] = agree.astype(jnp.float32)
    plain = pair.listed is None and config.compat != "torchtune"
    if plain and is_one(pair.temperature) and config.divergence in _METRIC_AT_ONE:
        agreement[_METRIC_AT_ONE[config.divergence]] = terms.value
    sums, agreement = sum_over_vocab((terms, agreement), vocab.axis)
    metrics = {name: x[:, 0] for name, x in agreement.items()}
    metrics["top1_agreement"] = jnp.minimum(metrics["top1_agreement"], 1.0)  # ties count once
    metrics |= _model_values(pair.student, z_s, labels, vocab)
    return sums, metrics | _model_values(pair.teacher, z_t, labels, vocab, "teacher_")


def _ce_gradient(softmax, logits, labels, weights, vocab):
    """Returns weights (q - onehot), the gradient of weighted cross-entropy in the logits, [C, V].

    Args:
      weights: [C].
    """
    weights = weights[:, None].astype(jnp.float32)
    onehot = jnp.where(labels[:, None] == vocab.entries[None], weights, 0.0)
    return jnp.exp(softmax.log_probs(logits)) * weights - onehot


def _model_values(softmax, logits, labels, vocab, prefix=""):
    """Returns the metrics that need only one model, [C] float32, with prefixed names."""
    at_label = label_logits(logits, labels, vocab)
    values = {
        "ce": softmax.log_sum - (at_label - softmax.highest),
        "entropy": softmax.entropy,
        "confidence": jnp.exp(-softmax.log_sum),
        "correct": (at_label == softmax.highest).astype(jnp.float32),
    }
    return {prefix + name: x[:, 0] for name, x in values.items()}
