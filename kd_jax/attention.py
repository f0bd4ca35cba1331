"""Causal attention within documents: one function, several kernels, the mask never dropped."""

from typing import Literal

import jax
import jax.numpy as jnp

Implementation = Literal["auto", "xla", "cudnn"]


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array | tuple[jax.Array, jax.Array],
    *,
    implementation: Implementation = "auto",
) -> jax.Array:
    """Returns softmax(q kᵀ / sqrt(H)) v, each token seeing its own document's past and itself.

    Args:
      q: [B, S, N, H].
      k: [B, S, K, H], with N a multiple of K; each key head serves N / K query heads.
      v: [B, S, K, H].
      segment_ids: [B, S] int32; tokens of one document share a number. A second such array beside
        it names a document that a token sees besides its own: a prompt that several answers share.
      implementation: "xla", "cudnn" (NVIDIA GPU, bfloat16), or "auto".

    Returns:
      [B, S, N, H] in q's dtype; the softmax is float32.

    Raises:
      ValueError: cudnn was asked for in a dtype that it does not have.
    """
    if implementation == "auto":
        # What cuDNN's training kernels take on every generation of GPUs.
        fits = q.dtype == jnp.bfloat16 and q.shape[1] % 2 == 0
        fits &= q.shape[3] % 8 == 0 and q.shape[3] <= 128 and jax.default_backend() == "gpu"
        implementation = "cudnn" if fits else "xla"
    if implementation == "cudnn" and q.dtype != jnp.bfloat16:
        raise ValueError(f"attention: cudnn works in bfloat16, got {q.dtype}. Use attention=xla")
    own, *others = segment_ids if isinstance(segment_ids, tuple) else (segment_ids,)
    seen = own[:, None, :, None] == own[:, None, None, :]  # [B, 1, S, T]
    for other in others:
        seen |= other[:, None, :, None] == own[:, None, None, :]
    return jax.nn.dot_product_attention(
        q, k, v, mask=seen, is_causal=True, implementation=implementation
    )
