"""Causal attention within documents: one function, several kernels, one mask."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from kd_jax.models.blockwise_attention import blockwise
from kd_jax.models.masks import Mask, Window, causal, of_queries, visible
from kd_jax.models.residuals import SAVED_ATTENTION
from kd_jax.models.tiled_attention import BLOCK, tiled_attention
from kd_jax.parallel.experimental import experimental
from kd_jax.parallel.mesh import Layout, traits
from kd_jax.parallel.platforms import TRITON_BLOCK, TRITON_HEAD_DIMS, Implementation, num_cores


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
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    xla = partial(_xla, traits(layout.mesh))
    kernels = {"xla": xla, "cudnn": _cudnn, "triton": _triton, "splash": _splash}
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


def _xla(platform, scale, context, q, k, v, mask):
    """Attention by XLA, in loops that skip other documents where rows are long for the cores."""
    least = platform.tiled_tokens
    if context is not None or least is None or q.shape[1] < least * num_cores():
        return blockwise(scale, context, q, k, v, mask, as_bits=platform.integer_residuals)
    heads, rows = _padded(BLOCK, (q, k, v), mask)
    return tiled_attention(scale, *heads, rows)[:, : q.shape[1]]


def _cudnn(scale, context, q, k, v, mask):
    """Attention by cuDNN, which computes and masks later keys where tokens are sharded."""
    S = q.shape[1]
    if context is not None and S % 2:  # padding a part would move the next one
        return blockwise(scale, context, q, k, v, mask)
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
    return triton_attention(scale, q, k, v, own, mask.documents[0], start)[:, :S]


def _splash(scale, context, q, k, v, mask):
    """Attention by jax's TPU kernel, which skips blocks that are masked."""
    S = q.shape[1]
    ragged = context is not None and S % 128 > 0  # padding a part would move the next one
    if len(mask.documents) > 1 or mask.window is not None or ragged:  # it has no mask for these
        return blockwise(scale, context, q, k, v, mask)
    (q, k, v), mask = _padded(128, (q, k, v), mask)
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q * scale, k, v))
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
    return jnp.swapaxes(out, 1, 2)[:, :S].astype(q.dtype)


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
