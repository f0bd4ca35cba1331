"""Attention by documents on a GPU: kernels that skip the blocks of other documents.

FlashAttention's passes (arXiv 2205.14135, 2307.08691) in jax's Pallas, compiled by Triton. XLA
finds the span of key blocks that a block of queries may attend to, and of query blocks that may
attend to a block of keys; a kernel visits no others. Nothing is added atomically: a run repeats
itself.
"""

import math
from dataclasses import dataclass
from functools import partial, reduce

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from kd_jax.models.masks import NEGATIVE
from kd_jax.models.residuals import SAVED_ATTENTION
from kd_jax.parallel.experimental import experimental
from kd_jax.parallel.platforms import TRITON_BLOCK

pl = experimental("jax.experimental", "pallas")
plgpu = experimental("jax.experimental.pallas", "triton")

LOG2_E = math.log2(math.e)  # softmax and logsumexp are in base 2, which GPUs compute


@dataclass(frozen=True, slots=True)
class Blocks:
    """Sizes of a kernel's blocks, and its schedule."""

    queries: int
    keys: int
    warps: int
    stages: int
    """Blocks of the inner loop in flight."""


# The fastest of `python -m benchmarks.attention --sweep` on an H200, or near it, for head
# dimensions 64 and 128, short documents and whole rows. With a third stage the gradients of heads
# of 128 do not fit the shared memory of GPUs such as an RTX 4090.
FORWARD = Blocks(TRITON_BLOCK, TRITON_BLOCK, 4, 3)
QUERY_GRADIENT = Blocks(TRITON_BLOCK, TRITON_BLOCK, 4, 2)
KEY_GRADIENT = Blocks(TRITON_BLOCK, TRITON_BLOCK, 4, 2)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def triton_attention(
    scale: float,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    own: jax.Array,
    documents: jax.Array,
    start: jax.Array,
) -> jax.Array:
    """Returns softmax(scale q kᵀ) v [B, S, N, H] in q's dtype.

    Args:
      q: [B, S, N, H]; S is a multiple of TRITON_BLOCK, H one of TRITON_HEAD_DIMS.
      k: [B, T, K, H]; T is a multiple of TRITON_BLOCK, N of K.
      v: [B, T, K, H].
      own: [num_documents, B, S] int32, the documents that a query attends to.
      documents: [B, T] int32, the document of a key.
      start: [1] int32, the place of the first query among the keys.
    """
    return _forward(scale, q, k, v, own, documents, start)[0]


def _forward(scale, q, k, v, own, documents, start):
    B, S, N, _ = q.shape
    spans = _spans(_block_mask(FORWARD, own, documents, start))
    specs = _Specs(FORWARD, q, k, own)
    out, logsumexp = pl.pallas_call(
        partial(_forward_kernel, FORWARD, scale),
        grid=specs.grid_of_queries,
        in_specs=[*specs.of_queries, specs.queries, specs.all_keys, specs.all_keys],
        out_specs=[specs.queries, specs.statistic],
        out_shape=[
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((B, N, S), jnp.float32),
        ],
        compiler_params=_params(FORWARD),
        name="attention",
    )(*spans, start, own, documents, q, k, v)
    out = checkpoint_name(out, SAVED_ATTENTION)
    logsumexp = checkpoint_name(logsumexp, SAVED_ATTENTION)
    return out, (q, k, v, own, documents, start, out, logsumexp)


def _backward(scale, residuals, d_out):
    q, k, v, own, documents, start, out, logsumexp = residuals
    inner = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1).swapaxes(1, 2)
    blocks = QUERY_GRADIENT
    spans = _spans(_block_mask(blocks, own, documents, start))
    specs = _Specs(blocks, q, k, own)
    dq = pl.pallas_call(
        partial(_query_gradient_kernel, blocks, scale),
        grid=specs.grid_of_queries,
        in_specs=[
            *(*specs.of_queries, specs.queries, specs.all_keys, specs.all_keys),
            *(specs.queries, specs.statistic, specs.statistic),
        ],
        out_specs=specs.queries,
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        compiler_params=_params(blocks),
        name="attention_query_gradient",
    )(*spans, start, own, documents, q, k, v, d_out, logsumexp, inner)
    blocks = KEY_GRADIENT
    spans = _spans(_block_mask(blocks, own, documents, start).swapaxes(1, 2))
    specs = _Specs(blocks, q, k, own)
    dk, dv = pl.pallas_call(
        partial(_key_gradient_kernel, blocks, scale),
        grid=specs.grid_of_keys,
        in_specs=[
            *(*specs.of_keys, specs.all_queries, specs.keys, specs.keys),
            *(specs.all_queries, specs.all_statistics, specs.all_statistics),
        ],
        out_specs=[specs.keys, specs.keys],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (k, v)],
        compiler_params=_params(blocks),
        name="attention_key_gradient",
    )(*spans, start, own, documents, q, k, v, d_out, logsumexp, inner)
    return dq, dk, dv, None, None, None


