"""The fused head: hidden states of both models to loss, metrics and the student's gradient.

No array of tokens x vocabulary larger than one chunk exists: a loop over chunks of the sequence
computes both models' logits, the loss and its closed-form gradient, multiplies that by the
student's head at once, and keeps only the gradient of the hidden states. The backward pass scales.
Tokens without a loss are moved behind the others first, and chunks that hold none are not run.
"""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from kd_jax import losses
from kd_jax.config import LossConfig
from kd_jax.sharding import BATCH_AXES

METRICS = ("ce_loss", "kd_loss", "teacher_entropy", "teacher_ce", "top1_agreement")
SINGLE_METRICS = ("loss", "ce", "entropy", "confidence", "correct")
EVAL_METRICS = (
    *SINGLE_METRICS, "kd_loss", "kl_forward", "kl_reverse", "top1_agreement", "acceptance",
    "teacher_ce", "teacher_entropy", "teacher_confidence", "teacher_correct", "topk_overlap",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadConfig:
    """What the head computes; static under jit."""

    loss: LossConfig
    chunk_len: int
    """Positions of each row in a chunk."""
    vocab_size: int
    """Vocabulary entries with a meaning: those above are padding in either model."""
    head_trainable: bool = False
    """Whether the student's head gets a gradient."""
    top_k: int | None = None
    """Entries of each model whose overlap an evaluation measures; None measures none."""

    @property
    def temperature(self) -> float | None:
        """What is known while compiling; None where it follows a schedule."""
        return self.loss.temperature if self.loss.temperature_end is None else None


class LossScalars(NamedTuple):
    """What a schedule may change from step to step: float32 scalars."""

    kd_ratio: jax.Array
    temperature: jax.Array


def chunk_len(chunk_tokens: int | None, rows_per_device: int, seq_len: int) -> int:
    """Returns positions of each row in a chunk of about `chunk_tokens` tokens a device.

    None takes what docs/benchmarks.md found best: on a CPU little more than its caches hold, on
    an accelerator enough rows to keep its matrix units full.
    """
    if chunk_tokens is None:
        chunk_tokens = 128 if jax.default_backend() == "cpu" else 1024
    return max(1, min(seq_len, chunk_tokens // rows_per_device))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def kd_head(
    config, scalars, student_hidden, teacher_hidden, student_head, teacher_head, labels, mask
):
    """Returns the summed loss and the sums of the metrics over unmasked tokens.

    Args:
      config: HeadConfig.
      scalars: LossScalars; None for no teacher.
      student_hidden: [B, S, Ds]; its dtype is that of the matrix products.
      teacher_hidden: [B, S, Dt], likewise; None for no teacher, where the loss is CE.
      student_head: [V, Ds], any V of at least config.vocab_size.
      teacher_head: [V', Dt], likewise.
      labels: [B, S] int32.
      mask: [B, S] bool; a token without a loss contributes nothing.

    Returns:
      (loss, metrics): loss is the float32 sum over tokens of
      (1 - kd_ratio) * CE + kd_ratio * divergence, differentiable in student_hidden and, with
      head_trainable, student_head; metrics are float32 sums by the names in METRICS.
    """
    arrays = (student_hidden, teacher_hidden, student_head, teacher_head, labels, mask)
    loss, metrics, _ = _run(config, scalars, *arrays)
    return loss, metrics


def _forward(config, scalars, *arrays):
    loss, metrics, (d_hidden, d_head) = _run(config, scalars, *arrays)
    if d_head is not None:  # rows that were cut get no gradient
        d_head = jnp.pad(d_head, ((0, len(arrays[2]) - len(d_head)), (0, 0)))
    return (loss, metrics), (d_hidden, d_head)


def _backward(config, gradients, cotangents):
    scale, _ = cotangents  # the metrics are not differentiable
    d_hidden, d_head = gradients
    d_hidden = (d_hidden.astype(jnp.float32) * scale).astype(d_hidden.dtype)
    d_head = None if d_head is None else d_head * scale
    return None, d_hidden, None, d_head, None, None, None


kd_head.defvjp(_forward, _backward)


def _run(config, scalars, student_hidden, teacher_hidden, student_head, teacher_head, labels, mask):
    C = config.chunk_len
    rows, order, num_chunks = _arrange(C, student_hidden, teacher_hidden, labels, mask)
    heads = student_head, teacher_head = _heads(rows, student_head, teacher_head)

    def run_chunk(index, carry):
        loss, metrics, d_hidden, d_head = carry
        h_s, z_s, z_t, y, m = _chunk(config, rows, heads, index)
        values, d_logits = _token_losses(config, scalars, z_s, z_t, y)
        values = {name: jnp.sum(jnp.where(m, value, 0.0)) for name, value in values.items()}
        loss += values.pop("loss")
        metrics = {name: metrics[name] + values[name] for name in metrics}
        d_logits = jnp.where(m[:, :, None], d_logits, 0.0).astype(h_s.dtype)
        product = jnp.einsum(
            "BCV,VD->BCD", d_logits, student_head, preferred_element_type=jnp.float32
        )
        product = product.astype(h_s.dtype)
        d_hidden = jax.lax.dynamic_update_slice_in_dim(d_hidden, product, index * C, axis=1)
        if d_head is not None:
            d_head += jnp.einsum("BCV,BCD->VD", d_logits, h_s, preferred_element_type=jnp.float32)
        return loss, metrics, d_hidden, d_head

    names = METRICS if teacher_head is not None else ("ce_loss",)
    zero = jnp.zeros((), jnp.float32)
    d_head = jnp.zeros(student_head.shape, jnp.float32) if config.head_trainable else None
    start = (zero, dict.fromkeys(names, zero), jnp.zeros_like(rows[0]), d_head)
    loss, metrics, d_hidden, d_head = jax.lax.fori_loop(0, num_chunks, run_chunk, start)
    return loss, metrics, (_put_back(d_hidden, order), d_head)


def token_metrics(
    config,
    scalars,
    student_hidden,
    teacher_hidden,
    student_head,
    teacher_head,
    labels,
    mask,
    *,
    mesh=None,
):
    """Returns what an evaluation says of each token, [B, S] float32 by name; 0 where masked.

    Distributions are those of temperature 1, but for loss and kd_loss, which are training's.

    Args:
      as kd_head's, and
      mesh: over whose BATCH_AXES the rows are split.
    """
    C = config.chunk_len
    rows, order, num_chunks = _arrange(C, student_hidden, teacher_hidden, labels, mask)
    heads = _heads(rows, student_head, teacher_head)

    def run_chunk(index, metrics):
        _, z_s, z_t, y, m = _chunk(config, rows, heads, index)
        values = _token_values(config, scalars, z_s, z_t, y, mesh)
        return {
            name: jax.lax.dynamic_update_slice_in_dim(
                metrics[name], jnp.where(m, value, 0.0), index * C, axis=1
            )
            for name, value in values.items()
        }

    names = SINGLE_METRICS if teacher_head is None else EVAL_METRICS
    if config.top_k is None or teacher_head is None:
        names = tuple(name for name in names if name != "topk_overlap")
    zeros = jnp.zeros(rows[3].shape, jnp.float32)
    metrics = jax.lax.fori_loop(0, num_chunks, run_chunk, dict.fromkeys(names, zeros))
    return {name: _put_back(value, order) for name, value in metrics.items()}


def _arrange(chunk_len, student_hidden, teacher_hidden, labels, mask):
    """Returns the rows as [B, chunks * C, ...], tokens with a loss first; their order; chunks."""
    B, S, _ = student_hidden.shape
    order = jnp.argsort(~mask, axis=1, stable=True)  # [B, S]
    padded = -S % chunk_len

    def gather(x):
        x = jnp.take_along_axis(x, order.reshape(B, S, *(1,) * (x.ndim - 2)), axis=1)
        return jnp.pad(x, [(0, 0), (0, padded)] + [(0, 0)] * (x.ndim - 2))

    rows = jax.tree.map(gather, (student_hidden, teacher_hidden, labels, mask))
    return rows, order, -(-jnp.max(jnp.sum(mask, axis=1)) // chunk_len)


def _put_back(x, order):
    """Returns arranged rows [B, chunks * C, ...] as [B, S, ...], every token in its place."""
    back = jnp.argsort(order, axis=1).reshape(*order.shape, *(1,) * (x.ndim - 2))
    return jnp.take_along_axis(x[:, : order.shape[1]], back, axis=1)


def _chunk(config, rows, heads, index):
    """Returns a chunk's student hidden states, both models' logits, labels and mask."""
    C = config.chunk_len
    h_s, h_t, labels, mask = jax.tree.map(
        lambda x: jax.lax.dynamic_slice_in_dim(x, index * C, C, axis=1), rows
    )
    z_s = _logits(h_s, heads[0], config.vocab_size)
    z_t = None if h_t is None else _logits(h_t, heads[1], config.vocab_size)
    return h_s, z_s, z_t, labels, mask


def _heads(rows, student_head, teacher_head):
    """Returns both heads in the dtype of their matrix products, cut to what both have."""
    student_head = _cut(student_head, teacher_head).astype(rows[0].dtype)
    if teacher_head is not None:
        teacher_head = _cut(teacher_head, student_head).astype(rows[1].dtype)
    return student_head, teacher_head


def _cut(head, other):
    """Returns the head without the padding rows that the other model's lacks."""
    return head if other is None else head[: min(len(head), len(other))]


def _logits(hidden, head, vocab_size):
    """Returns [B, C, V] float32; padding entries hold NEGATIVE."""
    z = jnp.einsum("BCD,VD->BCV", hidden, head, preferred_element_type=jnp.float32)
    if head.shape[0] == vocab_size:
        return z
    real = jnp.arange(head.shape[0]) < vocab_size
    return jnp.where(real[None, None], z, losses.NEGATIVE)


def _token_losses(config, scalars, z_s, z_t, labels):
    """Returns each token's loss and metrics [B, C], and the loss's gradient in z_s [B, C, V]."""
    log_q = jax.nn.log_softmax(z_s, axis=-1)
    ce, d_ce = losses.cross_entropy(log_q, labels)
    if z_t is None:
        return {"loss": ce, "ce_loss": ce}, d_ce
    log_p = jax.nn.log_softmax(z_t, axis=-1)
    T = scalars.temperature if config.temperature is None else config.temperature
    log_q_t = log_q if config.temperature == 1 else jax.nn.log_softmax(z_s / T, axis=-1)
    log_p_t = log_p if config.temperature == 1 else jax.nn.log_softmax(z_t / T, axis=-1)
    kd, d_kd = losses.divergence(log_q_t, log_p_t, config.loss)
    scale = losses.t2_factor(T, config.loss)
    kd, d_kd = scale * kd, scale / T * d_kd  # from here on in the logits
    values = {
        "loss": (1 - scalars.kd_ratio) * ce + scalars.kd_ratio * kd,
        "ce_loss": ce,
        "kd_loss": kd,
        "teacher_entropy": losses.entropy(log_p_t),
        "teacher_ce": losses.pick(log_p, labels),
        "top1_agreement": losses.top1_agreement(z_s, z_t),
    }
    return values, (1 - scalars.kd_ratio) * d_ce + scalars.kd_ratio * d_kd


def _token_values(config, scalars, z_s, z_t, labels, mesh):
    """Returns the metrics of evaluation, [B, C] each."""
    values, _ = _token_losses(config, scalars, z_s, z_t, labels)  # XLA drops the gradient, unused
    log_q = jax.nn.log_softmax(z_s, axis=-1)
    values |= {
        "ce": values.pop("ce_loss"),
        "entropy": losses.entropy(log_q),
        "confidence": losses.confidence(log_q),
        "correct": losses.correct(z_s, labels),
    }
    if z_t is None:
        return values
    log_p = jax.nn.log_softmax(z_t, axis=-1)
    values |= {
        "kl_forward": losses.kl(log_p, log_q),
        "kl_reverse": losses.kl(log_q, log_p),
        "acceptance": losses.acceptance(log_q, log_p),
        "teacher_entropy": losses.entropy(log_p),  # at temperature 1, unlike training's
        "teacher_confidence": losses.confidence(log_p),
        "teacher_correct": losses.correct(z_t, labels),
    }
    if config.top_k is not None:
        places = (_top_k(z, config.top_k, mesh) for z in (z_s, z_t))
        values["topk_overlap"] = losses.overlap(*places)
    return values


def _top_k(z, k, mesh):
    """Returns where the k largest logits of each token are, [B, C, k] int32."""

    def places(z):
        return jax.lax.top_k(z, k)[1]

    if mesh is None:
        return places(z)
    rows = PartitionSpec(BATCH_AXES)  # left to itself, XLA gathers every device's logits for this
    return jax.shard_map(places, mesh=mesh, in_specs=rows, out_specs=rows)(z)
