"""Causal attention within documents: one function, several kernels, one mask."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from kd_jax.models.residuals import SAVED_ATTENTION, save
from kd_jax.parallel.experimental import experimental
from kd_jax.parallel.mesh import Layout, traits
from kd_jax.parallel.platforms import Implementation

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


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array | tuple[jax.Array, jax.Array],
    layout: Layout,
    *,
    window: Window | None = None,
    scale: float | None = None,
    implementation: Implementation = "xla",
) -> jax.Array:
    """Returns softmax(scale q kᵀ) v, where a token attends to its document up to itself.

    Args:
      q: [B, S, N, H].
      k: [B, S, K, H]; N is a multiple of K.
      v: [B, S, K, H].
      segment_ids: [B, S] int32, the document of each token. A second such array names another
        document that the token attends to: a prompt that several answers share.
      layout: of the model on the mesh; rows and query heads are sharded.
      window: None: a token attends to its whole past.
      scale: None: 1 / sqrt(H).
      implementation: "xla", "cudnn" (NVIDIA GPU, bfloat16), or "splash" (TPU).

    Returns:
      [B, S, N, H] in q's dtype; the softmax is float32.

    Raises:
      ValueError: cudnn in another dtype than bfloat16.
    """
    if implementation == "cudnn" and q.dtype != jnp.bfloat16:
        raise ValueError(
            f"attention: expected bfloat16 for cudnn, got {q.dtype}. Use attention=xla"
        )
    documents = segment_ids if isinstance(segment_ids, tuple) else (segment_ids,)
    mask = Mask(documents, window)
    blockwise = partial(_blockwise, traits(layout.mesh).integer_residuals)
    kernels = {"xla": blockwise, "cudnn": _cudnn, "splash": _splash}
    kernel: Any = kernels[implementation]
    run: Any = partial(kernel, scale)
    if layout.mesh.size == 1:
        return run(q, k, v, mask)
    tensor = _axis_of_heads(layout, q.shape[2], k.shape[2])
    if tensor is not None:
        # A device needs at least one key head.
        times = max(1, layout.mesh.shape[tensor] // k.shape[2])
        k, v = (jnp.repeat(x, times, axis=2) for x in (k, v))
    rows = layout.row_axes(q.shape[0])
    heads = P(rows, None, tensor)
    masks = Mask(P(rows), None if window is None else Window(P(rows), P()))  # type: ignore[arg-type]
    run = jax.shard_map(
        run,
        mesh=layout.mesh,
        in_specs=(heads, heads, heads, masks),
        out_specs=heads,
        check_vma=False,
    )
    return run(q, k, v, mask)


def _axis_of_heads(layout: Layout, num_heads: int, num_kv_heads: int) -> str | None:
    """Returns the mesh axis over which heads are sharded; None where their number does not fit."""
    axis = layout.tensor_axis
    size = 1 if axis is None else layout.mesh.shape[axis]
    fits = num_heads % size == 0 and (num_kv_heads % size == 0 or size % num_kv_heads == 0)
    return axis if fits else None


def _cudnn(scale, q, k, v, mask):
    S = q.shape[1]
    heads, mask = _padded(2, (q, k, v), mask)
    seen = _visible(mask, slice(None), slice(None))

    def run(q, k, v, seen):
        return jax.nn.dot_product_attention(
            q, k, v, mask=seen, scale=scale, is_causal=True, implementation="cudnn"
        )

    return _with_named_residuals(run, heads, seen[:, None])[:, :S]


def _splash(scale, q, k, v, mask):
    """Attention by jax's TPU kernel, which skips blocks that are masked."""
    if len(mask.documents) > 1 or mask.window is not None:  # it has no mask for these
        return _blockwise(False, scale, q, k, v, mask)
    S = q.shape[1]
    (q, k, v), mask = _padded(128, (q, k, v), mask)
    q, k, v = (_heads_first(x) for x in (q * _scale(scale, q), k, v))
    length = q.shape[2]
    splash = experimental("jax.experimental.pallas.ops.tpu", "splash_attention")
    size = next(size for size in (512, 256, 128) if length % size == 0)
    names = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")

    def run(q, k, v, segments):
        kernel = splash.make_splash_mha_single_device(
            splash.MultiHeadMask([splash.CausalMask((length, length))] * q.shape[1]),
            block_sizes=splash.BlockSizes(**{f"block_{name}": size for name in names}),
        )
        return jax.vmap(kernel)(q, k, v, splash.SegmentIds(segments, segments))

    out = _with_named_residuals(run, (q, k, v), *mask.documents)
    return _heads_first(out)[:, :S].astype(q.dtype)


