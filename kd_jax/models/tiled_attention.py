"""Causal attention on a CPU, in loops over blocks of queries that skip other documents' keys."""

from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from kd_jax.models.bits import from_bits, to_bits
from kd_jax.models.blockwise_attention import heads_first, product
from kd_jax.models.masks import NEGATIVE, Mask, visible
from kd_jax.models.residuals import SAVED_ATTENTION, name_residual

BLOCK = 64
"""Tokens in a block of queries, and in a tile's keys."""


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def tiled_attention(
    scale: float, q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask
) -> jax.Array:
    """Returns attention [B, S, N, H] of q [B, S, N, H], k and v [B, S, K, H], in q's dtype.

    S is a multiple of BLOCK. A block of queries is multiplied by as few of the keys up to its end
    as there is a branch for; in the backward pass, tile by tile, by those of its documents.
    bfloat16 arrays that the loops read or write are integers there, which a CPU does not convert.
    """
    return _forward(scale, q, k, v, mask)[0]


def _forward(scale, q, k, v, mask):
    row, block, first = _blocks_of(mask)
    keys = to_bits(heads_first(k))
    # A column of ones, whose product is the sum of the weights.
    values = to_bits(heads_first(jnp.concatenate([v, jnp.ones_like(v[..., :1])], axis=-1)))
    widths = _widths(q.shape[1])
    choice = jnp.searchsorted(jnp.array(widths), (block + 1 - first) * BLOCK)

    def attend(width, queries, row, end):
        """Returns a block's output and logsumexps from the `width` keys before `end`."""
        start = jnp.maximum(end - width, 0)

        def part(x):
            size = (1, x.shape[1], width, x.shape[3])
            return from_bits(jax.lax.dynamic_slice(x, (row, 0, start, 0), size)[0], q.dtype)

        # With the barrier XLA's CPU fuses logits, softmax and product, and stores none of them.
        bias = jax.lax.optimization_barrier(_bias(mask, row, end - BLOCK, start, width))
        z = _logits(scale, queries, part(keys), bias)
        highest = jnp.max(z, axis=-1, keepdims=True)
        weights = jnp.exp(z - highest).astype(v.dtype)  # the matmul's dtype
        sums = product("KRT,KTH->KRH", weights, part(values))
        output = (sums[..., :-1] / sums[..., -1:]).astype(q.dtype)
        return to_bits(output), highest + jnp.log(sums[..., -1:])

    def step(_, inputs):
        queries, row, block, choice = inputs
        branches = [partial(attend, width) for width in widths]
        arguments = (from_bits(queries, q.dtype), row, (block + 1) * BLOCK)
        return None, jax.lax.switch(choice, branches, *arguments)

    inputs = (to_bits(_by_block(q, k)), row, block, choice)
    _, (output, logsumexp) = jax.lax.scan(step, None, inputs)
    output = name_residual(from_bits(_by_token(output, q), q.dtype), SAVED_ATTENTION, True)
    logsumexp = checkpoint_name(logsumexp, SAVED_ATTENTION)
    return output, (q, k, v, mask, output, logsumexp)


