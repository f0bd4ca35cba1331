"""The fused head: hidden states of both models to loss, metrics and the student's gradient.

No array of tokens x vocabulary larger than one chunk exists: a loop over chunks of the sequence
computes both models' logits, the loss and its closed-form gradient, multiplies that by the
student's head at once, and keeps only the gradient of the hidden states. The backward pass scales.
Tokens without a loss are moved behind the others first, and chunks that hold none are not run.

On a mesh each device does this with its own rows and, along "tensor", its share of the vocabulary.
Only the reductions over the vocabulary are collectives inside the loop; sums and gradients are
added up once behind it.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from kd_jax.config import LossConfig
from kd_jax.losses import divergences
from kd_jax.losses.token_loss import (
    EVAL_METRICS,
    METRICS,
    SINGLE_EVAL_METRICS,
    SINGLE_METRICS,
    token_losses,
)
from kd_jax.parallel.rules import BATCH_AXES, axes_size


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadConfig:
    """What the head computes; static under jit."""

    loss: LossConfig
    chunk_tokens: int
    """Tokens of a device's rows in a chunk."""
    vocab_size: int
    """Vocabulary entries with a meaning: those above are padding in either model."""
    mesh: Mesh | None = None
    """Devices that share rows and vocabulary; None where there is one."""
    turn_head: bool = False
    """Whether the student's head is copied to [D, V] once: a CPU multiplies a bfloat16 one faster
    so from both sides."""
    head_trainable: bool = False
    """Whether the student's head gets a gradient."""
    top_k: int | None = None
    """Entries of each model whose overlap an evaluation measures; None measures none."""

    @property
    def vocab_axis(self) -> str | None:
        """The mesh axis that the vocabulary is split over."""
        return "tensor" if self.mesh is not None and self.mesh.shape["tensor"] > 1 else None


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


def _run(config, scalars, *arrays):
    """Returns loss, metrics and the gradients in student_hidden and, if trained, student_head."""
    d_head = P(_axes_of_gradient(config, *arrays[2:4])) if config.head_trainable else None
    out_specs = (P(), P(), (P(BATCH_AXES), d_head))
    return _on_devices(config, _run_rows, out_specs, scalars, *arrays)


def _axes_of_gradient(config, *heads):
    """Returns the axes that split the rows of the gradient of the student's head."""
    size = min(len(head) for head in heads if head is not None)
    axes = ("tensor", "fsdp")
    if config.mesh is not None and size % axes_size(config.mesh.shape, axes) == 0:
        return axes
    return config.vocab_axis


def _on_devices(config, run, out_specs, scalars, *arrays):
    """Returns `run` of each device's rows and share of the vocabulary, which both heads have."""
    student_hidden, teacher_hidden, student_head, teacher_head, *targets = arrays
    heads = [_cut(student_head, teacher_head).astype(student_hidden.dtype), None]
    if teacher_head is not None:
        heads[1] = _cut(teacher_head, student_head).astype(teacher_hidden.dtype)
    run = partial(run, config)
    if config.mesh is not None:
        rows, head = P(BATCH_AXES), P(config.vocab_axis)
        in_specs = (P(), rows, rows, head, head, rows, rows)
        run = jax.shard_map(
            run, mesh=config.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
        )
    return run(scalars, student_hidden, teacher_hidden, *heads, *targets)


def _run_rows(config, scalars, *arrays):
    """Returns what `_run` does, from one device's share."""
    C, axis = config.chunk_tokens, config.vocab_axis
    rows, heads, entries, order, num_chunks = _arrange(config, *arrays)
    h = rows[0]

    def run_chunk(index, carry):
        sums, d_hidden, d_head = carry
        h_s, z_s, z_t, y, m = _chunk(config, rows, heads, entries, index)
        values, d_logits = token_losses(config.loss, scalars, z_s, z_t, y, m, entries, axis)
        sums = {name: x + jnp.sum(jnp.where(m, values[name], 0.0)) for name, x in sums.items()}
        d_logits = d_logits.astype(h_s.dtype)
        back = "CV,DV->CD" if config.turn_head else "CV,VD->CD"
        product = jnp.einsum(back, d_logits, heads[0], preferred_element_type=jnp.float32)
        product = product.astype(d_hidden.dtype)
        d_hidden = jax.lax.dynamic_update_slice_in_dim(d_hidden, product, index * C, axis=0)
        if d_head is not None:
            d_head += jnp.einsum("CV,CD->VD", d_logits, h_s, preferred_element_type=jnp.float32)
        return sums, d_hidden, d_head

    names = ("loss", *(SINGLE_METRICS if heads[1] is None else METRICS))
    sums = dict.fromkeys(names, jnp.zeros((), jnp.float32))
    d_hidden = jnp.zeros(h.shape, h.dtype if axis is None else jnp.float32)  # a part of a sum
    d_head = None
    if config.head_trainable:
        d_head = jnp.zeros((len(entries), h.shape[-1]), jnp.float32)
    sums, d_hidden, d_head = jax.lax.fori_loop(0, num_chunks, run_chunk, (sums, d_hidden, d_head))
    if config.mesh is not None:
        sums, d_hidden, d_head = _add_up(config, sums, d_hidden, d_head)
    return sums.pop("loss"), sums, (_put_back(d_hidden.astype(h.dtype), order, arrays[-1]), d_head)