def _kernel_precision(dtype):
    """Precision of matmuls inside a kernel: "highest" does not compile for bfloat16."""
    return jax.default_matmul_precision("default" if dtype == jnp.bfloat16 else "highest")


def _with_named_residuals(run, heads: tuple, seen: jax.Array):
    """Returns run(*heads, seen), the output of a kernel.

    Residuals besides `heads` and `seen`, the output and the softmax's statistics, are named
    SAVED_ATTENTION: where gradient checkpointing saves them, the kernel does not run again.
    """

    def forward(*operands):
        *heads, seen = operands
        with _kernel_precision(heads[0].dtype):
            out, backward = jax.vjp(lambda *x: run(*x, seen), *heads)
        named = checkpoint_name(out, SAVED_ATTENTION)

        def name(x):
            if x.shape == seen.shape or any(x is given for given in heads):
                return x
            return named if x is out else checkpoint_name(x, SAVED_ATTENTION)

        return named, jax.tree.map(name, backward)

    def backward(residuals, d_output):
        with _kernel_precision(d_output.dtype):
            return *residuals(d_output), None

    kernel = jax.custom_vjp(run)
    kernel.defvjp(forward, backward)
    with _kernel_precision(heads[0].dtype):
        return kernel(*heads, seen)


def _padded(unit: int, heads: tuple, mask: Mask) -> tuple[tuple, Mask]:
    """Returns arrays [B, S, ...] padded to a multiple of `unit`; padding is its own document."""
    room = ((0, 0), (0, -heads[0].shape[1] % unit))
    rows = jax.tree.map(lambda x: x if x.ndim == 0 else jnp.pad(x, room, constant_values=-1), mask)
    return tuple(jnp.pad(x, (*room, (0, 0), (0, 0))) for x in heads), rows


def _visible(mask: Mask, queries: slice, keys: slice) -> jax.Array:
    """Returns [B, S, T] bool: True where a query may attend to a key, causality aside."""
    own, *_ = mask.documents
    each = [x[:, queries, None] == own[:, None, keys] for x in mask.documents]
    seen = jnp.any(jnp.stack(each), axis=0) if len(each) > 1 else each[0]
    if mask.window is not None:
        place = mask.window.positions
        seen &= place[:, queries, None] - place[:, None, keys] < mask.window.size
    return seen


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _blockwise(as_bits, scale, q, k, v, mask):
    """Attention by blocks of queries, each with the keys up to its end.

    No array of queries x keys outlives its block: the backward pass recomputes the weights from
    each query's logsumexp, as FlashAttention does (arXiv 2205.14135).
    """
    return _forward(as_bits, scale, q, k, v, mask)[0]


def _forward(as_bits, scale, q, k, v, mask):
    queries, keys, values = _grouped(q, k), _heads_first(k), _heads_first(v)
    values = jnp.concatenate(
        [values, jnp.ones_like(values[..., :1])], axis=-1
    )  # the sum of weights
    outputs, logsumexps = [], []
    for block in _blocks(q.shape[1]):
        z = _block_logits(scale, queries, keys, mask, block)
        highest = jnp.max(z, axis=-1, keepdims=True)
        weights = jnp.exp(z - highest).astype(v.dtype)  # the matmul's dtype
        sums = _product("BKRT,BKTH->BKRH", _rows(weights), values[:, :, : block.stop])
        sums = sums.reshape(*weights.shape[:4], -1)
        outputs.append((sums[..., :-1] / sums[..., -1:]).astype(q.dtype))
        logsumexps.append(highest + jnp.log(sums[..., -1:]))
    output = _ungrouped(jnp.concatenate(outputs, axis=3))
    output = save(output, SAVED_ATTENTION, as_bits)
    logsumexp = checkpoint_name(jnp.concatenate(logsumexps, axis=3), SAVED_ATTENTION)
    return output, (q, k, v, mask, output, logsumexp)


