"""The gradient of embeddings that a GPU takes, against the plain one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_run import Run, assert_near

from kd_jax.models import embedding

V, D = 40, 8


@pytest.mark.fast
@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (4, 64)])
@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_rows_are_summed_by_token(shape, dtype):
    rng = np.random.default_rng(0)
    tokens = np.minimum(rng.geometric(0.1, shape) - 1, V - 2)  # some often, the last one never
    rows = rng.normal(size=(*shape, D)).astype(dtype)
    want = np.zeros((V, D))
    np.add.at(want, tokens, np.asarray(rows, np.float64))
    got = jax.jit(embedding._sum_by_token, static_argnums=2)(rows, tokens, V)
    assert got.dtype == jnp.float32 and (np.asarray(got)[-1] == 0).all()
    np.testing.assert_allclose(got, want, atol=2e-6 * max(1, np.abs(want).max()))


BOTH, ROWS_ALONE = ("fsdp", "tensor"), ("fsdp",)


@pytest.mark.parametrize(
    "sizes, axes",
    [
        ((1, 1, 1), BOTH), ((8, 1, 1), BOTH), ((1, 8, 1), BOTH), ((2, 2, 2), BOTH),
        ((1, 1, 4), BOTH), ((2, 2, 2), ROWS_ALONE), ((1, 2, 2), ()),
    ],
)  # fmt: skip
def test_a_gpus_gradient_is_the_plain_one(make_config, monkeypatch, sizes, axes):
    mesh = dict(zip(("data", "fsdp", "tensor"), sizes, strict=True))
    config, devices = make_config(mesh=mesh, student_axes=axes), jax.devices()[: np.prod(sizes)]
    run = Run(config, devices)
    want, _ = run.gradients(run.batch())
    shares, right = [], embedding._sum_by_token

    def sum_by_token(rows, tokens, num_entries):
        shares.append((rows.shape[0], num_entries))
        return right(rows, tokens, num_entries)

    monkeypatch.setattr(embedding, "_sum_by_token", sum_by_token)
    monkeypatch.setattr(embedding, "platform", lambda mesh: "gpu")
    jax.clear_caches()
    got, _ = run.gradients(run.batch())
    assert_near(got, want, 1e-6)
    # Where the table is split over "tensor", a device sums its own entries; else it has own rows.
    rows = sizes[0] * sizes[1] * (1 if "tensor" in axes else sizes[2])
    entries = 320 // (sizes[2] if "tensor" in axes else 1)
    assert shares == [(config.data.batch_size // rows, entries)]
