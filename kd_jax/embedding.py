"""The lookup of embeddings, whose gradient is the same to the last bit every time."""

from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from kd_jax.sharding import Layout, platform


def embed(table: jax.Array, tokens: jax.Array, layout: Layout | None) -> jax.Array:
    """Returns the rows [B, S, D] of a table [V, D] that tokens [B, S] name.

    The plain gradient adds up rows of one token in any order on a GPU, and never twice in the same.

    Args:
      layout: of the table on the mesh; None on one device that is no GPU.
    """
    if layout is None or platform(layout.mesh) != "gpu":
        return table[tokens]
    return _embed(layout, table, tokens)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _embed(layout, table, tokens):
    return table[tokens]


def _forward(layout, table, tokens):
    return table[tokens], (table, tokens)


def _backward(layout, residuals, d_rows):
    table, tokens = residuals
    axes = layout.row_axes(len(tokens))

    def add_up(d_rows, tokens):
        return jax.lax.psum(_sum_by_token(d_rows, tokens, len(table)), axes)

    if layout.mesh.size == 1:
        d_table = _sum_by_token(d_rows, tokens, len(table))
    else:
        rows = P(axes)
        d_table = jax.shard_map(
            add_up, mesh=layout.mesh, in_specs=(rows, rows), out_specs=P(), check_vma=False
        )(d_rows, tokens)
    return d_table.astype(table.dtype), None


_embed.defvjp(_forward, _backward)


def _sum_by_token(d_rows, tokens, num_entries):
    """Returns the sums [V, D] float32 of the rows [B, S, D] of each token [B, S].

    Rows are brought into the order of their tokens and summed by a scan that starts anew with each;
    then every token is written once.
    """
    tokens = tokens.reshape(-1)
    order = jnp.argsort(tokens, stable=True)
    tokens = tokens[order]
    rows = d_rows.reshape(-1, d_rows.shape[-1])[order].astype(jnp.float32)  # they are summed
    differs = tokens[1:] != tokens[:-1]
    first = jnp.pad(differs, (1, 0), constant_values=True)
    last = jnp.pad(differs, (0, 1), constant_values=True)

    def add(one, other):
        (total, some_first), (value, is_first) = one, other
        return jnp.where(is_first, value, total + value), some_first | is_first

    sums, _ = jax.lax.associative_scan(add, (rows, first[:, None]))
    place = jnp.where(last, tokens, num_entries + jnp.arange(len(tokens)))  # beyond: dropped
    zeros = jnp.zeros((num_entries, rows.shape[1]), jnp.float32)
    return zeros.at[place].set(sums, mode="drop", unique_indices=True)
