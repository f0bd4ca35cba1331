"""The fused head: hidden states of both models to loss, metrics and the student's gradient.

No array of tokens x vocabulary larger than one chunk exists: a loop over chunks of the sequence
computes both models' logits, the loss and its closed-form gradient, multiplies that by the
student's head at once, and keeps only the gradient of the hidden states. The backward pass scales.
Tokens without a loss are moved behind the others first, and chunks that hold none are not run.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from kd_jax import losses
from kd_jax.config import LossConfig
from kd_jax.sharding import BATCH_AXES
from kd_jax.token_loss import (
    EVAL_METRICS,
    METRICS,
    SINGLE_EVAL_METRICS,
    SINGLE_METRICS,
    token_losses,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadConfig:
    """What the head computes; static under jit."""

    loss: LossConfig
    chunk_tokens: int
    """Tokens of each shard of the rows in a chunk."""
    vocab_size: int
    """Vocabulary entries with a meaning: those above are padding in either model."""
    num_shards: int = 1
    """Shards that the rows of a batch are split into; each gathers its own tokens."""
    head_trainable: bool = False
    """Whether the student's head gets a gradient."""
    top_k: int | None = None
    """Entries of each model whose overlap an evaluation measures; None measures none."""


def chunk_tokens(wanted: int | None, platform: str, vocab_size: int, shard_tokens: int) -> int:
    """Returns how many of a shard's tokens are in a chunk.

    None takes what docs/benchmarks.md found best on a CPU, little more than its caches hold; on an
    accelerator, whose matrix units want many rows, what makes two float32 logits fill a gibibyte.
    """
    if wanted is None:
        wanted = 80 if platform == "cpu" else max(128, 2**27 // vocab_size // 128 * 128)
    return min(wanted, shard_tokens)


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
    G, C = config.num_shards, config.chunk_tokens
    rows, order, num_chunks = _arrange(config, student_hidden, teacher_hidden, labels, mask)
    heads = _heads(rows, student_head, teacher_head)
    entries = _entries(heads)

    def by_shard(x):  # what is summed in the loop is summed over the shards after it
        return x.reshape(G, C, *x.shape[1:])

    def run_chunk(index, carry):
        sums, d_hidden, d_head = carry
        h_s, z_s, z_t, y, m = _chunk(config, rows, heads, index)
        values, d_logits = token_losses(config.loss, scalars, z_s, z_t, y, m, entries)
        for name, x in sums.items():
            sums[name] = x + jnp.sum(by_shard(jnp.where(m, values[name], 0.0)), axis=1)
        d_logits = d_logits.astype(h_s.dtype)
        back = f"NV,{_student_dims(heads[0])}->ND"
        product = jnp.einsum(back, d_logits, heads[0], preferred_element_type=jnp.float32)
        product = by_shard(product.astype(h_s.dtype))
        d_hidden = jax.lax.dynamic_update_slice_in_dim(d_hidden, product, index * C, axis=1)
        if d_head is not None:
            operands = by_shard(d_logits), by_shard(h_s)
            d_head += jnp.einsum("GCV,GCD->GVD", *operands, preferred_element_type=jnp.float32)
        return sums, d_hidden, d_head

    names = ("loss", *(SINGLE_METRICS if teacher_head is None else METRICS))
    sums = dict.fromkeys(names, jnp.zeros(G, jnp.float32))
    d_head = None
    if config.head_trainable:
        d_head = jnp.zeros((G, len(entries), rows[0].shape[-1]), jnp.float32)
    start = (sums, jnp.zeros_like(rows[0]), d_head)
    sums, d_hidden, d_head = jax.lax.fori_loop(0, num_chunks, run_chunk, start)
    sums = {name: jnp.sum(x) for name, x in sums.items()}
    d_head = None if d_head is None else jnp.sum(d_head, axis=0)
    return sums.pop("loss"), sums, (_put_back(d_hidden, order, mask), d_head)


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
    C = config.chunk_tokens
    rows, order, num_chunks = _arrange(config, student_hidden, teacher_hidden, labels, mask)
    heads = _heads(rows, student_head, teacher_head)
    entries = _entries(heads)

    def run_chunk(index, metrics):
        _, z_s, z_t, y, m = _chunk(config, rows, heads, index)
        # XLA drops the gradient, which is not used.
        values, _ = token_losses(config.loss, scalars, z_s, z_t, y, m, entries)
        if "topk_overlap" in metrics:
            places = (_top_k(z, config.top_k, mesh) for z in (z_s, z_t))
            values["topk_overlap"] = losses.overlap(*places)
        return {
            name: jax.lax.dynamic_update_slice_in_dim(
                x, jnp.where(m, values[name], 0.0).reshape(-1, C), index * C, axis=1
            )
            for name, x in metrics.items()
        }

    names = SINGLE_EVAL_METRICS if teacher_head is None else EVAL_METRICS
    if config.top_k is not None and teacher_head is not None:
        names += ("topk_overlap",)
    zeros = jnp.zeros(rows[3].shape, jnp.float32)
    metrics = jax.lax.fori_loop(0, num_chunks, run_chunk, dict.fromkeys(names, zeros))
    return {name: _put_back(value, order, mask) for name, value in metrics.items()}


def _arrange(config, *rows):
    """Returns rows [B, S, ...] as [G, chunks * C, ...], a shard's tokens with a loss first.

    Returns:
      the rows, the last of which is the mask; the order of the tokens; chunks that are needed.
    """
    G, C = config.num_shards, config.chunk_tokens
    rows = jax.tree.map(lambda x: x.reshape(G, -1, *x.shape[2:]), rows)
    mask = rows[-1]
    order = jnp.argsort(~mask, axis=1, stable=True)  # [G, B * S / G]
    padded = -mask.shape[1] % C

    def gather(x):
        x = jnp.take_along_axis(x, order.reshape(*order.shape, *(1,) * (x.ndim - 2)), axis=1)
        return jnp.pad(x, [(0, 0), (0, padded)] + [(0, 0)] * (x.ndim - 2))

    return jax.tree.map(gather, rows), order, -(-jnp.max(jnp.sum(mask, axis=1)) // C)


def _put_back(x, order, like):
    """Returns arranged rows [G, chunks * C, ...] as [B, S, ...], as the mask `like` is laid out."""
    back = jnp.argsort(order, axis=1).reshape(*order.shape, *(1,) * (x.ndim - 2))
    x = jnp.take_along_axis(x[:, : order.shape[1]], back, axis=1)
    return x.reshape(*like.shape, *x.shape[2:])


def _chunk(config, rows, heads, index):
    """Returns student hidden states, logits, labels and mask of a chunk's N = G * C tokens."""
    C = config.chunk_tokens

    def cut(x):
        x = jax.lax.dynamic_slice_in_dim(x, index * C, C, axis=1)
        return x.reshape(-1, *x.shape[2:])

    h_s, h_t, labels, mask = jax.tree.map(cut, rows)
    z_s = _logits(f"ND,{_student_dims(heads[0])}->NV", h_s, heads[0], config.vocab_size)
    z_t = None if h_t is None else _logits("ND,VD->NV", h_t, heads[1], config.vocab_size)
    return h_s, z_s, z_t, labels, mask


def _heads(rows, student_head, teacher_head):
    """Returns both heads [V, D] cut to the V that both have, in their products' dtype.

    The student's is [D, V] in bfloat16: a CPU, which multiplies it from both sides faster so, makes
    that copy once here.
    """
    head = _cut(student_head, teacher_head).astype(rows[0].dtype)
    heads = [head.T if head.dtype == jnp.bfloat16 else head]
    if teacher_head is not None:
        heads.append(_cut(teacher_head, student_head).astype(rows[1].dtype))
    return heads


def _student_dims(head):
    """Returns the dims of the student's head as `_heads` laid it out."""
    return "DV" if head.dtype == jnp.bfloat16 else "VD"


def _entries(heads):
    """Returns 0 to V - 1; counted anew for every logit, they cost a CPU as much as its softmax."""
    return jax.lax.optimization_barrier(
        jnp.arange(heads[0].shape[_student_dims(heads[0]).index("V")])
    )


def _cut(head, other):
    """Returns the head without the padding rows that the other model's lacks."""
    return head if other is None else head[: min(len(head), len(other))]


def _logits(product, hidden, head, vocab_size):
    """Returns [N, V] float32; padding entries hold losses.NEGATIVE."""
    z = jnp.einsum(product, hidden, head, preferred_element_type=jnp.float32)
    real = jnp.arange(z.shape[1]) < vocab_size
    return z if z.shape[1] == vocab_size else jnp.where(real[None], z, losses.NEGATIVE)


def _top_k(z, k, mesh):
    """Returns where the k largest logits of each token are, [B, C, k] int32."""

    def places(z):
        return jax.lax.top_k(z, k)[1]

    if mesh is None:
        return places(z)
    rows = PartitionSpec(BATCH_AXES)  # left to itself, XLA gathers every device's logits for this
    return jax.shard_map(places, mesh=mesh, in_specs=rows, out_specs=rows)(z)
