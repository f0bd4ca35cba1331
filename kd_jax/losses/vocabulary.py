"""Operations over the vocabulary, the last dimension, which may be sharded over a mesh axis."""

import math
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from kd_jax.parallel.platforms import by_platform

# The logit or log-probability of vocabulary padding; finite, so that 0 times it is 0.
NEGATIVE = -1e30

BLOCK = 256  # most entries in a block of a blocked sum

Tree = TypeVar("Tree")


class Vocab(NamedTuple):
    """A device's vocabulary entries."""

    entries: jax.Array
    """[V] int32, consecutive."""
    axis: str | None = None
    """Mesh axis that shards the vocabulary, inside a shard_map; None: not sharded."""


def sum_over_vocab(terms: Tree, axis: str | None = None) -> Tree:
    """Returns a pytree of float32 arrays [..., V] summed over V in one pass, [..., 1] each.

    An array that occurs twice is summed once: XLA would materialize it.

    Args:
      axis: as in Vocab.
    """
    leaves, structure = jax.tree.flatten(terms)
    distinct = {id(x): x for x in leaves}
    sums = by_platform("blocked_sums", _blocked_sums, _plain_sums)(list(distinct.values()))
    sums = sums if axis is None else jax.lax.psum(sums, axis)
    by_id = dict(zip(distinct, sums, strict=True))
    return jax.tree.unflatten(structure, [by_id[id(x)] for x in leaves])


def max_over_vocab(terms: Tree, axis: str | None = None) -> Tree:
    """Returns maxima over V, [..., 1] each, like sum_over_vocab."""
    maxima = _reduce(terms, -jnp.inf, jax.lax.max)
    return maxima if axis is None else jax.lax.pmax(maxima, axis)


def _plain_sums(terms):
    return _reduce(terms, 0.0, jax.lax.add)


def _blocked_sums(terms):
    """Sums blocks of entries, then the blocks: small terms are not lost beside a large sum."""
    size = jax.tree.leaves(terms)[0].shape[-1]
    block = math.gcd(size, BLOCK)
    blocks = jax.tree.map(lambda x: x.reshape(*x.shape[:-1], size // block, block), terms)
    return _plain_sums(jax.tree.map(lambda x: x[..., 0], _plain_sums(blocks)))


def _reduce(terms, start, combine):
    operands, structure = jax.tree.flatten(terms)
    starts = (jnp.float32(start),) * len(operands)

    def combine_all(some, others):
        return tuple(map(combine, some, others))

    dims = (operands[0].ndim - 1,)
    reduced = jax.lax.reduce(tuple(operands), starts, combine_all, dimensions=dims)
    return jax.tree.unflatten(structure, [x[..., None] for x in reduced])


def label_logits(logits: jax.Array, labels: jax.Array, vocab: Vocab) -> jax.Array:
    """Returns each token's logit at its label, [C, 1], of logits [C, V] and labels [C]."""
    if vocab.axis is None:
        return jnp.take_along_axis(logits, labels[:, None], axis=-1)
    place = labels[:, None] - vocab.entries[0]
    here = (place >= 0) & (place < logits.shape[1])
    found = jnp.take_along_axis(logits, jnp.clip(place, 0, logits.shape[1] - 1), axis=-1)
    return jax.lax.psum(jnp.where(here, found, 0.0), vocab.axis)


def _top_k_by_blocks(x: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """Returns jax.lax.top_k(x, k), sought only in the k blocks with the largest maxima.

    An entry outside them has k entries before it: one in each of these blocks.
    """
    C, V = x.shape
    size = math.gcd(V, BLOCK)
    if k * size >= V:
        return jax.lax.top_k(x, k)
    blocks = x.reshape(C, V // size, size)
    chosen = jnp.sort(jax.lax.top_k(jnp.max(blocks, axis=-1), k)[1])  # equal entries keep order
    found = jnp.take_along_axis(blocks, chosen[:, :, None], axis=1).reshape(C, k * size)
    values, places = jax.lax.top_k(found, k)
    block = jnp.take_along_axis(chosen, places // size, axis=1)
    return values, block * size + places % size


def top_k(logits: jax.Array, k: int, vocab: Vocab) -> jax.Array:
    """Returns the entries with each token's k largest logits, [C, k] int32, of [C, V]."""
    values, places = _top_k_by_blocks(logits, k)
    if vocab.axis is None:
        return places
    values, found = (
        jax.lax.all_gather(x, vocab.axis, axis=1, tiled=True)
        for x in (values, vocab.entries[places])
    )
    return jnp.take_along_axis(found, jax.lax.top_k(values, k)[1], axis=1)


def overlap(entries: jax.Array, others: jax.Array) -> jax.Array:
    """Returns the share of `entries`, [..., k] int32, that is among `others`, [..., k]."""
    same = entries[..., :, None] == others[..., None, :]
    return jnp.sum(same, axis=(-1, -2)).astype(jnp.float32) / entries.shape[-1]
