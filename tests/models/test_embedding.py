"""The gradient of embeddings that a GPU takes, against the plain one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from kd_jax.config import Config, DataConfig, LossConfig, MeshConfig, StudentConfig
from kd_jax.models import embedding
from kd_jax.models.architecture import read_architecture
from kd_jax.parallel.mesh import Layout, make_mesh
from kd_jax.parallel.platforms import PLATFORMS
from kd_jax.training.abstract import abstract_run

pytestmark = pytest.mark.devices(8)

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


@pytest.fixture
def shares(monkeypatch):
    """Makes embeddings take a GPU's gradient; lists the rows and entries that each device sums."""
    found, right = [], embedding._sum_by_token

    def sum_by_token(rows, tokens, num_entries):
        found.append((rows.shape[0], num_entries))
        return right(rows, tokens, num_entries)

    monkeypatch.setattr(embedding, "_sum_by_token", sum_by_token)
    monkeypatch.setattr(embedding, "traits", lambda mesh: PLATFORMS["gpu"])
    return found


@pytest.mark.fast
@pytest.mark.parametrize(
    "sizes, axes",
    [
        ((1, 1, 1), BOTH), ((8, 1, 1), BOTH), ((1, 8, 1), BOTH), ((2, 2, 2), BOTH),
        ((1, 1, 4), BOTH), ((2, 2, 2), ROWS_ALONE), ((1, 2, 2), ()), ((1, 2, 2, 2), BOTH),
    ],
)  # fmt: skip
def test_each_device_sums_its_own_rows_and_entries(shares, sizes, axes):
    mesh = dict(zip(("data", "fsdp", "tensor", "context"), sizes, strict=False))
    devices = jax.devices()[: np.prod(sizes)]
    layout = Layout(make_mesh(MeshConfig(**mesh), 8, devices), axes)
    rng = np.random.default_rng(0)
    tokens, d = rng.integers(0, V, (8, 30)), rng.normal(size=(8, 30, D)).astype(np.float32)
    place = layout.sharding(("vocab", "embed"), (V, D))
    table = jax.device_put(jnp.ones((V, D)), place)

    def gradient(table, tokens, d):
        return jax.grad(lambda x: jnp.sum(embedding.embed(x, tokens, layout) * d))(table)

    got = jax.jit(gradient, out_shardings=place)(table, tokens, d)
    want = np.zeros((V, D))
    np.add.at(want, tokens, np.asarray(d, np.float64))
    np.testing.assert_allclose(got, want, atol=2e-6 * np.abs(want).max())
    # Where the table is split over "tensor", a device sums its own entries; else it has own rows.
    rows = sizes[0] * sizes[1] * (1 if "tensor" in axes else sizes[2])
    assert shares == [(8 // rows, V // (sizes[2] if "tensor" in axes else 1))]


@pytest.mark.fast
@pytest.mark.parametrize("trainable, times", [("full", 1), ("lora", 0)])
def test_a_train_step_takes_it_where_the_table_is_trained(shares, trainable, times):
    config = Config(
        workdir="unused",
        teacher=None,
        student=StudentConfig(path="unused"),
        data=DataConfig(path="unused", seq_len=16, batch_size=4),
        loss=LossConfig(kd_ratio=0.0),
        trainable=trainable,
        steps=1,
    )
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2), 4)
    arch = read_architecture(tiny.make_config(vocab_size=V), "tiny")
    abstract_run(config, arch, None, mesh).trace()
    assert shares == [(1, V // 2)] * times
