"""Causal attention by blocks of queries, each with all keys up to its end."""

from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from kd_jax.models.masks import NEGATIVE, Mask, causal, of_queries, visible
from kd_jax.models.residuals import SAVED_ATTENTION, name_residual


def blockwise(
    scale: float,
    context: str | None,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: Mask,
    as_bits: bool = False,
) -> jax.Array:
    """Returns attention [B, S, N, H] of q [B, S, N, H], k and v [B, T, K, H], in q's dtype.

    No array of queries x keys outlives its block: the backward pass recomputes the weights from
    each query's logsumexp, as FlashAttention does (arXiv 2205.14135).

    Args:
      context: mesh axis over which the rows' queries are sharded; None: none, and T is S.
      as_bits: save the bfloat16 output as integers, which a CPU does not convert.
    """
    return _blockwise(as_bits, scale, context, q, k, v, mask)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _blockwise(as_bits, scale, context, q, k, v, mask):
    return _forward(as_bits, scale, context, q, k, v, mask)[0]


def _forward(as_bits, scale, context, q, k, v, mask):
    queries, keys, values = _grouped(q, k), heads_first(k), heads_first(v)
    # A column of ones, whose product is the sum of the weights.
    values = jnp.concatenate([values, jnp.ones_like(values[..., :1])], axis=-1)
    outputs, logsumexps = [], []
    for block, stop in _blocks(q.shape[1], k.shape[1]):
        z = _block_logits(scale, context, queries, keys, mask, block, stop)
        highest = jnp.max(z, axis=-1, keepdims=True)
        weights = jnp.exp(z - highest).astype(v.dtype)  # the matmul's dtype
        sums = product("BKRT,BKTH->BKRH", _rows(weights), values[:, :, :stop])
        sums = sums.reshape(*weights.shape[:4], -1)
        outputs.append((sums[..., :-1] / sums[..., -1:]).astype(q.dtype))
        logsumexps.append(highest + jnp.log(sums[..., -1:]))
    output = _ungrouped(jnp.concatenate(outputs, axis=3))
    output = name_residual(output, SAVED_ATTENTION, as_bits)
    logsumexp = checkpoint_name(jnp.concatenate(logsumexps, axis=3), SAVED_ATTENTION)
    return output, (q, k, v, mask, output, logsumexp)


def _backward(as_bits, scale, context, residuals, d_output):
    q, k, v, mask, output, logsumexp = residuals
    queries, keys, values = _grouped(q, k), heads_first(k), heads_first(v)
    d_output32, output32 = d_output.astype(jnp.float32), output.astype(jnp.float32)  # summed
    inner = _grouped(jnp.sum(d_output32 * output32, axis=-1, keepdims=True), k)
    d_outputs = _grouped(d_output, k)
    d_queries = []
    d_keys, d_values = jnp.zeros(keys.shape, jnp.float32), jnp.zeros(values.shape, jnp.float32)
    for block, stop in _blocks(q.shape[1], k.shape[1]):
        seen = slice(0, stop)
        d_block, q_block = d_outputs[:, :, :, block], queries[:, :, :, block]
        z = _block_logits(scale, context, queries, keys, mask, block, stop)
        weights = jnp.exp(z - logsumexp[:, :, :, block])
        d_weights = product("BKGSH,BKTH->BKGST", d_block, values[:, :, seen])
        d_logits = (weights * (d_weights - inner[:, :, :, block])).astype(q.dtype)
        weights = weights.astype(v.dtype)
        d_queries.append(product("BKGST,BKTH->BKGSH", d_logits, keys[:, :, seen]))
        d_keys = _add_to_first(d_keys, _sum_over_queries(d_logits, q_block))
        d_values = _add_to_first(d_values, _sum_over_queries(weights, d_block))
    # Without the barrier a CPU chooses the block anew for each entry that RoPE's gradient reads.
    d_query, d_keys = jax.lax.optimization_barrier((jnp.concatenate(d_queries, axis=3), d_keys))
    dq = _ungrouped(d_query) * scale
    dk, dv = heads_first(d_keys) * scale, heads_first(d_values)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None


_blockwise.defvjp(_forward, _backward)


def _add_to_first(x, part):
    """Returns x [B, K, S, H] with `part` [B, K, T, H] added to its first T tokens.

    x.at[] makes empty index arrays for all tokens, and XLA of jax 0.11 crashes on those inside a
    shard_map.
    """
    return jax.lax.dynamic_update_slice_in_dim(x, x[:, :, : part.shape[2]] + part, 0, axis=2)


def _sum_over_queries(weights: jax.Array, x: jax.Array) -> jax.Array:
    """Returns the product [B, K, T, H] of weights [B, K, G, S, T] and x [B, K, G, S, H].

    As a sum over one dimension, a CPU transposes within the kernel; it has none for bfloat16 that
    does, and is twice as fast if it has to transpose before.
    """
    if weights.dtype == jnp.bfloat16:
        return product("BKGST,BKGSH->BKTH", weights, x)
    return product("BKRT,BKRH->BKTH", _rows(weights), _rows(x))


def _blocks(num_queries: int, num_keys: int) -> list[tuple[slice, int]]:
    """Returns blocks of at least 64 queries, at most eight, and how many keys each may attend to.

    Where tokens are sharded, these are the keys of the block in the last part of a row.
    """
    size = max(64, -(-num_queries // 8))
    blocks = [slice(s, min(s + size, num_queries)) for s in range(0, num_queries, size)]
    return [(block, num_keys - num_queries + block.stop) for block in blocks]


def _block_logits(scale, context, queries, keys, mask, block, stop):
    """Returns logits of a block's queries and the first `stop` keys, [B, K, G, S, T] float32.

    The mask is added, so that XLA's CPU fuses the logits, their softmax and its product with the
    values, and stores none of them. With a select, or without the barrier, it does not.
    """
    num_queries = queries.shape[3]
    queries = queries[:, :, :, block]
    z = product("BKRH,BKTH->BKRT", _rows(queries), keys[:, :, :stop])
    seen = visible(of_queries(context, num_queries, mask), mask, block, slice(0, stop))
    seen &= causal(context, num_queries, block, stop)
    bias = jax.lax.optimization_barrier(jnp.where(seen, 0.0, NEGATIVE))
    return z.reshape(*queries.shape[:4], -1) * scale + bias[:, None, None]


def product(subscripts: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """Returns an einsum in float32."""
    return jnp.einsum(subscripts, a, b, preferred_element_type=jnp.float32)


def _rows(x):
    """Returns [B, K, G, S, ...] as [B, K, G * S, ...]."""
    return x.reshape(*x.shape[:2], -1, x.shape[-1])


def heads_first(x):
    """Swaps tokens and heads of [B, S, K, H]."""
    return jnp.swapaxes(x, 1, 2)


def _grouped(x, k):
    """Returns [B, S, N, ...] as [B, K, G, S, ...]: G query heads for each key head."""
    B, S, _, H = x.shape
    return x.reshape(B, S, k.shape[2], -1, H).transpose(0, 2, 3, 1, 4)


def _ungrouped(x):
    """Returns [B, K, G, S, H] as [B, S, N, H]."""
    B, K, G, S, H = x.shape
    return x.transpose(0, 3, 1, 2, 4).reshape(B, S, K * G, H)