def _backward(scale, residuals, d_output):
    q, k, v, mask, output, logsumexp = residuals
    row, block, first = _blocks_of(mask)
    d_output32, output32 = d_output.astype(jnp.float32), output.astype(jnp.float32)  # summed
    inner = _by_block(jnp.sum(d_output32 * output32, axis=-1, keepdims=True), k)
    keys, values = (to_bits(_by_block(x, x)) for x in (k, v))

    def step(sums, inputs):
        queries, d_block, logsumexp, inner, row, block, first = inputs
        queries, d_block = (from_bits(x, q.dtype) for x in (queries, d_block))
        begin = row * (q.shape[1] // BLOCK)  # the row's first tile

        def add_tile(tile, sums):
            """Adds the gradients from the keys of one tile."""
            d_queries, d_keys, d_values = sums
            k_tile, v_tile = (from_bits(_at(x, begin + tile), q.dtype) for x in (keys, values))
            bias = _bias(mask, row, block * BLOCK, tile * BLOCK, BLOCK)
            weights = jnp.exp(_logits(scale, queries, k_tile, bias) - logsumexp)
            d_weights = product("KRH,KTH->KRT", d_block, v_tile)
            d_logits = (weights * (d_weights - inner)).astype(q.dtype)
            weights = weights.astype(v.dtype)
            d_queries += product("KRT,KTH->KRH", d_logits, k_tile)
            d_keys = _add(d_keys, begin + tile, product("KRT,KRH->KTH", d_logits, queries))
            d_values = _add(d_values, begin + tile, product("KRT,KRH->KTH", weights, d_block))
            return d_queries, d_keys, d_values

        start = (jnp.zeros(queries.shape, jnp.float32), *sums)
        d_queries, *sums = jax.lax.fori_loop(first, block + 1, add_tile, start)
        return tuple(sums), d_queries

    blocks = (to_bits(_by_block(q, k)), to_bits(_by_block(d_output, k)), logsumexp, inner)
    zeros = tuple(jnp.zeros(x.shape, jnp.float32) for x in (keys, values))
    (d_keys, d_values), d_queries = jax.lax.scan(step, zeros, (*blocks, row, block, first))
    dq, dk = _by_token(d_queries, q) * scale, _by_token(d_keys, k) * scale
    return dq.astype(q.dtype), dk.astype(k.dtype), _by_token(d_values, v).astype(v.dtype), None


tiled_attention.defvjp(_forward, _backward)


def _widths(S: int) -> list[int]:
    """Returns the numbers of keys that a block is multiplied by, ascending: doubled up to all."""
    widths = [min(2 * BLOCK, S)]
    while widths[-1] < S:
        widths.append(min(2 * widths[-1], S))
    return widths


def _blocks_of(mask: Mask) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the row of each block of queries, its number in the row, and the first block of keys
    that it may attend to, [P] int32 each.

    Two blocks are apart if the ranges of their documents are. Padding, 0 or -1, is behind all
    documents.
    """
    last = jnp.iinfo(jnp.int32).max
    ids = [jnp.where(x <= 0, last, x).reshape(len(x), -1, BLOCK) for x in mask.documents]
    ranges = [(x.min(axis=-1), x.max(axis=-1)) for x in ids]
    lowest, highest = (x[:, None] for x in ranges[0])  # of the keys
    meet = [(low[..., None] <= highest) & (lowest <= high[..., None]) for low, high in ranges]
    B, num_blocks = ranges[0][0].shape
    place = jnp.arange(num_blocks)
    behind = (place[:, None] - place[None])[None]
    seen = (jnp.any(jnp.stack(meet), axis=0) & (behind >= 0)) | (behind == 0)
    if mask.window is not None:
        seen &= behind * BLOCK - (BLOCK - 1) < mask.window.size
    number = jnp.arange(B * num_blocks)
    return number // num_blocks, number % num_blocks, jnp.argmax(seen, axis=-1).reshape(-1)


def _bias(mask: Mask, row: jax.Array, own: jax.Array, start: jax.Array, width: int) -> jax.Array:
    """Returns [BLOCK, width] of the queries from token `own` on and the keys from `start` on: 0
    where a query attends to a key."""

    def part(start: jax.Array, size: int) -> Mask:
        def take(x: jax.Array) -> jax.Array:
            return x if x.ndim == 0 else jax.lax.dynamic_slice(x, (row, start), (1, size))

        return jax.tree.map(take, mask)

    seen = visible(part(own, BLOCK), part(start, width), slice(None), slice(None))[0]
    seen &= (own + jnp.arange(BLOCK))[:, None] >= (start + jnp.arange(width))[None]
    return jnp.where(seen, 0.0, NEGATIVE)


def _logits(scale: float, queries: jax.Array, keys: jax.Array, bias: jax.Array) -> jax.Array:
    """Returns logits [K, R, T] float32 of a block of queries [K, R, H] and keys [K, T, H]."""
    z = product("KRH,KTH->KRT", queries, keys)
    by_query = z.reshape(len(z), -1, *bias.shape) * scale + bias[None, None]
    return by_query.reshape(z.shape)


def _at(x: jax.Array, place: jax.Array) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(x, place, keepdims=False)


def _add(x: jax.Array, place: jax.Array, y: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(x, _at(x, place) + y, place, 0)


def _by_block(x: jax.Array, k: jax.Array) -> jax.Array:
    """Returns [B, S, N, H] as [P, K, R, H]: for each block and key head its queries, group by
    group."""
    B, S, _, H = x.shape
    x = x.reshape(B, S // BLOCK, BLOCK, k.shape[2], -1, H).transpose(0, 1, 3, 4, 2, 5)
    return x.reshape(B * (S // BLOCK), k.shape[2], -1, H)


def _by_token(x: jax.Array, like: jax.Array) -> jax.Array:
    """Returns [P, K, R, H] as an array of the shape of `like`, [B, S, N, H]."""
    B, S, _, H = like.shape
    x = x.reshape(B, S // BLOCK, x.shape[1], -1, BLOCK, H).transpose(0, 1, 4, 2, 3, 5)
    return x.reshape(like.shape)
