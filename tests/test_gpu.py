"""Code paths specific to GPUs: their attention kernels, the head, whole steps.

On a GPU: JAX_PLATFORMS=cuda,cpu python -m pytest tests/test_gpu.py
"""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_attention import attention, jaxs_own, with_gradients
from test_fused_head import make_head, value_and_gradients
from tiny_run import STEPS, Run, assert_near

from kd_jax.losses.divergences import DIVERGENCES

GPUS = [device for device in jax.devices() if device.platform == "gpu"]
pytestmark = pytest.mark.skipif(not GPUS, reason="no GPU here")


def on_cpu():
    return jax.default_device(jax.devices("cpu")[0])


def make_attention_inputs(S, dtype):
    """Returns q, k, v (8 and 2 heads of 64), packed segments, and the output's gradient."""
    rng = np.random.default_rng(0)
    q, k, v, d = (rng.normal(size=(2, S, n, 64)).astype(dtype) for n in (8, 2, 2, 8))
    return q, k, v, np.sort(rng.integers(0, 4, (2, S)), axis=1).astype(np.int32), d


@pytest.fixture(params=["cudnn", "triton"])
def kernel(request):
    return request.param


@pytest.mark.parametrize("S", [1, 60, 129, 512])
def test_attention_is_as_near_float32_as_jaxs_own(kernel, S):
    *_, segments, d = inputs = make_attention_inputs(S, jnp.bfloat16)
    wide = [np.asarray(x, np.float32) for x in inputs[:3]]
    with on_cpu():
        exact = with_gradients(jaxs_own, *wide, segments, np.asarray(d, np.float32))
    ours = with_gradients(partial(attention, implementation=kernel), *inputs)
    theirs = with_gradients(jaxs_own, *inputs)
    for got, peer, want in zip(ours, theirs, exact, strict=True):
        got, peer, want = (np.asarray(x, np.float32) for x in (got, peer, want))
        assert np.abs(got - want).max() < 3 * np.abs(peer - want).max() + 1e-6
        assert np.abs(got - want).max() < 1e-2 * np.abs(want).max() + 1e-6


def test_attention_that_ignores_documents_is_noticed(kernel):
    q, k, v, segments, _ = make_attention_inputs(512, jnp.bfloat16)
    run = jax.jit(partial(attention, implementation=kernel))
    want, got = (np.asarray(run(q, k, v, x), np.float32) for x in (segments, 0 * segments))
    assert np.abs(got - want).max() > 0.1 * np.abs(want).max()


def test_attention_sees_a_shared_prompt_too(kernel):
    q, k, v, segments, _ = make_attention_inputs(512, jnp.bfloat16)
    documents = (segments, np.zeros_like(segments))
    got = jax.jit(partial(attention, implementation=kernel))(q, k, v, documents)
    with on_cpu():
        want = jax.jit(attention)(*(np.asarray(x, np.float32) for x in (q, k, v)), documents)
    got, want = (np.asarray(x, np.float32) for x in (got, want))
    assert np.abs(got - want).max() < 1e-2 * np.abs(want).max()


def make_head_inputs(vocab_size):
    """Returns kd_head's arrays: logits of standard deviation 3, the teacher's padded."""
    rng = np.random.default_rng(0)
    shapes = ((2, 12, 16), (2, 12, 24), (vocab_size, 16), (vocab_size + 24, 24))
    scales = (1, 1, 3 / 16**0.5, 3 / 24**0.5)
    arrays = (
        x * rng.normal(size=s).astype(np.float32) for x, s in zip(scales, shapes, strict=True)
    )
    return *arrays, rng.integers(0, vocab_size, (2, 12)), rng.random((2, 12)) < 0.7


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_the_head_equals_a_cpus(divergence, temperature):
    def run():
        config = make_head(True, divergence=divergence, temperature=temperature)
        config = replace(config, vocab_size=5000, chunk_tokens=7)
        return value_and_gradients(config, *make_head_inputs(5000))

    values, gradients = run()
    with on_cpu():
        want_values, want = run()
    for name, value in want_values.items():
        assert float(values[name]) == pytest.approx(float(value), rel=1e-5, abs=1e-5), name
    for got, expected in zip(gradients, want, strict=True):
        assert np.abs(got - expected).max() < 2e-5 * np.abs(expected).max()


@pytest.mark.parametrize("trainable", ["lora", "full"])
def test_gradients_equal_a_cpus_in_float32(make_config, trainable):
    config = make_config(trainable=trainable, mesh={"data": 1})
    one, other = (Run(config, [jax.devices(name)[0]]) for name in ("gpu", "cpu"))
    (got, metrics), (want, want_metrics) = (x.gradients(x.batch()) for x in (one, other))
    assert metrics["loss"] == pytest.approx(want_metrics["loss"], rel=1e-5)
    assert_near(got, want, 1e-4)


def in_bfloat16(config):
    half = {"dtype": "bfloat16"}
    return replace(
        config, teacher=replace(config.teacher, **half), student=replace(config.student, **half)
    )


@pytest.mark.parametrize("kernel", ["cudnn", "triton", "xla"], indirect=True)
@pytest.mark.parametrize("trainable", ["lora", "full"])
def test_a_run_repeats_itself_bit_for_bit(make_config, trainable, kernel):
    config = in_bfloat16(make_config(trainable=trainable, mesh={"data": 1}))
    config = replace(config, attention=kernel)
    run = Run(config, GPUS[:1])
    start, batch, ends = run.state, run.batch(), []
    for _ in range(3):
        run.state = start
        losses = [run.step(batch)["loss"] for _ in range(STEPS)]
        ends.append([np.asarray(losses), *map(np.asarray, run.state.trainable.values())])
    for other in ends[1:]:
        for one, two in zip(ends[0], other, strict=True):
            np.testing.assert_array_equal(one, two)


def test_bfloat16_trains_as_float32_does(make_config, kernel):
    config, losses = make_config(mesh={"data": 1}), []
    for changed in (replace(in_bfloat16(config), attention=kernel), config):
        run = Run(changed, GPUS[:1])
        losses.append([run.step(run.batch(seed))["loss"] for seed in range(STEPS)])
    np.testing.assert_allclose(*losses, rtol=2e-2)
