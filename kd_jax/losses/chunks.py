"""The chunks of the fused head: each device's tokens and vocabulary entries, and their logits.

Chunks take the tokens with a loss first, so that those without any are at the end. The loop gathers
a chunk's rows, but on a TPU, and writes the gradient of its rows to their places: no hidden states
of all tokens are copied.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from kd_jax.losses.head_inputs import ChunkContext, HeadConfig, Student, Targets, Teacher
from kd_jax.losses.vocabulary import NEGATIVE, Vocab
from kd_jax.models.bits import from_bits, to_bits
from kd_jax.parallel.mesh import traits
from kd_jax.parallel.rules import BATCH_AXES, context_axis, token_axes


def common_entries(student: Student, teacher: Teacher | None) -> int:
    """Returns the number of vocabulary entries that both models have, padding included."""
    size = len(student.head)
    return size if teacher is None else min(size, teacher.num_entries)


class Rows(NamedTuple):
    """Arrays of the tokens: [B, S, ...], [B * S, ...], or those of a chunk, [C, ...]."""

    hidden: jax.Array
    teacher: Any
    targets: Targets


@dataclass(frozen=True)
class Share:
    """One device's tokens and vocabulary entries, ready for the loop."""

    rows: Rows
    """[B * S, ...]."""
    sources: Rows
    """Source of the chunks: the rows in row_form; with gathers_all [chunks * C, ...], in the order
    of places."""
    head: jax.Array
    """[V, D], or [D, V] with transpose_head."""
    vocab_arrays: Any
    """The teacher's, [V, ...]."""
    teacher_logits: Callable[[Any, Any, ChunkContext], jax.Array] | None
    vocab: Vocab
    places: jax.Array
    """[chunks * C] int32: the rows that the chunks take, those of target tokens first; past the
    last token B * S and above."""
    shape: tuple[int, int]
    """(B, S)."""
    num_chunks: jax.Array
    """Chunks with a loss."""
    token_axes: tuple[str, ...]
    """Mesh axes that shard the tokens."""


def token_spec(config: HeadConfig, targets: Targets) -> P:
    """Returns the spec of arrays [B, S, ...]: rows are sharded, and tokens over context."""
    return P(BATCH_AXES, context_axis(config.mesh.shape, targets.mask.shape[1]))


def shard_mapped(
    config: HeadConfig,
    run: Callable[[HeadConfig, Any, Share], Any],
    out_specs: Any,
    scalars: Any,
    student: Student,
    teacher: Teacher | None,
    targets: Targets,
) -> Any:
    """Returns run(config, scalars, share) of every device's share, put together by `out_specs`."""
    size = common_entries(student, teacher)
    head = student.head[:size].astype(student.hidden.dtype)
    rows, vocab_arrays, teacher_logits = Rows(student.hidden, None, targets), None, None
    if teacher is not None:
        rows, teacher_logits = rows._replace(teacher=teacher.rows), teacher.logits
        vocab_arrays = jax.tree.map(lambda x: x[:size], teacher.vocab_arrays)

    axes = token_axes(config.mesh.shape, targets.mask.shape[1])

    def run_device(scalars, rows, head, vocab_arrays):
        share = _targets_first(config, axes, rows, head, vocab_arrays, teacher_logits)
        return run(config, scalars, share)

    by_entry = P(config.vocab_axis)
    run_devices = jax.shard_map(
        run_device,
        mesh=config.mesh,
        in_specs=(P(), token_spec(config, targets), by_entry, by_entry),
        out_specs=out_specs,
        check_vma=False,
    )
    return run_devices(scalars, rows, head, vocab_arrays)


def _targets_first(config, axes, rows, head, vocab_arrays, teacher_logits):
    """Returns the Share of rows [B, S, ...] and of this device's vocabulary entries."""
    shape, num_targets = rows.targets.mask.shape, jnp.sum(rows.targets.mask)
    rows = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), rows)
    order = jnp.argsort(~rows.targets.mask, stable=True).astype(jnp.int32)
    padding = -len(order) % config.chunk_tokens
    places = jnp.concatenate([order, len(order) + jnp.arange(padding, dtype=jnp.int32)])

    def source(x):
        return _take(x, places) if traits(config.mesh).gathers_all else row_form(config, x)

    entries = jnp.arange(len(head))
    if config.vocab_axis is not None:
        entries += len(head) * jax.lax.axis_index(config.vocab_axis)
    # Without the barrier a CPU recomputes them for every logit, at the cost of the softmax.
    entries = jax.lax.optimization_barrier(entries)
    return Share(
        rows=rows,
        sources=jax.tree.map(source, rows),
        head=head.T if config.transpose_head else head,
        vocab_arrays=vocab_arrays,
        teacher_logits=teacher_logits,
        vocab=Vocab(entries, config.vocab_axis),
        places=places,
        shape=shape,
        num_chunks=-(-num_targets // config.chunk_tokens),
        token_axes=axes,
    )


def read_chunk(
    config: HeadConfig, share: Share, index: jax.Array
) -> tuple[Rows, jax.Array, jax.Array | None]:
    """Returns a chunk's Rows [C, ...], 0 past the last, and both models' logits [C, V] float32."""
    size = config.chunk_tokens
    places = _places(share, index, size)

    def read(x, source):
        if traits(config.mesh).gathers_all:
            return jax.lax.dynamic_slice_in_dim(source, index * size, size)
        return from_bits(_take(source, places), x.dtype)

    rows = jax.tree.map(read, share.rows, share.sources)
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


def write_chunk(array: jax.Array, chunk: jax.Array, index: jax.Array) -> jax.Array:
    """Returns array [chunks * C, ...] with a chunk [C, ...] written into it."""
    return jax.lax.dynamic_update_slice_in_dim(array, chunk, index * len(chunk), axis=0)


def restore(share: Share, x: jax.Array) -> jax.Array:
    """Returns x [chunks * C, ...] in the order of the tokens, as [B, S, ...]."""
    B, S = share.shape
    return jnp.take(x, jnp.argsort(share.places)[: B * S], axis=0).reshape(B, S, *x.shape[1:])


def scatter_chunk(
    config: HeadConfig, share: Share, array: jax.Array, chunk: jax.Array, index: jax.Array
) -> jax.Array:
    """Returns array [B * S, ...], in row_form, with a chunk [C, ...] written to its places."""
    chunk, places = row_form(config, chunk), _places(share, index, config.chunk_tokens)
    return array.at[places].set(chunk, mode="drop", unique_indices=True)


def _take(x: jax.Array, places: jax.Array) -> jax.Array:
    """Returns rows of x [B * S, ...], 0 past the last."""
    return x.at[places].get(mode="fill", fill_value=0)


def _places(share: Share, index: jax.Array, size: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(share.places, index * size, size)


def row_form(config: HeadConfig, x: jax.Array) -> jax.Array:
    """Returns an array in the form in which its rows are read and written fast."""
    return to_bits(x) if traits(config.mesh).integer_lookup else x
