"""Attention by blocks and its backward pass, against jax's own and float64 NumPy."""

import math
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.ad_checkpoint import print_saved_residuals
from jax.experimental.pallas import tpu as pltpu

from kd_jax.config import MeshConfig
from kd_jax.models import attention as module
from kd_jax.models import blockwise_attention, tiled_attention
from kd_jax.models.masks import NEGATIVE, Window
from kd_jax.models.matmul import project
from kd_jax.models.residuals import SAVED_ATTENTION
from kd_jax.parallel.mesh import Layout, make_mesh

pytestmark = [pytest.mark.fast, pytest.mark.devices(8)]

B, N, K, H = 2, 4, 2, 8


def attention(*inputs, layout=None, **options):
    """Runs the model's attention, on one device by default."""
    return module.attention(*inputs, layout or Layout(tiny.one_device()), **options)


def make_inputs(S, dtype=np.float32):
    rng = np.random.default_rng(0)
    shapes = ((B, S, N, H), (B, S, K, H), (B, S, K, H), (B, S, N, H))
    q, k, v, d = ((2 * rng.normal(size=shape)).astype(dtype) for shape in shapes)
    segments = np.sort(rng.integers(0, 3, (B, S)), axis=1).astype(np.int32)
    return q, k, v, segments, d


def positions_of(segments):
    """Returns each token's place in its document."""
    rows = [
        np.concatenate([np.arange(n) for n in np.unique(s, return_counts=True)[1]])
        for s in segments
    ]
    return np.stack(rows).astype(np.int32)


def expected(q, k, v, segments, window=2**30, scale=1 / H**0.5):
    """Returns attention in float64 NumPy, written out token by token."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros_like(q)
    for b, s, n in np.ndindex(q.shape[:3]):
        first = max(0, s + 1 - window)
        seen = first + np.flatnonzero(segments[b, first : s + 1] == segments[b, s])
        z = k[b, seen, n * K // N] @ q[b, s, n] * scale
        weights = np.exp(z - z.max())
        out[b, s, n] = weights @ v[b, seen, n * K // N] / weights.sum()
    return out


def with_gradients(run, q, k, v, segments, d):
    def both(q, k, v):
        out, vjp = jax.vjp(lambda *x: run(*x, segments), q, k, v)
        return out, *vjp(d)

    return jax.jit(both)(q, k, v)


def jaxs_own(q, k, v, segments):
    seen = segments[:, None, :, None] == segments[:, None, None, :]
    return jax.nn.dot_product_attention(q, k, v, mask=seen, is_causal=True, implementation="xla")


@pytest.fixture(params=["blocks", "tiles"])
def form(request, monkeypatch):
    """Both of XLA's forms on a CPU, the first for short rows and sharded ones."""
    monkeypatch.setattr(module, "num_cores", lambda: 0 if request.param == "tiles" else 2**20)


@pytest.mark.parametrize("S", [1, 60, 128, 129, 300])
def test_attention_equals_float64(S, form):
    q, k, v, segments, _ = make_inputs(S)
    got, want = jax.jit(lambda *x: attention(*x))(q, k, v, segments), expected(q, k, v, segments)
    np.testing.assert_allclose(got, want, atol=2e-6 * np.abs(want).max())


@pytest.mark.parametrize("size, scale", [(7, 1 / H**0.5), (90, 0.25), (1, 0.25)])
def test_windows_and_scales_equal_float64(size, scale, form):
    q, k, v, segments, _ = make_inputs(300)
    window = Window(positions_of(segments), np.int32(size))
    got = jax.jit(partial(attention, scale=scale))(q, k, v, segments, window=window)
    want = expected(q, k, v, segments, size, scale)
    np.testing.assert_allclose(got, want, atol=2e-6 * np.abs(want).max())
    for other in (size + 1, 2**30):
        assert np.abs(got - expected(q, k, v, segments, other, scale)).max() > 1e-3


def windowed(q, k, v, segments, size=9, scale=0.25, **options):
    window = Window(positions_of(segments), jnp.int32(size))
    return attention(q, k, v, segments, window=window, scale=scale, **options)