def _add_up(config, sums, d_hidden, d_head):
    """Returns the sums over devices: over the vocabulary's for hidden states, over rows' else."""
    if config.vocab_axis is not None:
        d_hidden = jax.lax.psum(d_hidden, config.vocab_axis)
    if d_head is not None:
        d_head = jax.lax.psum(d_head, "data")
        if len(d_head) % config.mesh.shape["fsdp"] == 0:
            d_head = jax.lax.psum_scatter(d_head, "fsdp", tiled=True)
        else:
            d_head = jax.lax.psum(d_head, "fsdp")
    return jax.lax.psum(sums, BATCH_AXES), d_hidden, d_head


def token_metrics(
    config, scalars, student_hidden, teacher_hidden, student_head, teacher_head, labels, mask
):
    """Returns what an evaluation says of each token, [B, S] float32 by name; 0 where masked.

    Distributions are those of temperature 1, but for loss and kd_loss, which are training's.

    Args:
      as kd_head's.
    """
    arrays = (student_hidden, teacher_hidden, student_head, teacher_head, labels, mask)
    return _on_devices(config, _metrics_of_rows, P(BATCH_AXES), scalars, *arrays)


def _metrics_of_rows(config, scalars, *arrays):
    """Returns what `token_metrics` does, from one device's share."""
    C, axis = config.chunk_tokens, config.vocab_axis
    rows, heads, entries, order, num_chunks = _arrange(config, *arrays)

    def run_chunk(index, metrics):
        _, z_s, z_t, y, m = _chunk(config, rows, heads, entries, index)
        # XLA drops the gradient, which is not used.
        values, _ = token_losses(config.loss, scalars, z_s, z_t, y, m, entries, axis)
        if "topk_overlap" in metrics:
            places = (_top_k(z, config.top_k, entries, axis) for z in (z_s, z_t))
            values["topk_overlap"] = divergences.overlap(*places)
        return {
            name: jax.lax.dynamic_update_slice_in_dim(
                x, jnp.where(m, values[name], 0.0), index * C, axis=0
            )
            for name, x in metrics.items()
        }

    names = SINGLE_EVAL_METRICS if heads[1] is None else EVAL_METRICS
    if config.top_k is not None and heads[1] is not None:
        names += ("topk_overlap",)
    zeros = jnp.zeros(rows[-1].shape, jnp.float32)
    metrics = jax.lax.fori_loop(0, num_chunks, run_chunk, dict.fromkeys(names, zeros))
    return {name: _put_back(value, order, arrays[-1]) for name, value in metrics.items()}


def _arrange(config, student_hidden, teacher_hidden, student_head, teacher_head, labels, mask):
    """Returns rows [B, S, ...] as [chunks * C, ...], the tokens with a loss first.

    Returns:
      the rows; both heads; the vocabulary entries that they have, [V] int32; the order of the
      tokens; and how many chunks have a loss.
    """
    rows = (student_hidden, teacher_hidden, labels, mask)
    rows = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), rows)
    order = jnp.argsort(~rows[-1], stable=True)  # [B * S]
    padded = -len(order) % config.chunk_tokens

    def gather(x):
        return jnp.pad(jnp.take(x, order, axis=0), [(0, padded)] + [(0, 0)] * (x.ndim - 1))

    num_chunks = -(-jnp.sum(mask) // config.chunk_tokens)
    entries = jnp.arange(len(student_head))
    if config.vocab_axis is not None:
        entries += len(student_head) * jax.lax.axis_index(config.vocab_axis)
    # Counted anew for every logit, they cost a CPU as much as its softmax.
    entries = jax.lax.optimization_barrier(entries)
    if config.turn_head:
        student_head = student_head.T
    return jax.tree.map(gather, rows), (student_head, teacher_head), entries, order, num_chunks


def _put_back(x, order, like):
    """Returns arranged rows [chunks * C, ...] as [B, S, ...], as the mask `like` is laid out."""
    return jnp.take(x, jnp.argsort(order), axis=0).reshape(*like.shape, *x.shape[1:])


def _chunk(config, rows, heads, entries, index):
    """Returns student hidden states, both logits, labels and mask of a chunk's C tokens."""
    C = config.chunk_tokens
    h_s, h_t, labels, mask = jax.tree.map(
        lambda x: jax.lax.dynamic_slice_in_dim(x, index * C, C, axis=0), rows
    )
    parts = 1 if config.vocab_axis is None else config.mesh.shape[config.vocab_axis]
    real = None if len(entries) * parts == config.vocab_size else entries < config.vocab_size
    z_s = _logits("CD,DV->CV" if config.turn_head else "CD,VD->CV", h_s, heads[0], real)
    z_t = None if h_t is None else _logits("CD,VD->CV", h_t, heads[1], real)
    return h_s, z_s, z_t, labels, mask


def _cut(head, other):
    """Returns the head without the padding rows that the other model's lacks."""
    return head if other is None else head[: min(len(head), len(other))]


def _logits(product, hidden, head, real):
    """Returns [C, V] float32; entries that are padding hold losses.NEGATIVE."""
    z = jnp.einsum(product, hidden, head, preferred_element_type=jnp.float32)
    return z if real is None else jnp.where(real[None], z, divergences.NEGATIVE)


def _top_k(z, k, entries, axis):
    """Returns which entries have the k largest logits of each token, [C, k] int32."""
    values, places = jax.lax.top_k(z, k)
    if axis is None:
        return places
    values, found = (
        jax.lax.all_gather(x, axis, axis=1, tiled=True) for x in (values, entries[places])
    )
    return jnp.take_along_axis(found, jax.lax.top_k(values, k)[1], axis=1)