triton_attention.defvjp(_forward, _backward)


def _forward_kernel(
    blocks, scale, first, stop, start, own, documents, q, k, v, out, logsumexp
) -> None:
    block = pl.program_id(0)
    places = (start[0] + _places(block, blocks.queries))[:, None]
    owns, queries = [x[:, None] for x in _rows(own)], q[...]

    def visit(j, carry):
        sums, highest, total = carry
        keys = pl.ds(j * blocks.keys, blocks.keys)
        z = _product(queries, k[keys].T) * (scale * LOG2_E)
        seen = _visible(places, owns, _places(j, blocks.keys)[None], documents[keys][None])
        z = jnp.where(seen, z, NEGATIVE)
        # Sums from before a query sees its first key are multiplied by 0 then.
        new = jnp.maximum(highest, jnp.max(z, axis=1))
        weights, rescale = jnp.exp2(z - new[:, None]), jnp.exp2(highest - new)
        sums = sums * rescale[:, None] + _product(weights.astype(v.dtype), v[keys])
        return sums, new, total * rescale + jnp.sum(weights, axis=1)

    zeros = jnp.zeros(blocks.queries, jnp.float32)
    carry = jnp.zeros(queries.shape, jnp.float32), zeros + NEGATIVE, zeros
    sums, highest, total = jax.lax.fori_loop(first[block], stop[block], visit, carry)
    out[...] = (sums / total[:, None]).astype(out.dtype)
    logsumexp[...] = highest + jnp.log2(total)


def _query_gradient_kernel(
    blocks, scale, first, stop, start, own, documents, q, k, v, d_out, logsumexp, inner, dq
) -> None:
    block = pl.program_id(0)
    places = (start[0] + _places(block, blocks.queries))[:, None]
    owns, queries, d_outs = [x[:, None] for x in _rows(own)], q[...], d_out[...]
    logsumexps, inners = logsumexp[...], inner[...]

    def visit(j, sums):
        keys = pl.ds(j * blocks.keys, blocks.keys)
        k_block = k[keys]
        z = _product(queries, k_block.T) * (scale * LOG2_E)
        seen = _visible(places, owns, _places(j, blocks.keys)[None], documents[keys][None])
        weights = jnp.exp2(jnp.where(seen, z, NEGATIVE) - logsumexps[:, None])
        d_logits = weights * (_product(d_outs, v[keys].T) - inners[:, None])
        return sums + _product(d_logits.astype(k.dtype), k_block)

    zeros = jnp.zeros(queries.shape, jnp.float32)
    sums = jax.lax.fori_loop(first[block], stop[block], visit, zeros)
    dq[...] = (sums * scale).astype(dq.dtype)


def _key_gradient_kernel(
    blocks, scale, first, stop, start, own, documents, q, k, v, d_out, logsumexp, inner, dk, dv
) -> None:
    block, groups = pl.program_id(0), q.shape[1]
    places, key_documents = _places(block, blocks.keys)[:, None], documents[...][:, None]
    keys, values = k[...], v[...]

    def visit(step, carry):
        d_keys, d_values = carry
        i, head = jax.lax.div(step, groups), jax.lax.rem(step, groups)
        rows = pl.ds(i * blocks.queries, blocks.queries)
        queries, d_outs = q[rows, head], d_out[rows, head]
        z = _product(keys, queries.T) * (scale * LOG2_E)
        query_places, owns = start[0] + _places(i, blocks.queries), _rows(own, rows)
        seen = _visible(query_places[None], [x[None] for x in owns], places, key_documents)
        weights = jnp.exp2(jnp.where(seen, z, NEGATIVE) - logsumexp[head, rows][None])
        d_logits = weights * (_product(values, d_outs.T) - inner[head, rows][None])
        d_keys += _product(d_logits.astype(q.dtype), queries)
        return d_keys, d_values + _product(weights.astype(d_outs.dtype), d_outs)

    zeros = jnp.zeros(keys.shape, jnp.float32)
    d_keys, d_values = jax.lax.fori_loop(
        first[block] * groups, stop[block] * groups, visit, (zeros, zeros)
    )
    dk[...] = (d_keys * scale).astype(dk.dtype)
    dv[...] = d_values.astype(dv.dtype)


