"""Embedding lookup with a deterministic gradient on every platform."""

from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from kd_jax.models.bits import from_bits, to_bits
from kd_jax.parallel.mesh import Layout, traits
from kd_jax.parallel.rules import split


def embed(table: jax.Array, tokens: jax.Array, layout: Layout) -> jax.Array:
    """Returns the rows [B, S, D] of a table [V, D] for tokens [B, S] int32."""
    if traits(layout.mesh).integer_lookup and table.dtype == jnp.bfloat16:  # never trained
        return from_bits(to_bits(table)[tokens], table.dtype)
    if not traits(layout.mesh).sorted_embedding_gradient:
        return table[tokens]
    return _embed(layout, table, tokens)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _embed(layout, table, tokens):
    return table[tokens]


def _forward(layout, table, tokens):
    return table[tokens], (table, tokens)


def _backward(layout, residuals, d_rows):
    table, tokens = residuals
    parts = split(layout.mesh.shape, layout.axes, ("vocab", "embed"), table.shape)
    rows, context = layout.activations(tokens.shape)
    add_up = jax.shard_map(
        partial(_add_up, len(table), parts[0], rows if context is None else (*rows, context)),
        mesh=layout.mesh,
        in_specs=(P(rows, context), P(rows, context)),
        out_specs=P(*parts),
        check_vma=False,
    )
    return add_up(d_rows, tokens).astype(table.dtype), None


_embed.defvjp(_forward, _backward)


def _add_up(num_entries, table_axes, token_axes, d_rows, tokens):
    """Returns a device's shard of the table's gradient, from its own tokens.

    Args:
      table_axes: mesh axes that shard the table's entries.
      token_axes: mesh axes that shard rows and tokens; devices along others hold the same.
    """
    own = tuple(axis for axis in table_axes if axis not in token_axes)
    share = num_entries // jax.lax.axis_size(own)
    sums = _sum_by_token(d_rows, tokens - share * jax.lax.axis_index(own), share)
    sums = jax.lax.psum(sums, tuple(axis for axis in token_axes if axis not in table_axes))
    for axis in table_axes[len(own) :]:
        sums = jax.lax.psum_scatter(sums, axis, tiled=True)
    return sums


def _sum_by_token(d_rows, tokens, num_entries):
    """Returns the sum [V, D] float32 of the rows [B, S, D] of each token [B, S] from 0 to V - 1.

    Rows are sorted by token and summed by a segmented scan; each token's sum is written once.
    """
    tokens = tokens.reshape(-1)
    order = jnp.argsort(tokens, stable=True)
    tokens = tokens[order]
    rows = d_rows.reshape(-1, d_rows.shape[-1])[order].astype(jnp.float32)  # summed
    differs = tokens[1:] != tokens[:-1]
    first = jnp.pad(differs, (1, 0), constant_values=True)
    last = jnp.pad(differs, (0, 1), constant_values=True)

    def add(one, other):
        (total, some_first), (value, is_first) = one, other
        return jnp.where(is_first, value, total + value), some_first | is_first

    sums, _ = jax.lax.associative_scan(add, (rows, first[:, None]))
    written = last & (tokens >= 0) & (tokens < num_entries)
    dropped = num_entries + jnp.arange(len(tokens))  # out of range, and unique
    place = jnp.where(written, tokens, dropped)
    zeros = jnp.zeros((num_entries, rows.shape[1]), jnp.float32)
    return zeros.at[place].set(sums, mode="drop", unique_indices=True)
