"""bfloat16 as integers: XLA's CPU converts bfloat16 to float32 and back where it only moves it."""

import jax
import jax.numpy as jnp


def to_bits(x: jax.Array) -> jax.Array:
    """Returns the bits of a bfloat16 array as uint16; other dtypes as they are."""
    return jax.lax.bitcast_convert_type(x, jnp.uint16) if x.dtype == jnp.bfloat16 else x


def from_bits(bits: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Returns the array of `dtype` that `to_bits` was given."""
    return bits if bits.dtype == dtype else jax.lax.bitcast_convert_type(bits, dtype)
