"""Every divergence once: its value and its closed-form gradient, per token, in float32.

Inputs are log-probabilities over the last dimension: `log_q` of the student, `log_p` of the
teacher. A padded vocabulary entry has a large negative log-probability in both.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

Divergence = Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]


def forward_kl(log_q: jax.Array, log_p: jax.Array) -> tuple[jax.Array, jax.Array]:
    """KL(teacher || student) = sum_v p (log p - log q), nats.

    Returns:
      value [...] and its gradient with respect to the student's logits, q - p, [..., V].
    """
    p = jnp.exp(log_p)
    return expectation(p, log_p - log_q), jnp.exp(log_q) - p


DIVERGENCES: dict[str, Divergence] = {"forward_kl": forward_kl}


def expectation(p: jax.Array, x: jax.Array) -> jax.Array:
    """Returns sum_v p x, where entries without probability count nothing even if x is infinite."""
    return jnp.sum(jnp.where(p > 0, p * x, 0.0), axis=-1)


def cross_entropy(log_q: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """-log q[label], nats.

    Returns:
      value [...] and its gradient with respect to the student's logits, q - onehot, [..., V].
    """
    picked = labels[..., None] == jnp.arange(log_q.shape[-1]).reshape((1,) * labels.ndim + (-1,))
    return pick(log_q, labels), jnp.exp(log_q) - picked


def pick(log_q: jax.Array, labels: jax.Array) -> jax.Array:
    """Returns -log q[label] of [..., V] log-probabilities, [...]."""
    return -jnp.take_along_axis(log_q, labels[..., None], axis=-1)[..., 0]


def entropy(log_p: jax.Array) -> jax.Array:
    """-sum_v p log p, nats."""
    return -expectation(jnp.exp(log_p), log_p)


def top1_agreement(student_logits: jax.Array, teacher_logits: jax.Array) -> jax.Array:
    """Returns 1.0 where both models rank the same token first, alone or beside others.

    By the maxima, which the softmax needs anyway: finding their places takes several times longer.
    """
    first = student_logits == jnp.max(student_logits, axis=-1, keepdims=True)
    first &= teacher_logits == jnp.max(teacher_logits, axis=-1, keepdims=True)
    return jnp.any(first, axis=-1).astype(jnp.float32)


def acceptance(log_q: jax.Array, log_p: jax.Array) -> jax.Array:
    """sum_v min(p, q): the chance that a speculative draft token is accepted (arXiv 2211.17192)."""
    return jnp.sum(jnp.exp(jnp.minimum(log_q, log_p)), axis=-1)


def confidence(log_q: jax.Array) -> jax.Array:
    """Returns the probability of the likeliest entry."""
    return jnp.exp(jnp.max(log_q, axis=-1))


def correct(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Returns 1.0 where the label is ranked first, alone or beside others."""
    picked = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    return (picked == jnp.max(logits, axis=-1)).astype(jnp.float32)


def overlap(places: jax.Array, others: jax.Array) -> jax.Array:
    """Returns the share of k entries [..., k] that are among the k others."""
    same = places[..., :, None] == others[..., None, :]
    return jnp.sum(same, axis=(-1, -2)).astype(jnp.float32) / places.shape[-1]
