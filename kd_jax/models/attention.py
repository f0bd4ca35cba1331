"""Causal attention within documents: one function, several kernels, one mask."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from kd_jax.models.masks import NEGATIVE, Mask, Window, causal, of_queries, visible
from kd_jax.models.residuals import SAVED_ATTENTION, name_residual
from kd_jax.parallel.experimental import experimental
from kd_jax.parallel.mesh import Layout, traits
from kd_jax.parallel.platforms import TRITON_BLOCK, TRITON_HEAD_DIMS, Implementation


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

    Where the mesh shards a row's tokens, a device has the queries of its part and all-gathers the
    row's keys and values; the backward pass reduce-scatters their gradients. A ring
    would send as much, in steps whose results each kernel would have to merge. The last part's
    queries have the most keys, and the other devices wait for it.

    Args:
      q: [B, S, N, H].
      k: [B, S, K, H]; N is a multiple of K.
      v: [B, S, K, H].
      segment_ids: [B, S] int32, the document of each token. A second such array names another
        document that the token attends to: a prompt that several answers share.
      layout: of the model on the mesh; rows, their tokens and query heads are sharded.
      window: None: a token attends to its whole past.
      scale: None: 1 / sqrt(H).
      implementation: "xla", "cudnn" or "triton" (NVIDIA GPU, bfloat16), or "splash" (TPU).

    Returns:
      [B, S, N, H] in q's dtype; the softmax is float32.

    Raises:
      ValueError: cudnn or triton in another dtype than bfloat16.
    """
    if implementation in ("cudnn", "triton") and q.dtype != jnp.bfloat16:
        raise ValueError(
            f"attention: expected bfloat16 for {implementation}, got {q.dtype}. Use attention=xla"
        )
    documents = segment_ids if isinstance(segment_ids, tuple) else (segment_ids,)
    mask = Mask(documents, window)
    blockwise = partial(_blockwise, traits(layout.mesh).integer_residuals)
    kernels = {"xla": blockwise, "cudnn": _cudnn, "triton": _triton, "splash": _splash}
    kernel: Any = kernels[implementation]
    if layout.mesh.size == 1:
        return kernel(scale, None, q, k, v, mask)
    tensor = _axis_of_heads(layout, q.shape[2], k.shape[2])
    if tensor is not None:
        # A device needs at least one key head.
        times = max(1, layout.mesh.shape[tensor] // k.shape[2])
        k, v = (jnp.repeat(x, times, axis=2) for x in (k, v))
    rows, context = layout.activations(q.shape[:2])
    heads = P(rows, context, tensor)
    masks = Mask(P(rows), None if window is None else Window(P(rows), P()))  # type: ignore[arg-type]

    def run_device(q, k, v, mask):
        if context is not None:
            k, v = (jax.lax.all_gather(x, context, axis=1, tiled=True) for x in (k, v))
        return kernel(scale, context, q, k, v, mask)

    run = jax.shard_map(
        run_device,
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


def _cudnn(scale, context, q, k, v, mask):
    """Attention by cuDNN, which computes and masks later keys where tokens are sharded."""
    S = q.shape[1]
    if context is not None and S % 2:  # padding a part would move the next one
        return _blockwise(False, scale, context, q, k, v, mask)
    heads, mask = _padded(2, (q, k, v), mask)
    own = of_queries(context, S, mask)
    seen = visible(own, mask, slice(None), slice(None))
    if context is not None:
        seen &= causal(context, S, slice(0, S), k.shape[1])

    def run(q, k, v, seen):
        return jax.nn.dot_product_attention(
            q, k, v, mask=seen, scale=scale, is_causal=context is None, implementation="cudnn"
        )

    return _with_named_residuals(run, heads, seen[:, None])[:, :S]


def _triton(scale, context, q, k, v, mask):
    """Attention by our GPU kernels, which skip blocks of other documents."""
    from kd_jax.models.triton_attention import triton_attention  # imports Pallas

    S = q.shape[1]
    ragged = context is not None and S % TRITON_BLOCK > 0  # padding a part would move the next one
    if mask.window is not None or ragged or q.shape[3] not in TRITON_HEAD_DIMS:
        return _cudnn(scale, context, q, k, v, mask)
    (q, k, v), mask = _padded(TRITON_BLOCK, (q, k, v), mask)
    own = jnp.stack(of_queries(context, q.shape[1], mask).documents)
    start = jnp.full(1, 0 if context is None else jax.lax.axis_index(context) * S, jnp.int32)
    return triton_attention(_scale(scale, q), q, k, v, own, mask.documents[0], start)[:, :S]


def _splash(scale, context, q, k, v, mask):
    """Attention by jax's TPU kernel, which skips blocks that are masked."""
    S = q.shape[1]
    ragged = context is not None and S % 128 > 0  # padding a part would move the next one
    if len(mask.documents) > 1 or mask.window is not None or ragged:  # it has no mask for these
        return _blockwise(False, scale, context, q, k, v, mask)
    (q, k, v), mask = _padded(128, (q, k, v), mask)
    q, k, v = (_heads_first(x) for x in (q * _scale(scale, q), k, v))
    splash = experimental("jax.experimental.pallas.ops.tpu", "splash_attention")
    size = next(size for size in (512, 256, 128) if q.shape[2] % size == 0)
    names = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")

    def run(q, k, v, segments):
        length = k.shape[2]
        make = partial(
            splash.make_splash_mha,
            splash.MultiHeadMask([splash.CausalMask((length, length))] * q.shape[1]),
            block_sizes=splash.BlockSizes(**{f"block_{name}": size for name in names}),
            is_mqa=False,
            head_shards=1,
        )
        kernel = make(q_seq_shards=length // q.shape[2])
        if context is not None:
            kernel = _own_part(context, kernel)
        (own,) = of_queries(context, q.shape[2], Mask((segments,))).documents
        return jax.vmap(kernel)(q, k, v, splash.SegmentIds(own, segments))

    out = _with_named_residuals(run, (q, k, v), *mask.documents)
    return _heads_first(out)[:, :S].astype(q.dtype)


def _own_part(context: str, kernel: Any) -> Any:
    """Returns a splash kernel of all parts of a row with the blocks of this device's queries."""
    num_parts = jax.lax.axis_size(context)
    mesh = jax.sharding.AbstractMesh((num_parts,), (context,))
    specs = kernel.manual_sharding_spec(jax.sharding.NamedSharding(mesh, P(None, context)))

    def take(x, spec):
        if context not in spec:
            return x
        axis = spec.index(context)
        size = x.shape[axis] // num_parts
        return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(context) * size, size, axis)

    return jax.tree.map(take, kernel, specs)


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


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _blockwise(as_bits, scale, context, q, k, v, mask):
    """Attention by blocks of queries, each with the keys up to its end.

    No array of queries x keys outlives its block: the backward pass recomputes the weights from
    each query's logsumexp, as FlashAttention does (arXiv 2205.14135).
    """
    return _forward(as_bits, scale, context, q, k, v, mask)[0]


def _forward(as_bits, scale, context, q, k, v, mask):
    queries, keys, values = _grouped(q, k), _heads_first(k), _heads_first(v)
    # A column of ones, whose product is the sum of the weights.
    values = jnp.concatenate([values, jnp.ones_like(values[..., :1])], axis=-1)
    outputs, logsumexps = [], []
    for block, stop in _blocks(q.shape[1], k.shape[1]):
        z = _block_logits(scale, context, queries, keys, mask, block, stop)
        highest = jnp.max(z, axis=-1, keepdims=True)
        weights = jnp.exp(z - highest).astype(v.dtype)  # the matmul's dtype
        sums = _product("BKRT,BKTH->BKRH", _rows(weights), values[:, :, :stop])
        sums = sums.reshape(*weights.shape[:4], -1)
        outputs.append((sums[..., :-1] / sums[..., -1:]).astype(q.dtype))
        logsumexps.append(highest + jnp.log(sums[..., -1:]))
    output = _ungrouped(jnp.concatenate(outputs, axis=3))
    output = name_residual(output, SAVED_ATTENTION, as_bits)
    logsumexp = checkpoint_name(jnp.concatenate(logsumexps, axis=3), SAVED_ATTENTION)
    return output, (q, k, v, mask, output, logsumexp)


def _backward(as_bits, scale, context, residuals, d_output):
    q, k, v, mask, output, logsumexp = residuals
    queries, keys, values = _grouped(q, k), _heads_first(k), _heads_first(v)
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
        d_weights = _product("BKGSH,BKTH->BKGST", d_block, values[:, :, seen])
        d_logits = (weights * (d_weights - inner[:, :, :, block])).astype(q.dtype)
        weights = weights.astype(v.dtype)
        d_queries.append(_product("BKGST,BKTH->BKGSH", d_logits, keys[:, :, seen]))
        d_keys = _add_to_first(d_keys, _sum_over_queries(d_logits, q_block))
        d_values = _add_to_first(d_values, _sum_over_queries(weights, d_block))
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


def _sum_over_queries(weights: jax.Array, x: jax.Array) -> jax.Array:
    """Returns the product [B, K, T, H] of weights [B, K, G, S, T] and x [B, K, G, S, H].

    As a sum over one dimension, a CPU transposes within the kernel; it has none for bfloat16 that
    does, and is twice as fast if it has to transpose before.
    """
    if weights.dtype == jnp.bfloat16:
        return _product("BKGST,BKGSH->BKTH", weights, x)
    return _product("BKRT,BKRH->BKTH", _rows(weights), _rows(x))


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
    z = _product("BKRH,BKTH->BKRT", _rows(queries), keys[:, :, :stop])
    seen = visible(of_queries(context, num_queries, mask), mask, block, slice(0, stop))
    seen &= causal(context, num_queries, block, stop)
    bias = jax.lax.optimization_barrier(jnp.where(seen, 0.0, NEGATIVE))
    return z.reshape(*queries.shape[:4], -1) * _scale(scale, queries) + bias[:, None, None]


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
