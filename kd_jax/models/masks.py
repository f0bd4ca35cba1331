"""Attention masks: a query attends to its documents, in a window, and to nothing after it."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

NEGATIVE = -1e30
"""Logit of a masked key; finite, so that no difference of two is NaN."""


class Window(NamedTuple):
    """Sliding window: a token attends to positions less than `size` before its own."""

    positions: jax.Array
    """[B, S] int32, of the tokens in their documents."""
    size: jax.Array
    """Scalar int32, so that layers of one scan can differ in it."""


class Mask(NamedTuple):
    """The keys that a query attends to, besides that they do not come after it."""

    documents: tuple[jax.Array, ...]
    """[B, S] int32 each: the query's own document is the first; a key's must be one of them."""
    window: Window | None = None


def of_queries(context: str | None, num_queries: int, mask: Mask) -> Mask:
    """Returns the mask of a device's queries, part of the rows where tokens are sharded."""
    if context is None:
        return mask
    start = jax.lax.axis_index(context) * num_queries

    def take(x: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice_in_dim(x, start, num_queries, axis=1)

    window = mask.window
    if window is not None:
        window = Window(take(window.positions), window.size)
    return Mask(tuple(map(take, mask.documents)), window)


def visible(own: Mask, mask: Mask, queries: slice, keys: slice) -> jax.Array:
    """Returns [B, S, T] bool: True where a query may attend to a key, causality aside.

    Args:
      own: the mask of the queries.
    """
    document, *_ = mask.documents
    each = [x[:, queries, None] == document[:, None, keys] for x in own.documents]
    seen = jnp.any(jnp.stack(each), axis=0) if len(each) > 1 else each[0]
    if own.window is not None and mask.window is not None:
        places, others = own.window.positions, mask.window.positions
        seen &= places[:, queries, None] - others[:, None, keys] < mask.window.size
    return seen


def causal(context: str | None, num_queries: int, queries: slice, num_keys: int) -> jax.Array:
    """Returns [1, S, T] bool: True where a key does not come after a query of this device."""
    place = jnp.arange(num_keys)
    own = place[None, queries, None]
    if context is not None:
        own += jax.lax.axis_index(context) * num_queries
    return own >= place[None, None]
