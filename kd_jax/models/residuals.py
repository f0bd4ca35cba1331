"""Names for what gradient checkpointing saves for the backward pass."""

from functools import partial

import jax
from jax.ad_checkpoint import checkpoint_name

from kd_jax.models.bits import from_bits, to_bits

SAVED_PRODUCT = "product"
"""Name of a projection's output; gradient checkpointing can save it."""

SAVED_ATTENTION = "attention"
"""Name of attention's residuals other than its inputs; gradient checkpointing can save them."""

SAVED_INPUT = "input"
"""Name of a layer's input, where it is saved as bits."""


@partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def save(x: jax.Array, name: str, as_bits: bool) -> jax.Array:
    """Returns x under a name that a checkpointing policy can save.

    Args:
      as_bits: save bfloat16 as integers: XLA's CPU converts a whole stack of bfloat16 residuals to
        float32 and back when it writes one layer's.
    """
    return name_residual(x, name, as_bits)


def name_residual(x: jax.Array, name: str, as_bits: bool) -> jax.Array:
    """Returns `save` of x for the rules of a custom_vjp, which are not differentiated.

    A checkpointing policy sees no name inside of a custom_jvp, as `save` is.
    """
    if not as_bits:
        return checkpoint_name(x, name)
    return from_bits(checkpoint_name(to_bits(x), name), x.dtype)


@save.defjvp
def _save_jvp(name, as_bits, primals, tangents):
    return name_residual(primals[0], name, as_bits), tangents[0]
