"""Matmul of activations and a weight, in the form that is fast on each platform."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from kd_jax.parallel.platforms import by_platform


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
    return _project(dtype, in_use, x, weight)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _project(dtype, in_use, x, weight):
    weight = _fetch(weight, dtype, in_use)
    if x.shape[1] == 1:
        # Decoding, one token a row: weight first and float32 out is several times faster on CPU.
        y = jnp.einsum("oi,BSi->oBS", weight, x, preferred_element_type=jnp.float32)
        return jnp.moveaxis(y, 0, -1).astype(dtype)
    return _multiply("BSi,oi->BSo", x, weight)


def _fetch(weight, dtype, in_use):
    weight = weight.astype(dtype)  # float32 master weights multiply in the model's dtype
    return weight if in_use is None else jax.lax.with_sharding_constraint(weight, in_use)


def _forward(dtype, in_use, x, weight):
    return _project(dtype, in_use, x, weight), (x, weight)


def _backward(dtype, in_use, residuals, dy):
    x, weight = residuals
    dx = _multiply("BSo,oi->BSi", dy, _fetch(weight, dtype, in_use))
    d_weight = jnp.einsum("BSo,BSi->oi", dy, x, preferred_element_type=jnp.float32)
    return dx, d_weight.astype(weight.dtype)


_project.defvjp(_forward, _backward)


def _multiply(product: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """Returns the einsum in the operands' dtype."""

    def wide(a, b):
        return jnp.einsum(product, a, b, preferred_element_type=jnp.float32).astype(a.dtype)

    def plain(a, b):
        return jnp.einsum(product, a, b)

    return by_platform("wide_products", wide, plain)(a, b)
