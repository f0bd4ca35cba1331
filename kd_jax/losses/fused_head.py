"""The fused head: from hidden states to the loss, metrics and the student's gradient.

No array of tokens x vocabulary is larger than one chunk. A loop over chunks of tokens computes both
models' logits, the loss and its closed-form gradient, multiplies that by the student's head, and
keeps only the gradient of the hidden states as the residual. The backward pass scales it. Tokens
with a loss are moved to the front, and chunks without any are skipped.

The formula of each divergence and of its gradient is in divergences.py, the gradient in the logits
of a token in token_loss.py.

On a mesh, each device runs the loop on its own rows and its share of the vocabulary. The only
collectives inside the loop are the reductions over the vocabulary; loss, metrics and gradients are
summed over devices after it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from kd_jax.config import LossConfig
from kd_jax.losses.head_inputs import NUM_GROUPS, ChunkContext, Student, Targets, Teacher
from kd_jax.losses.token_loss import (
    EVAL_METRICS,
    METRICS,
    SINGLE_EVAL_METRICS,
    SINGLE_METRICS,
    LossScalars,
    token_losses,
)
from kd_jax.losses.vocabulary import NEGATIVE, Vocab, overlap, top_k
from kd_jax.parallel.rules import BATCH_AXES, axes_size

Metrics = dict[str, jax.Array]


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadConfig:
    """Settings of the fused head; static under jit."""

    loss: LossConfig
    chunk_tokens: int
    """Tokens in a chunk, per device."""
    vocab_size: int
    """Vocabulary entries in use; higher ones are padding in either model."""
    mesh: Mesh
    """Shards rows and vocabulary."""
    transpose_head: bool = False
    """Transpose the student's head once to [D, V]: bfloat16 matmuls on CPU are faster with it."""
    head_trainable: bool = False
    """Compute the gradient of the student's head."""
    listed_only: bool = False
    """Take the divergence over the teacher's entries above NEGATIVE alone, with both models'
    probabilities divided by their sums over these."""
    top_k: int | None = None
    """Entries of each model whose overlap evaluation measures; None: not measured."""

    @property
    def vocab_axis(self) -> str | None:
        """The mesh axis that shards the vocabulary."""
        return "tensor" if self.mesh.shape["tensor"] > 1 else None


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def kd_head(
    config: HeadConfig,
    scalars: LossScalars | None,
    student: Student,
    teacher: Teacher | None,
    targets: Targets,
) -> tuple[jax.Array, Metrics]:
    """Returns the loss and the metrics, summed over unmasked tokens.

    Args:
      scalars: None without a teacher.
      student: hidden [B, S, D] and head [V, D], V at least config.vocab_size.
      teacher: at least config.vocab_size entries; gets no gradient. None: the loss is
        cross-entropy.
      targets: labels [B, S] int32, mask [B, S] bool, and perhaps groups.

    Returns:
      (loss, metrics): the float32 sum over tokens of (1 - kd_ratio) * CE + kd_ratio * divergence,
      differentiable in student.hidden and, with head_trainable, student.head; float32 sums by the
      names in METRICS, or SINGLE_METRICS without a teacher, [NUM_GROUPS] where targets have groups.
    """
    loss, metrics, _ = _run(config, scalars, student, teacher, targets)
    return loss, metrics


def _forward(config, scalars, student, teacher, targets):
    loss, metrics, gradient = _run(config, scalars, student, teacher, targets)
    if gradient.head is not None:  # vocabulary padding that was cut gets a gradient of 0
        padding = len(student.head) - len(gradient.head)
        gradient = gradient._replace(head=jnp.pad(gradient.head, ((0, padding), (0, 0))))
    return (loss, metrics), gradient


def _backward(config, gradient, cotangents):
    scale, _ = cotangents  # the metrics are not differentiable
    d_hidden, d_head = gradient
    d_hidden = (d_hidden.astype(jnp.float32) * scale).astype(d_hidden.dtype)
    return None, Student(d_hidden, None if d_head is None else d_head * scale), None, None


kd_head.defvjp(_forward, _backward)


def token_metrics(
    config: HeadConfig,
    scalars: LossScalars | None,
    student: Student,
    teacher: Teacher | None,
    targets: Targets,
) -> Metrics:
    """Returns each token's metrics, [B, S] float32, 0 where masked.

    They are at temperature 1, except loss and kd_loss, which are those of training.

    Args:
      as kd_head.

    Returns:
      values by the names in EVAL_METRICS, or SINGLE_EVAL_METRICS without a teacher, and with
      config.top_k and a teacher topk_overlap.
    """
    return _shard_mapped(config, _device_metrics, P(BATCH_AXES), scalars, student, teacher, targets)


