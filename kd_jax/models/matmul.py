"""Matmul of activations and a weight, in the form that is fast on each platform."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from kd_jax.models.bits import from_bits, to_bits
from kd_jax.parallel.platforms import by_platform


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def project(
    x: jax.Array, weight: jax.Array, dtype: Any, in_use: NamedSharding | None = None
) -> jax.Array:
    """Returns x Wᵀ, [B, S, out] in `dtype`, of x [B, S, in] and a weight [out, in].

    The weight is cast to `dtype`. Its gradient goes from the matmul's float32 accumulator to the
    weight's own dtype.

    Args:
      in_use: the weight's sharding in the matmul, all-gathered again in the backward pass; None
        keeps its own.
    """
    weight = _fetch(weight, dtype, in_use)
    if x.shape[1] == 1:
        # Decoding, one token a row: weight first and float32 out is several times faster on CPU.
        y = jnp.einsum("oi,BSi->oBS", weight, x, preferred_element_type=jnp.float32)
        return jnp.moveaxis(y, 0, -1).astype(dtype)
    return _multiply("BSi,oi->BSo", x, weight)


def _fetch(weight, dtype, in_use):
    weight = weight.astype(dtype)  # float32 master weights multiply in the model's dtype
    return weight if in_use is None else jax.lax.with_sharding_constraint(weight, in_use)


def _forward(x, weight, dtype, in_use):
    return project(x, weight, dtype, in_use), (x, weight)


def _backward(dtype, in_use, residuals, dy):
    x, weight = residuals
    dx = _multiply("BSo,oi->BSi", dy, _fetch(weight, dtype, in_use))
    d_weight = _sum_products("BSo,BSi->oi", dy, x)
    return dx, d_weight.astype(weight.dtype)


project.defvjp(_forward, _backward)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def project_adapted(
    x: jax.Array,
    weight: jax.Array,
    factors: tuple[jax.Array, jax.Array],
    scale: float,
    dtype: Any,
    save: Callable[[jax.Array], jax.Array],
) -> jax.Array:
    """Returns x Wᵀ + scale (x Aᵀ) Bᵀ, [B, S, out] in `dtype`, as one matmul.

    x and x Aᵀ are joined along their last dimension, W and scale B likewise, so that no second
    array [B, S, out] is written. The backward pass joins dy and dy B in the same way.

    Args:
      factors: A [rank, in] and B [out, rank].
      save: names x Aᵀ for gradient checkpointing.
    """
    return _adapted_forward(x, weight, factors, scale, dtype, save)[0]


def _adapted_forward(x, weight, factors, scale, dtype, save):
    A, B = factors
    low = save(_multiply("BSi,ri->BSr", x, A.astype(dtype)))
    inputs = _join(x, low, axis=-1)
    joined = _join(weight.astype(dtype), _scaled(scale, B, dtype), axis=1)
    return _multiply("BSi,oi->BSo", inputs, joined), (x, weight, A, B, low)


def _join(a, b, axis):
    """Returns a and b joined, bfloat16 as integers: a CPU joins it as float32 and converts that."""
    return from_bits(jnp.concatenate([to_bits(a), to_bits(b)], axis), a.dtype)


def _scaled(scale, B, dtype):
    return (scale * B.astype(jnp.float32)).astype(dtype)  # rounded once


def _adapted_backward(scale, dtype, save, residuals, dy):
    x, weight, A, B, low = residuals
    d_low = _multiply("BSo,or->BSr", dy, _scaled(scale, B, dtype))
    gradients = _join(dy, d_low, axis=-1)
    joined = _join(weight.astype(dtype), A.astype(dtype), axis=0)
    dx = _multiply("BSo,oi->BSi", gradients, joined)
    d_weight = _sum_products("BSo,BSi->oi", dy, x)  # unused, and then not computed, if W is frozen
    dA = _sum_products("BSr,BSi->ri", d_low, x)
    # In this order XLA transposes low, not dy. Without the barrier it turns the product around.
    dB = scale * jax.lax.optimization_barrier(_sum_products("BSr,BSo->ro", low, dy)).T
    return dx, d_weight.astype(weight.dtype), (dA.astype(A.dtype), dB.astype(B.dtype))


project_adapted.defvjp(_adapted_forward, _adapted_backward)


def _sum_products(product: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(product, a, b, preferred_element_type=jnp.float32)


def _multiply(product: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """Returns the einsum in the operands' dtype."""

    def wide(a, b):
        return jnp.einsum(product, a, b, preferred_element_type=jnp.float32).astype(a.dtype)

    def plain(a, b):
        return jnp.einsum(product, a, b)

    if a.dtype == b.dtype == jnp.float32:
        return plain(a, b)  # both are the same
    return by_platform("wide_products", wide, plain)(a, b)
