"""What gradient checkpointing saves, and in which form."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd_jax.models.residuals import SAVED_PRODUCT, save

pytestmark = pytest.mark.fast


def program(as_bits, dtype="bfloat16", names=(SAVED_PRODUCT,)):
    """Returns the gradient of a scan whose body is checkpointed, and its arguments."""
    policy = jax.checkpoint_policies.save_only_these_names(*names)

    @partial(jax.checkpoint, policy=policy, prevent_cse=False)
    def body(x, weight):
        return jnp.sin(save(x @ weight, SAVED_PRODUCT, as_bits)) * 2

    def loss(weights, x):
        x, _ = jax.lax.scan(lambda x, w: (body(x, w), None), x, weights)
        return jnp.sum(x.astype(jnp.float32) ** 2)

    rng = np.random.default_rng(0)
    weights, x = (jnp.asarray(rng.standard_normal(s), dtype) for s in ((3, 8, 8), (5, 8)))
    return jax.grad(loss, argnums=(0, 1)), (weights, x)


def stacks(gradient, arguments):
    """Returns dtype and shape of what the forward scan stacks, [3, ...]."""
    scans = [e for e in jax.make_jaxpr(gradient)(*arguments).eqns if e.primitive.name == "scan"]
    outputs = (x.aval for x in scans[0].outvars if x.aval.shape[0] == 3)
    return sorted(f"{x.dtype}{list(x.shape)}" for x in outputs)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_bits_are_the_values_and_gradients_pass(dtype):
    (plain, arguments), (bits, _) = (program(as_bits, dtype) for as_bits in (False, True))
    for a, b in zip(jax.jit(plain)(*arguments), jax.jit(bits)(*arguments), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_a_policy_saves_the_bits_in_place_of_the_array():
    assert "uint16[3, 5, 8]" in stacks(*program(True))
    assert "uint16[3, 5, 8]" not in stacks(*program(False))
    assert "uint16[3, 5, 8]" not in stacks(*program(True, names=()))  # twin: no such name
    assert "uint16[3, 5, 8]" not in stacks(*program(True, "float32"))