def _run(config, scalars, student, teacher, targets):
    """Returns loss, metrics and the gradient, a Student; its head is None if that is frozen."""
    # The vocabulary of the head's gradient is also sharded over fsdp where that divides it.
    axes, num_entries = ("tensor", "fsdp"), _common_entries(student, teacher)
    scatters = num_entries % axes_size(config.mesh.shape, axes) == 0
    d_head = P(axes if scatters else config.vocab_axis) if config.head_trainable else None
    specs = P(), P(), Student(P(BATCH_AXES), d_head)
    run = partial(_device_gradients, scatters=scatters)
    return _shard_mapped(config, run, specs, scalars, student, teacher, targets)


def _common_entries(student, teacher):
    """Returns the number of vocabulary entries that both models have, padding included."""
    size = len(student.head)
    return size if teacher is None else min(size, teacher.num_entries)


class _Rows(NamedTuple):
    """Arrays of the tokens: [B, S, ...], or [chunks * C, ...] with the target tokens first."""

    hidden: jax.Array
    teacher: Any
    targets: Targets


@dataclass(frozen=True)
class _Share:
    """One device's tokens and vocabulary entries, ready for the loop."""

    rows: _Rows
    """[chunks * C, ...], the target tokens first."""
    head: jax.Array
    """[V, D], or [D, V] with transpose_head."""
    vocab_arrays: Any
    """The teacher's, [V, ...]."""
    teacher_logits: Callable[[Any, Any, ChunkContext], jax.Array] | None
    vocab: Vocab
    order: jax.Array
    """[B * S] int32: where each token was."""
    shape: tuple[int, int]
    """(B, S)."""
    num_chunks: jax.Array
    """Chunks with a loss."""


def _shard_mapped(config, run, out_specs, scalars, student, teacher, targets):
    """Returns run(config, scalars, share) of every device's share, put together by `out_specs`."""
    size = _common_entries(student, teacher)
    head = student.head[:size].astype(student.hidden.dtype)
    rows, vocab_arrays, teacher_logits = _Rows(student.hidden, None, targets), None, None
    if teacher is not None:
        rows, teacher_logits = rows._replace(teacher=teacher.rows), teacher.logits
        vocab_arrays = jax.tree.map(lambda x: x[:size], teacher.vocab_arrays)

    def run_device(scalars, rows, head, vocab_arrays):
        share = _targets_first(config, rows, head, vocab_arrays, teacher_logits)
        return run(config, scalars, share)

    by_entry = P(config.vocab_axis)
    run_devices = jax.shard_map(
        run_device,
        mesh=config.mesh,
        in_specs=(P(), P(BATCH_AXES), by_entry, by_entry),
        out_specs=out_specs,
        check_vma=False,
    )
    return run_devices(scalars, rows, head, vocab_arrays)