def plainly_windowed(q, k, v, segments, size=9, scale=0.25):
    k, v = (jnp.repeat(x, N // K, axis=2) for x in (k, v))
    z = jnp.einsum("BSNH,BTNH->BNST", q, k) * scale
    place = np.arange(q.shape[1])
    behind = place[:, None] - place[None]
    seen = (segments[:, :, None] == segments[:, None]) & (behind >= 0) & (behind < size)
    weights = jax.nn.softmax(jnp.where(seen[:, None], z, -1e30))
    return jnp.einsum("BNST,BTNH->BSNH", weights, v)


def test_gradients_of_windows_equal_those_of_autodiff(form):
    inputs = make_inputs(300)
    ours, theirs = (with_gradients(run, *inputs) for run in (windowed, plainly_windowed))
    for got, want in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())


def test_windows_on_a_mesh_are_those_of_one_device():
    layout = Layout(make_mesh(MeshConfig(data=2, fsdp=1, tensor=4), 8))
    inputs = make_inputs(60)
    ours = with_gradients(partial(windowed, layout=layout), *inputs)
    for got, want in zip(ours, with_gradients(windowed, *inputs), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-6 * np.abs(want).max())


def split_rows(**sizes):
    """Returns the layout of a mesh that splits rows in two."""
    sizes = {"data": 1, "context": 2, **sizes}
    return Layout(make_mesh(MeshConfig(**sizes), 8, jax.devices()[: math.prod(sizes.values())]))


def test_parts_of_rows_attend_as_whole_rows_do():
    """Three blocks of queries in each part, a window, and more devices than key heads."""
    inputs = make_inputs(600)
    run = partial(windowed, size=250)
    ours = with_gradients(partial(run, layout=split_rows(tensor=4)), *inputs)
    for got, want in zip(ours, with_gradients(run, *inputs), strict=True):
        np.testing.assert_allclose(got, want, atol=2e-6 * np.abs(want).max())


@pytest.mark.parametrize("name", ["causal", "of_queries"])
def test_a_part_that_takes_itself_for_the_first_is_noticed(monkeypatch, name):
    right, inputs = getattr(blockwise_attention, name), make_inputs(60)
    wrong = {
        "causal": lambda context, *x: right(None, *x),
        "of_queries": lambda context, size, mask: first(size, mask),
    }
    monkeypatch.setattr(blockwise_attention, name, wrong[name])
    q, k, v, segments, _ = inputs
    got = jax.jit(partial(attention, layout=split_rows()))(q, k, v, segments)
    assert np.abs(got - expected(q, k, v, segments)).max() > 1e-3


def first(num_queries, mask):
    return jax.tree.map(lambda x: x[:, :num_queries], mask)


@pytest.mark.parametrize("S", [60, 300])
def test_gradients_equal_those_of_jaxs_own(S, form):
    inputs = make_inputs(S)
    for ours, theirs in zip(
        with_gradients(attention, *inputs), with_gradients(jaxs_own, *inputs), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, atol=1e-5 * np.abs(theirs).max())


@pytest.mark.parametrize("S, parts", [(300, 1), pytest.param(256, 2, marks=pytest.mark.slow)])
def test_splash_equals_the_blocks(S, parts):
    """On the interpreter of its TPU kernel, which wants heads of 64 at least."""
    layout = split_rows() if parts == 2 else None
    rng = np.random.default_rng(0)
    q, k, v, d = (rng.normal(size=(1, S, n, 64)).astype(np.float32) for n in (N, K, K, N))
    segments = np.sort(rng.integers(0, 3, (1, S)), axis=1).astype(np.int32)
    want = with_gradients(attention, q, k, v, segments, d)
    with pltpu.force_tpu_interpret_mode():
        run = partial(attention, implementation="splash", layout=layout)
        got = with_gradients(run, q, k, v, segments, d)
    for ours, theirs in zip(got, want, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5 * float(abs(theirs).max()))


@pytest.mark.parametrize(
    "has_window, S, parts", [(False, 61, 1), (True, 61, 1), (True, 64, 2), (False, 62, 2)]
)
def test_cudnn_equals_the_blocks_on_jaxs_plain_kernel(has_window, S, parts, monkeypatch):
    """Its padding, mask and residuals; the kernel itself needs a GPU."""
    plain = jax.nn.dot_product_attention

    def on_cpu(*x, implementation, **options):
        assert implementation == "cudnn"
        return plain(*x, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", on_cpu)
    inputs, layout = make_inputs(S, jnp.bfloat16), split_rows() if parts == 2 else None
    run = windowed if has_window else attention
    got = with_gradients(partial(run, implementation="cudnn", layout=layout), *inputs)
    for ours, theirs in zip(got, with_gradients(run, *inputs), strict=True):
        ours, theirs = (np.asarray(x, np.float32) for x in (ours, theirs))
        np.testing.assert_allclose(ours, theirs, atol=2e-2 * np.abs(theirs).max())  # of bfloat16


def test_a_block_that_sees_too_little_is_noticed(form, monkeypatch):
    for kernel, name in (blockwise_attention, "_block_logits"), (tiled_attention, "_bias"):
        right = getattr(kernel, name)
        monkeypatch.setattr(
            kernel, name, lambda *args, right=right: right(*args).at[..., 0].set(NEGATIVE)
        )
    q, k, v, segments, _ = make_inputs(300)
    got = jax.jit(lambda *x: attention(*x))(q, k, v, segments)
    assert np.abs(got - expected(q, k, v, segments)).max() > 1e-3


@pytest.mark.parametrize("size", [None, 64])
def test_keys_of_other_documents_and_before_the_window_are_not_read(size, monkeypatch):
    """What they are would be seen in a product with a weight of 0, as NaN."""
    monkeypatch.setattr(module, "num_cores", lambda: 2)
    q, k, v, segments, d = make_inputs(512)
    first = 1 if size is None else 2
    segments[:, :256], segments[:, 256:448], segments[:, 448:] = first, 2, 0  # padding last
    k[:, :256], v[:, :256] = np.nan, np.nan
    window = None if size is None else Window(positions_of(segments), np.int32(size))
    run = partial(attention, window=window)
    out, dq, *_ = with_gradients(run, q, k, v, segments, d)
    clean = slice(320, 384)  # queries of document 2 whose keys begin at 256
    assert np.isfinite(out[:, clean]).all() and np.isfinite(dq[:, clean]).all()
    assert np.isnan(out[:, :64]).all()


def test_bfloat16_stays_near_float32(form):
    inputs = make_inputs(300, jnp.bfloat16)
    q, k, v, segments, d = inputs
    wide = [np.asarray(x, np.float32) for x in (q, k, v)]
    exact = with_gradients(jaxs_own, *wide, segments, np.asarray(d, np.float32))
    ours, theirs = (with_gradients(run, *inputs) for run in (attention, jaxs_own))
    for got, peer, want in zip(ours, theirs, exact, strict=True):
        assert got.dtype == jnp.bfloat16
        got, peer, want = (np.asarray(x, np.float32) for x in (got, peer, want))
        # Three times: as in FlashAttention, sums of the gradient are taken of the rounded output.
        assert np.abs(got - want).max() < 3 * np.abs(peer - want).max()
        assert np.abs(got - want).max() < 1e-2 * np.abs(want).max()


def largest_array(run, *inputs):
    """Returns the elements of the largest array that a function and its gradient make."""
    program = jax.jit(lambda *x: with_gradients(run, *x)).lower(*inputs).as_text()
    shapes = re.findall(r"tensor<([0-9x]+)x(?:f32|i1|bf16)>", program)
    return max(math.prod(map(int, shape.split("x"))) for shape in shapes)


@pytest.mark.parametrize("dtype, stored", [(jnp.float32, "f32"), (jnp.bfloat16, "u16")])
def test_checkpointing_saves_the_output_and_the_softmax_under_their_name(dtype, stored, capsys):
    q, k, v, segments, _ = make_inputs(5)
    saves = jax.checkpoint_policies.save_only_these_names(SAVED_ATTENTION)
    run = jax.checkpoint(lambda q, k, v: attention(q, k, v, segments), policy=saves)
    print_saved_residuals(run, *(jnp.asarray(x, dtype) for x in (q, k, v)))
    lines = capsys.readouterr().out.splitlines()
    saved = [line.split()[0] for line in lines if f"named '{SAVED_ATTENTION}'" in line]
    assert saved == [f"{stored}[{B},5,{N},{H}]", f"f32[{B},{K},{N // K},5,1]"]


def test_no_array_of_all_queries_and_keys_exists(form):
    inputs = make_inputs(1024)
    every = B * N * 1024 * 1024
    assert largest_array(attention, *inputs) <= every / 8
    assert largest_array(jaxs_own, *inputs) >= every


@pytest.mark.parametrize("S", [60, 300])
def test_no_array_is_empty(S, form):
    """With one, XLA of jax 0.11 crashes where it compiles a shard_map that does not use it."""
    program = jax.jit(lambda *x: with_gradients(attention, *x)).lower(*make_inputs(S))
    assert not re.search(r"tensor<(\d+x)*0x", program.as_text())


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_products_and_their_gradients_equal_float64(dtype):
    rng = np.random.default_rng(1)
    x, weight, d = (
        rng.normal(size=shape).astype(np.float32) for shape in ((B, 9, 40), (30, 40), (B, 9, 30))
    )
    x, d = x.astype(dtype), d.astype(dtype)

    def both(x, weight):
        y, vjp = jax.vjp(lambda *a: project(*a, dtype), x, weight)
        return y, *vjp(d)

    y, dx, d_weight = jax.jit(both)(x, weight)
    assert (y.dtype, dx.dtype, d_weight.dtype) == (dtype, dtype, np.float32)
    x64, d64 = np.asarray(x, np.float64), np.asarray(d, np.float64)
    used = np.asarray(weight.astype(dtype), np.float64)
    rounding = 1e-6 if dtype == np.float32 else 2**-8
    np.testing.assert_allclose(y, x64 @ used.T, atol=rounding * 40)
    np.testing.assert_allclose(dx, d64 @ used, atol=rounding * 30)
    # The weight's gradient never is bfloat16.
    np.testing.assert_allclose(d_weight, np.einsum("bso,bsi->oi", d64, x64), rtol=1e-4, atol=1e-5)