def _backward(as_bits, scale, residuals, d_output):
    q, k, v, mask, output, logsumexp = residuals
    queries, keys, values = _grouped(q, k), _heads_first(k), _heads_first(v)
    d_output32, output32 = d_output.astype(jnp.float32), output.astype(jnp.float32)  # summed
    inner = _grouped(jnp.sum(d_output32 * output32, axis=-1, keepdims=True), k)
    d_outputs = _grouped(d_output, k)
    d_queries = []
    d_keys, d_values = jnp.zeros(keys.shape, jnp.float32), jnp.zeros(values.shape, jnp.float32)
    for block in _blocks(q.shape[1]):
        seen = slice(0, block.stop)
        d_block, q_block = d_outputs[:, :, :, block], queries[:, :, :, block]
        z = _block_logits(scale, queries, keys, mask, block)
        weights = jnp.exp(z - logsumexp[:, :, :, block])
        d_weights = _product("BKGSH,BKTH->BKGST", d_block, values[:, :, seen])
        d_logits = (weights * (d_weights - inner[:, :, :, block])).astype(q.dtype)
        weights = weights.astype(v.dtype)
        d_queries.append(_product("BKGST,BKTH->BKGSH", d_logits, keys[:, :, seen]))
        d_keys = _add_to_first(d_keys, _product("BKGST,BKGSH->BKTH", d_logits, q_block))
        d_values = _add_to_first(d_values, _product("BKGST,BKGSH->BKTH", weights, d_block))
    # Without the barrier a CPU chooses the block anew for each entry that RoPE's gradient reads.
    d_query, d_keys = jax.lax.optimization_barrier((jnp.concatenate(d_queries, axis=3), d_keys))
    factor = _scale(scale, q)
    dq = _ungrouped(d_query) * factor
    dk, dv = _heads_first(d_keys) * factor, _heads_first(d_values)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None


_blockwise.defvjp(_forward, _backward)


def _add_to_first(x, part):
    """Returns x [B, K, S, H] with `part` [B, K, T, H] added to its first T tokens.

    x.at[] makes empty index arrays for all tokens, and XLA of jax 0.11 crashes on those inside a
    shard_map.
    """
    return jax.lax.dynamic_update_slice_in_dim(x, x[:, :, : part.shape[2]] + part, 0, axis=2)


def _blocks(num_tokens: int) -> list[slice]:
    """Returns blocks of at least 128 queries, at most eight."""
    size = max(128, -(-num_tokens // 8))
    return [slice(s, min(s + size, num_tokens)) for s in range(0, num_tokens, size)]


def _block_logits(scale, queries, keys, mask, block):
    """Returns logits of a block's queries and the keys up to its end, [B, K, G, S, T] float32."""
    queries = queries[:, :, :, block]
    z = _product("BKRH,BKTH->BKRT", _rows(queries), keys[:, :, : block.stop])
    z = z.reshape(*queries.shape[:4], -1)
    seen = _visible(mask, block, slice(0, block.stop))
    place = jnp.arange(block.stop)
    seen &= place[None, block, None] >= place[None, None]
    return jnp.where(seen[:, None, None], z * _scale(scale, queries), NEGATIVE)


def _scale(scale: float | None, q: jax.Array) -> float:
    return q.shape[-1] ** -0.5 if scale is None else scale


def _product(product: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(product, a, b, preferred_element_type=jnp.float32)


def _rows(x):
    """Returns [B, K, G, S, ...] as [B, K, G * S, ...]."""
    return x.reshape(*x.shape[:2], -1, x.shape[-1])


def _heads_first(x):
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
