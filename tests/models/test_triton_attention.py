"""The GPU's attention kernels on jax's interpreter; tests/test_gpu.py runs them as they are."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import AbstractDevice, AbstractMesh
from test_attention import jaxs_own, with_gradients

from kd_jax.config import MeshConfig
from kd_jax.models import triton_attention as module
from kd_jax.models.attention import attention
from kd_jax.parallel.mesh import Layout, make_mesh

pytestmark = pytest.mark.fast

N, K, H = 4, 2, 16


@pytest.fixture(autouse=True)
def interpreter(monkeypatch):
    run = partial(module.pl.pallas_call, interpret=True)
    monkeypatch.setattr(module.pl, "pallas_call", run)


def make_inputs(S, dtype=np.float32):
    rng = np.random.default_rng(0)
    q, k, v, d = (rng.normal(size=(2, S, n, H)).astype(dtype) for n in (N, K, K, N))
    return q, k, v, np.sort(rng.integers(0, 5, (2, S)), axis=1).astype(np.int32), d


def kernels(q, k, v, segments):
    start = jnp.zeros(1, jnp.int32)
    return module.triton_attention(q.shape[-1] ** -0.5, q, k, v, segments[None], segments, start)


def test_kernels_equal_jaxs_own():
    inputs = make_inputs(256)
    for got, want in zip(
        with_gradients(kernels, *inputs), with_gradients(jaxs_own, *inputs), strict=True
    ):
        np.testing.assert_allclose(got, want, atol=1e-6 * np.abs(want).max())


def test_ids_of_documents_in_any_order():
    q, k, v, segments, d = make_inputs(256)
    segments = np.random.default_rng(1).permutation(8)[segments * 3 // 2].astype(np.int32)
    segments[:, 200:] = segments[:, :56]  # a document in two places
    inputs = (q, k, v, segments, d)
    for got, want in zip(
        with_gradients(kernels, *inputs), with_gradients(jaxs_own, *inputs), strict=True
    ):
        np.testing.assert_allclose(got, want, atol=1e-6 * np.abs(want).max())


def test_blocks_of_other_documents_are_not_visited():
    """NaN there reaches nothing; masked, it would be multiplied by 0."""
    q, k, v, _, d = make_inputs(256)
    segments = np.repeat(np.arange(4, dtype=np.int32), 64)[None].repeat(2, axis=0)
    for x in (q, k, v, d):
        x[:, 64:128] = np.nan
    for found in with_gradients(kernels, q, k, v, segments, d):
        finite = np.isfinite(found).all(axis=(0, 2, 3))
        np.testing.assert_array_equal(finite, (np.arange(256) // 64) != 1)


@pytest.mark.parametrize("S, parts, shared", [(200, 1, True), (128, 2, False)])
def test_the_model_attends_as_with_other_kernels(S, parts, shared):
    """Rows are padded, or split over devices; a prompt may be shared."""
    mesh = MeshConfig(data=1, fsdp=1, tensor=1, context=2)
    layout = Layout(make_mesh(mesh, 2) if parts == 2 else tiny.one_device())
    q, k, v, segments, d = make_inputs(S, jnp.bfloat16)
    documents = (segments, np.zeros_like(segments)) if shared else segments
    run = partial(attention, layout=layout)
    got = with_gradients(partial(run, implementation="triton"), q, k, v, documents, d)
    for ours, want in zip(got, with_gradients(run, q, k, v, documents, d), strict=True):
        ours, want = (np.asarray(x, np.float32) for x in (ours, want))
        np.testing.assert_allclose(ours, want, atol=2e-2 * np.abs(want).max())  # of bfloat16


def test_float32_is_refused():
    q, k, v, segments, _ = make_inputs(64)
    with pytest.raises(ValueError, match="expected bfloat16 for triton, got float32"):
        attention(q, k, v, segments, Layout(tiny.one_device()), implementation="triton")


@pytest.mark.parametrize("num_heads, num_kv_heads, head_dim", [(14, 2, 64), (32, 8, 128)])
def test_kernels_are_lowered_for_a_gpu(monkeypatch, num_heads, num_kv_heads, head_dim):
    """Triton's blocks have powers of 2; the query heads of a key head need not be one."""
    monkeypatch.undo()
    device = AbstractDevice(device_kind="NVIDIA H100", num_cores=None, platform="cuda")
    counts = (num_heads, num_kv_heads, num_kv_heads, num_heads)
    shapes = ((2, 128, n, head_dim) for n in counts)
    q, k, v, d = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes)
    segments = jax.ShapeDtypeStruct((2, 128), jnp.int32)
    run = jax.jit(partial(with_gradients, kernels))
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=device)):
        lowered = run.trace(q, k, v, segments, d).lower(lowering_platforms=("cuda",))
    assert lowered.as_text().count("__gpu$xla.gpu.triton") == 3