def _targets_first(config, rows, head, vocab_arrays, teacher_logits):
    """Returns the _Share of rows [B, S, ...] and of this device's vocabulary entries."""
    shape, num_targets = rows.targets.mask.shape, jnp.sum(rows.targets.mask)
    rows = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), rows)
    order = jnp.argsort(~rows.targets.mask, stable=True)
    padding = -len(order) % config.chunk_tokens

    def gather(x):
        return jnp.pad(jnp.take(x, order, axis=0), [(0, padding)] + [(0, 0)] * (x.ndim - 1))

    entries = jnp.arange(len(head))
    if config.vocab_axis is not None:
        entries += len(head) * jax.lax.axis_index(config.vocab_axis)
    # Without the barrier a CPU recomputes them for every logit, at the cost of the softmax.
    entries = jax.lax.optimization_barrier(entries)
    return _Share(
        rows=jax.tree.map(gather, rows),
        head=head.T if config.transpose_head else head,
        vocab_arrays=vocab_arrays,
        teacher_logits=teacher_logits,
        vocab=Vocab(entries, config.vocab_axis),
        order=order,
        shape=shape,
        num_chunks=-(-num_targets // config.chunk_tokens),
    )


def _restore(share, x):
    """Returns x [chunks * C, ...] in the order of the tokens, as [B, S, ...]."""
    return jnp.take(x, jnp.argsort(share.order), axis=0).reshape(*share.shape, *x.shape[1:])


def _chunk(config, share, index):
    """Returns a chunk's _Rows [C, ...] and both models' logits [C, V] float32."""
    rows = jax.tree.map(
        lambda x: jax.lax.dynamic_slice_in_dim(
            x, index * config.chunk_tokens, config.chunk_tokens, axis=0
        ),
        share.rows,
    )
    product = "CD,DV->CV" if config.transpose_head else "CD,VD->CV"
    z_s = jnp.einsum(product, rows.hidden, share.head, preferred_element_type=jnp.float32)
    z_s, z_t = _mask_padding(config, share.vocab, z_s), None
    if share.teacher_logits is not None:
        context = ChunkContext(z_s, rows.targets.labels, share.vocab, config.vocab_size)
        z_t = share.teacher_logits(rows.teacher, share.vocab_arrays, context)
        z_t = _mask_padding(config, share.vocab, z_t)
    return rows, z_s, z_t


def _mask_padding(config, vocab, logits):
    """Returns logits [C, V] with NEGATIVE at vocabulary padding."""
    num_shards = 1 if vocab.axis is None else config.mesh.shape[vocab.axis]
    if len(vocab.entries) * num_shards == config.vocab_size:
        return logits
    return jnp.where(vocab.entries < config.vocab_size, logits, NEGATIVE)


def _device_gradients(config, scalars, share, scatters):
    """Returns loss, metrics and the gradient, a Student, of one device's share.

    Args:
      scatters: shard the gradient of the head over fsdp.
    """
    hidden, axis = share.rows.hidden, share.vocab.axis

    def run_chunk(index, carry):
        sums, d_hidden, d_head = carry
        rows, z_s, z_t = _chunk(config, share, index)
        inputs = (z_s, z_t, rows.targets, share.vocab, config.listed_only)
        values, d_logits = token_losses(config.loss, scalars, *inputs)
        sums = {n: x + _sum_targets(values[n], rows.targets) for n, x in sums.items()}
        d_logits = d_logits.astype(hidden.dtype)  # that of the matmuls
        product = "CV,DV->CD" if config.transpose_head else "CV,VD->CD"
        d_rows = jnp.einsum(product, d_logits, share.head, preferred_element_type=jnp.float32)
        d_hidden = _write(d_hidden, d_rows.astype(d_hidden.dtype), index)
        if d_head is not None:
            d_head += jnp.einsum(
                "CV,CD->VD", d_logits, rows.hidden, preferred_element_type=jnp.float32
            )
        return sums, d_hidden, d_head

    names = ("loss", *(SINGLE_METRICS if share.teacher_logits is None else METRICS))
    shape = () if share.rows.targets.group is None else (NUM_GROUPS,)
    sums = dict.fromkeys(names, jnp.zeros(shape, jnp.float32))
    # Float32 where devices have parts of a sum.
    d_hidden = jnp.zeros(hidden.shape, hidden.dtype if axis is None else jnp.float32)
    d_head = None
    if config.head_trainable:
        d_head = jnp.zeros((len(share.vocab.entries), hidden.shape[-1]), jnp.float32)
    carry = jax.lax.fori_loop(0, share.num_chunks, run_chunk, (sums, d_hidden, d_head))
    sums, d_hidden, d_head = _psum(config, *carry, scatters)
    loss = jnp.sum(sums.pop("loss"))
    return loss, sums, Student(_restore(share, d_hidden.astype(hidden.dtype)), d_head)


def _sum_targets(values, targets):
    """Returns the sum of values [C] over unmasked tokens, or [NUM_GROUPS] sums of each group's."""
    if targets.group is None:
        return jnp.sum(values, where=targets.mask)
    there = targets.mask[:, None] & (targets.group[:, None] == jnp.arange(NUM_GROUPS)[None])
    return jnp.sum(jnp.where(there, values[:, None], 0.0), axis=0)


def _write(array, chunk, index):
    """Returns array [chunks * C, ...] with a chunk [C, ...] written into it."""
    return jax.lax.dynamic_update_slice_in_dim(array, chunk, index * len(chunk), axis=0)


def _psum(config, sums, d_hidden, d_head, scatters):
    """Returns sums over devices: d_hidden over the vocabulary's axis, the others over the rows'."""
    if config.vocab_axis is not None:
        d_hidden = jax.lax.psum(d_hidden, config.vocab_axis)
    if d_head is not None:
        d_head = jax.lax.psum(d_head, "data")
        if scatters:
            d_head = jax.lax.psum_scatter(d_head, "fsdp", tiled=True)
        else:
            d_head = jax.lax.psum(d_head, "fsdp")
    return jax.lax.psum(sums, BATCH_AXES), d_hidden, d_head


def _device_metrics(config, scalars, share):
    """Returns each token's metrics, [B, S] float32, of one device's share."""

    def run_chunk(index, metrics):
        rows, z_s, z_t = _chunk(config, share, index)
        # XLA drops the gradient, which is unused.
        inputs = (z_s, z_t, rows.targets, share.vocab, config.listed_only)
        values, _ = token_losses(config.loss, scalars, *inputs)
        if "topk_overlap" in metrics:
            values["topk_overlap"] = overlap(
                *(top_k(z, config.top_k, share.vocab) for z in (z_s, z_t))
            )
        mask = rows.targets.mask
        return {
            name: _write(x, jnp.where(mask, values[name], 0.0), index)
            for name, x in metrics.items()
        }

    names = SINGLE_EVAL_METRICS if share.teacher_logits is None else EVAL_METRICS
    if config.top_k is not None and share.teacher_logits is not None:
        names += ("topk_overlap",)
    zeros = jnp.zeros(share.rows.targets.mask.shape, jnp.float32)
    metrics = jax.lax.fori_loop(0, share.num_chunks, run_chunk, dict.fromkeys(names, zeros))
    return {name: _restore(share, value) for name, value in metrics.items()}
