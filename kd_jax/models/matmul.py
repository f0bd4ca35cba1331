"""The product of activations and a weight, asked for in the form that each backend is fast in."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding


def project(
    x: jax.Array, weight: jax.Array, dtype: Any, in_use: NamedSharding | None = None
) -> jax.Array:
    """Returns x Wᵀ, [B, S, out] in `dtype`, of x [B, S, in] and a weight [out, in].

    A weight of another dtype multiplies in `dtype`; its gradient leaves the product's float32
    accumulator in the weight's own dtype.

    Args:
      in_use: how the weight lies on the devices for the product, anew in the backward pass; None
        as it is kept.
    """
    return _project(dtype, in_use, x, weight)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _project(dtype, in_use, x, weight):
    weight = _fetch(weight, dtype, in_use)
    if x.shape[1] == 1:
        # One token a row, in decoding: a CPU is several times faster weight first, float32 out.
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
    """Returns the product in the operands' dtype.

    XLA has a bfloat16 kernel on a CPU only for a float32 result: several times as fast as the
    float32 product of converted operands that it makes of the other (docs/benchmarks.md).
    """

    def wide(a, b):
        return jnp.einsum(product, a, b, preferred_element_type=jnp.float32).astype(a.dtype)

    def plain(a, b):
        return jnp.einsum(product, a, b)

    return jax.lax.platform_dependent(a, b, cpu=wide, default=plain)