def _block_mask(
    blocks: Blocks, own: jax.Array, documents: jax.Array, start: jax.Array
) -> jax.Array:
    """Returns [B, S / queries, T / keys] bool: False if no query of a block sees a key of another.

    Ids of documents that lie between those of a block count as its own.
    """
    owns = own.reshape(*own.shape[:2], -1, blocks.queries)
    keys = documents.reshape(1, len(documents), 1, -1, blocks.keys)
    meets = owns.min(-1)[..., None] <= keys.max(-1)
    meets &= owns.max(-1)[..., None] >= keys.min(-1)
    last_query = start + blocks.queries * (1 + jnp.arange(owns.shape[2])) - 1
    first_key = blocks.keys * jnp.arange(keys.shape[3])
    return jnp.any(meets, axis=0) & (last_query[:, None] >= first_key[None])[None]


def _spans(mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the first True of the last axis and the end of the last one, int32; 0, 0 for none."""
    number = jnp.arange(mask.shape[-1], dtype=jnp.int32)
    number = jnp.broadcast_to(number, mask.shape)
    stop = jnp.max(jnp.where(mask, number + 1, 0), axis=-1)
    return jnp.min(jnp.where(mask, number, stop[..., None]), axis=-1), stop


class _Specs:
    """The block of each array that a kernel's program reads or writes.

    Programs are counted by blocks of queries or keys (i), heads or key heads (n) and rows (b).
    """

    def __init__(self, blocks: Blocks, q: jax.Array, k: jax.Array, own: jax.Array):
        (B, S, N, H), (T, K) = q.shape, k.shape[1:3]
        num_documents, G = own.shape[0], N // K
        num_queries, num_keys = S // blocks.queries, T // blocks.keys
        spec = pl.BlockSpec
        self.grid_of_queries, self.grid_of_keys = (num_queries, N, B), (num_keys, K, B)
        start = spec((1,), lambda i, n, b: (0,))
        of_row = [spec((None, count), lambda i, n, b: (b, 0)) for count in (num_queries, num_keys)]
        self.of_queries = [of_row[0], of_row[0], start]
        self.of_queries += [spec((num_documents, None, blocks.queries), lambda i, n, b: (0, b, i))]
        self.of_queries += [spec((None, T), lambda i, n, b: (b, 0))]
        self.of_keys = [of_row[1], of_row[1], start]
        self.of_keys += [spec((num_documents, None, S), lambda i, n, b: (0, b, 0))]
        self.of_keys += [spec((None, blocks.keys), lambda i, n, b: (b, i))]
        self.queries = spec((None, blocks.queries, None, H), lambda i, n, b: (b, i, n, 0))
        self.all_keys = spec((None, T, None, H), lambda i, n, b: (b, 0, n // G, 0))
        self.statistic = spec((None, None, blocks.queries), lambda i, n, b: (b, n, i))
        self.keys = spec((None, blocks.keys, None, H), lambda i, n, b: (b, i, n, 0))
        self.all_queries = spec((None, S, G, H), lambda i, n, b: (b, 0, n, 0))
        self.all_statistics = spec((None, G, S), lambda i, n, b: (b, n, 0))


def _params(blocks: Blocks):
    return plgpu.CompilerParams(num_warps=blocks.warps, num_stages=blocks.stages)


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.dot(a, b, preferred_element_type=jnp.float32)


def _places(block: jax.Array, size: int) -> jax.Array:
    return block * size + jnp.arange(size)


def _visible(places, owns, key_places, documents) -> jax.Array:
    """Returns True where a query may attend to a key, of arrays that broadcast to a block."""
    return (places >= key_places) & reduce(jnp.logical_or, [own == documents for own in owns])


def _rows(own, rows=slice(None)) -> list[jax.Array]:
    """Returns the documents of queries, an array [Q] for each of num_documents."""
    return [own[d, rows] for d in range(own.shape[0])]
