"""The fused head and the losses against float64 NumPy, and torchtune's published values."""

import dataclasses
import re
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import tiny
from jax.sharding import NamedSharding, PartitionSpec

from kd_jax.config import LossConfig, MeshConfig
from kd_jax.losses import chunks, softmax
from kd_jax.losses.fused_head import kd_head, token_metrics
from kd_jax.losses.head_inputs import NUM_GROUPS, HeadConfig, Student, Targets
from kd_jax.losses.token_loss import (
    EVAL_METRICS,
    METRICS,
    SINGLE_EVAL_METRICS,
    SINGLE_METRICS,
    LossScalars,
    static_temperature,
)
from kd_jax.losses.vocabulary import Vocab, _plain_sums, sum_over_vocab, top_k
from kd_jax.parallel.mesh import compiler_options, make_mesh
from kd_jax.parallel.platforms import PLATFORMS
from kd_jax.teachers.live import HiddenStates

pytestmark = pytest.mark.devices(8)

B, S, DS, DT, V = 4, 10, 8, 12, 50  # context divides S


def make_head(head_trainable=False, **loss):
    """Returns a head on one device; `loss` are fields of its LossConfig."""
    loss = LossConfig(**{"kd_ratio": 0.4, **loss})
    sizes = {"chunk_tokens": 4, "vocab_size": V, "mesh": tiny.one_device()}
    return HeadConfig(loss=loss, head_trainable=head_trainable, **sizes)


def scalars_of(config):
    return LossScalars(*map(np.float32, (config.loss.kd_ratio, config.loss.temperature)))


def make_inputs(seed=0, dtype=np.float32, student_vocab=V, teacher_vocab=V):
    """Returns hidden states, heads, labels and mask; logits deviate by 3, one row has no loss."""
    rng = np.random.default_rng(seed)
    inputs = (
        rng.normal(size=(B, S, DS)),
        rng.normal(size=(B, S, DT)),
        rng.normal(size=(student_vocab, DS)) * 3 / DS**0.5,
        rng.normal(size=(teacher_vocab, DT)) * 3 / DT**0.5,
    )
    mask = rng.random((B, S)) < 0.6
    mask[1] = False
    return (*(x.astype(dtype) for x in inputs), rng.integers(0, V, (B, S)), mask)


def sides(hidden, teacher_hidden, head, teacher_head, labels, mask):
    """Returns kd_head's student, teacher and targets."""
    teacher = None if teacher_hidden is None else HiddenStates(teacher_hidden, teacher_head)
    return Student(hidden, head), teacher, Targets(labels, mask)


@pytest.fixture(params=["_sums", "_sums_in_one_pass"])
def both_softmaxes(request, monkeypatch):
    """Runs a test with a CPU's and with a GPU's way of making softmaxes."""
    monkeypatch.setattr(softmax, "_sums", getattr(softmax, request.param))
    jax.clear_caches()
    yield
    jax.clear_caches()


@partial(jax.jit, static_argnums=0)
def value_and_gradients(config, *inputs):
    """Returns loss, metrics and the gradients in the student's hidden states and head."""
    scalars = scalars_of(config)

    def loss(hidden, head):
        return kd_head(config, scalars, *sides(hidden, inputs[1], head, *inputs[3:]))

    run = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    (value, metrics), gradients = run(inputs[0], inputs[2])
    return {"loss": value, **metrics}, gradients


def expected(config, *inputs):
    """Returns what float64 NumPy says of the same arrays."""
    h_s, h_t, w_s, w_t = (np.asarray(x, np.float64) for x in inputs[:4])
    logits = (h_s @ w_s[:V].T, h_t @ w_t[:V].T)
    options = {"kd_ratio": config.loss.kd_ratio, "temperature": config.loss.temperature}
    return reference.distil(*logits, *inputs[4:], **options)


def numerical_gradients(config, inputs):
    """Returns the gradients in the student's hidden states and head, in float64.

    Those in the logits are central differences; the rest is the chain rule.
    """
    h_s, h_t, w_s, w_t = (np.asarray(x, np.float64) for x in inputs[:4])
    z_s, z_t, ratio = h_s @ w_s[:V].T, h_t @ w_t[:V].T, config.loss.kd_ratio

    def loss(z):
        ce = -np.take_along_axis(reference.log_softmax(z), inputs[4][..., None], -1)[..., 0]
        kl = reference.divergence("forward_kl", z, z_t, temperature=config.loss.temperature)
        return (1 - ratio) * ce + ratio * kl

    steps = 1e-5 * np.eye(V)
    slopes = np.stack([(loss(z_s + step) - loss(z_s - step)) / 2e-5 for step in steps], axis=-1)
    slopes *= inputs[5][..., None]
    return slopes @ w_s[:V], np.einsum("BSV,BSD->VD", slopes, h_s)


def close(got, want, tolerance):
    """Compares relative to the largest entry."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert np.abs(got - want).max() <= tolerance * max(np.abs(want).max(), 1e-30)


@pytest.mark.usefixtures("both_softmaxes")
@pytest.mark.parametrize("kd_ratio, temperature", [(0.4, 1.0), (0.4, 2.5), (1.0, 2.5)])
def test_value_metrics_and_gradients_equal_float64(kd_ratio, temperature):
    config = make_head(kd_ratio=kd_ratio, temperature=temperature, head_trainable=True)
    inputs = make_inputs()
    want = expected(config, *inputs)
    values, gradients = value_and_gradients(config, *inputs)
    assert values.keys() == {"loss", *METRICS}
    for name, value in values.items():
        assert float(value) == pytest.approx(want[name], rel=1e-6), name
    for ours, theirs in zip(gradients, numerical_gradients(config, inputs), strict=True):
        close(ours, theirs, 1e-5)


def test_values_without_a_gradient_are_the_same():
    inputs, run = make_inputs(), jax.jit(kd_head, static_argnums=0)
    loss, metrics = run(make_head(), scalars_of(make_head()), *sides(*inputs))
    want, _ = value_and_gradients(make_head(), *inputs)
    for name, value in ({"loss": loss} | metrics).items():
        assert float(value) == pytest.approx(float(want[name]), rel=1e-6), name


def test_bfloat16_inputs_stay_near_float64():
    config = make_head(head_trainable=True)
    inputs = make_inputs(dtype=jnp.bfloat16)
    values, (d_hidden, d_head) = value_and_gradients(config, *inputs)
    assert values["loss"].dtype == np.float32 and d_hidden.dtype == jnp.bfloat16
    assert float(values["loss"]) == pytest.approx(expected(config, *inputs)["loss"], rel=1e-5)
    for ours, theirs in zip((d_hidden, d_head), numerical_gradients(config, inputs), strict=True):
        close(ours, theirs, 1e-2)


def token_values(config, *inputs):
    run = jax.jit(token_metrics, static_argnums=0)
    out = run(config, scalars_of(config), *sides(*inputs))
    return {n: np.asarray(x) for n, x in out.items()}


def expected_tokens(config, *inputs):
    """Returns each token's metrics in float64 NumPy, of the same arrays; 0 where masked."""
    h_s, h_t, w_s, w_t = (np.asarray(x, np.float64) for x in inputs[:4])
    z_s, z_t = h_s @ w_s[:V].T, h_t @ w_t[:V].T
    values = reference.evaluate(z_s, z_t, inputs[4], top_k=config.top_k)
    values["kd_loss"] = reference.kl(
        *(reference.log_softmax(z / config.loss.temperature) for z in (z_t, z_s))
    )
    ratio = config.loss.kd_ratio
    values["loss"] = (1 - ratio) * values["ce"] + ratio * values["kd_loss"]
    return {name: value * inputs[5] for name, value in values.items()}


@pytest.mark.usefixtures("both_softmaxes")
@pytest.mark.parametrize("length, sizes", [(4, (V + 7, V)), (64, (V + 3, V + 9))])
def test_each_tokens_metrics_equal_float64(length, sizes):
    config = dataclasses.replace(make_head(temperature=2.0), chunk_tokens=length, top_k=3)
    inputs = make_inputs(student_vocab=sizes[0], teacher_vocab=sizes[1])
    inputs[1][:, :, :DS], inputs[3][:V, :DS] = inputs[0], inputs[2][:V]  # models akin
    for row, model in ((0, 0), (2, 1)):  # where the one model or the other is right
        inputs[4][row] = (inputs[model][row] @ inputs[2 + model][:V].T).argmax(-1)
    got = token_values(config, *inputs)
    want = expected_tokens(config, *inputs)
    assert got.keys() == want.keys() == {*EVAL_METRICS, "topk_overlap"}
    for name, value in want.items():
        assert got[name].dtype == np.float32, name
        np.testing.assert_allclose(got[name], value, rtol=2e-5, atol=2e-6, err_msg=name)
    for name in ("correct", "teacher_correct", "top1_agreement", "topk_overlap"):
        assert 0 < want[name].sum() < inputs[5].sum(), name  # both outcomes were compared


def test_each_tokens_metrics_without_a_teacher_are_those_of_the_student():
    config = dataclasses.replace(make_head(), top_k=3)
    hidden, _, head, _, labels, mask = make_inputs()
    got = token_values(config, hidden, None, head, None, labels, mask)
    both = token_values(config, *make_inputs())
    assert got.keys() == set(SINGLE_EVAL_METRICS)
    np.testing.assert_array_equal(got["loss"], got["ce"])
    for name in SINGLE_EVAL_METRICS[1:]:
        np.testing.assert_allclose(got[name], both[name], rtol=1e-6, atol=1e-7, err_msg=name)


def test_the_overlap_is_measured_only_where_a_k_is_given():
    assert "topk_overlap" not in token_values(make_head(), *make_inputs())


@pytest.mark.parametrize("length, platform", [(1, "cpu"), (3, "gpu"), (3, "tpu"), (64, "cpu")])
def test_chunks_change_nothing(monkeypatch, length, platform):
    monkeypatch.setattr(chunks, "traits", lambda mesh: PLATFORMS[platform])
    one = dataclasses.replace(make_head(head_trainable=True), chunk_tokens=S)
    inputs = make_inputs()
    want, want_gradients = value_and_gradients(one, *inputs)
    got, gradients = value_and_gradients(dataclasses.replace(one, chunk_tokens=length), *inputs)
    for name, value in want.items():
        assert float(got[name]) == pytest.approx(float(value), rel=1e-6), name
    for ours, theirs in zip(gradients, want_gradients, strict=True):
        close(ours, theirs, 1e-6)


def test_a_masked_token_contributes_nothing():
    inputs = make_inputs()
    wild = [x.copy() for x in inputs]
    mask = inputs[5]
    wild[0][~mask], wild[1][~mask], wild[4][~mask] = 1e4, -1e4, 3
    want, (d_want, _) = value_and_gradients(make_head(), *inputs)
    got, (d_got, _) = value_and_gradients(make_head(), *wild)
    assert {n: float(x) for n, x in got.items()} == {n: float(x) for n, x in want.items()}
    np.testing.assert_array_equal(d_got, d_want)
    assert (np.asarray(d_got)[~mask] == 0).all() and (np.asarray(d_got)[mask] != 0).any()


def test_rows_without_any_loss_give_zero():
    config = make_head(head_trainable=True)
    inputs = (*make_inputs()[:5], np.zeros((B, S), bool))
    values, gradients = value_and_gradients(config, *inputs)
    assert all(float(value) == 0 for value in values.values())
    assert all((np.asarray(gradient) == 0).all() for gradient in gradients)


@pytest.mark.parametrize("sizes", [(V, V + 7), (V + 7, V), (V + 3, V + 9)])
def test_padded_vocabulary_entries_are_absent(sizes):
    config = make_head(head_trainable=True)
    inputs = make_inputs(student_vocab=sizes[0], teacher_vocab=sizes[1])
    values, (d_hidden, d_head) = value_and_gradients(config, *inputs)
    assert float(values["loss"]) == pytest.approx(expected(config, *inputs)["loss"], rel=1e-6)
    assert float(values["kd_loss"]) == pytest.approx(expected(config, *inputs)["kd_loss"], rel=1e-6)
    close(d_hidden, numerical_gradients(config, inputs)[0], 1e-5)
    assert d_head.shape == inputs[2].shape and (np.asarray(d_head)[V:] == 0).all()


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_a_temperature_that_is_traced_is_the_same(temperature):
    config = make_head(temperature=temperature)
    traced = make_head(temperature=temperature, temperature_end=9.0, schedule="linear")
    assert static_temperature(traced.loss) is None
    want, (d_want, _) = value_and_gradients(config, *make_inputs())
    got, (d_got, _) = value_and_gradients(traced, *make_inputs())
    for name, value in want.items():
        assert float(got[name]) == pytest.approx(float(value), rel=1e-6), name
    close(d_got, d_want, 1e-6)


def test_the_divergence_of_equal_models_is_zero():
    inputs = make_inputs()
    inputs = (inputs[0], inputs[0], inputs[2], inputs[2], *inputs[4:])
    config = make_head(kd_ratio=1.0)
    values, (d_hidden, _) = value_and_gradients(config, *inputs)
    assert float(values["loss"]) == 0 and (np.asarray(d_hidden) == 0).all()
    assert float(values["top1_agreement"]) == inputs[5].sum()


@pytest.mark.usefixtures("both_softmaxes")
def test_extreme_logits_stay_finite():
    inputs = make_inputs()
    for scale in (1e4, 1e-4):
        big = (inputs[0] * scale, -inputs[1] * scale, *inputs[2:])
        values, (d_hidden, _) = value_and_gradients(make_head(), *big)
        assert all(np.isfinite(float(value)) for value in values.values())
        assert np.isfinite(d_hidden).all()


def test_without_a_teacher_the_loss_is_cross_entropy():
    config = make_head(kd_ratio=0.0)
    hidden, _, head, _, labels, mask = make_inputs()
    values, (d_hidden, _) = value_and_gradients(config, hidden, None, head, None, labels, mask)
    both, (d_both, _) = value_and_gradients(config, *make_inputs())
    assert values.keys() == {"loss", *SINGLE_METRICS}
    assert float(values["loss"]) == pytest.approx(float(both["loss"]), rel=1e-6)
    close(d_hidden, d_both, 1e-6)


@pytest.mark.fast
@pytest.mark.parametrize(
    "both_softmaxes, sizes",
    [
        pytest.param("_sums", (2, 4, 1, 1), marks=pytest.mark.slow),
        ("_sums", (1, 2, 2, 2)),
        ("_sums_in_one_pass", (2, 2, 1, 2)),
    ],
    indirect=["both_softmaxes"],
)
def test_devices_change_nothing(both_softmaxes, sizes):
    config = make_head(head_trainable=True)
    data, fsdp, context, tensor = sizes
    mesh = make_mesh(MeshConfig(data=data, fsdp=fsdp, context=context, tensor=tensor), 2 * B)
    inputs = [np.concatenate([x, x[::-1]]) for x in make_inputs()]
    inputs[2], inputs[3] = make_inputs()[2:4]  # the heads are no rows
    want, want_gradients = value_and_gradients(config, *inputs)
    rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    whole = NamedSharding(mesh, PartitionSpec())
    placed = [jax.device_put(x, whole if i in (2, 3) else rows) for i, x in enumerate(inputs)]
    sharded = dataclasses.replace(config, mesh=mesh)
    got, gradients = value_and_gradients(sharded, *placed)
    for name, value in want.items():
        assert float(got[name]) == pytest.approx(float(value), rel=1e-6), name
    for ours, theirs in zip(gradients, want_gradients, strict=True):
        close(ours, theirs, 1e-6)
    config, sharded = (dataclasses.replace(x, top_k=3) for x in (config, sharded))
    alone = token_values(config, *inputs)
    for name, value in token_values(sharded, *placed).items():
        np.testing.assert_allclose(value, alone[name], rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("sizes", [None, (2, 2, 2)])
def test_a_sampled_token_has_the_divergence_alone_and_sums_of_its_own(sizes):
    config = dataclasses.replace(make_head(temperature=2.0), head_trainable=True)
    inputs = [np.concatenate([x, x[::-1]]) for x in make_inputs()]
    inputs[2], inputs[3] = make_inputs()[2:4]
    group = np.random.default_rng(1).integers(0, 4, inputs[5].shape, np.int32)
    mask, sampled = inputs[5], group > 0
    if sizes is not None:
        mesh = make_mesh(MeshConfig(data=sizes[0], fsdp=sizes[1], tensor=sizes[2]), 2 * B)
        config = dataclasses.replace(config, mesh=mesh)

    def loss(hidden, head):
        student, teacher, targets = sides(hidden, inputs[1], head, *inputs[3:])
        targets = targets._replace(group=group)
        return kd_head(config, scalars_of(config), student, teacher, targets)

    run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    (value, metrics), gradients = run(inputs[0], inputs[2])
    alone = dataclasses.replace(config, loss=dataclasses.replace(config.loss, kd_ratio=1.0))
    parts = [
        (config, mask & ~sampled),
        *((alone, mask & (group == number)) for number in range(1, NUM_GROUPS)),
    ]
    each = [expected(one, *inputs[:5], part) for one, part in parts]
    assert float(value) == pytest.approx(sum(x["loss"] for x in each), rel=1e-6)
    for name, sums in metrics.items():
        assert sums.shape == (NUM_GROUPS,)
        want = [x[name] for x in each]
        np.testing.assert_allclose(sums, want, rtol=1e-5, atol=1e-5, err_msg=name)
    plain = dataclasses.replace(config, mesh=tiny.one_device())
    data, drawn = (
        value_and_gradients(one, *inputs[:5], part)[1]
        for one, part in (
            (plain, mask & ~sampled),
            (dataclasses.replace(alone, mesh=tiny.one_device()), mask & sampled),
        )
    )
    for ours, *theirs in zip(gradients, data, drawn, strict=True):
        close(ours, sum(map(np.asarray, theirs)), 1e-5)


class Table(NamedTuple):
    """A kind of teacher without an lm_head: stored logits, looked up by vocabulary id."""

    rows: dict[str, Any]
    vocab_arrays: Any

    @property
    def num_entries(self):
        return len(self.vocab_arrays)

    @staticmethod
    def logits(rows, vocab_arrays, context):
        return jnp.take(rows["high"], vocab_arrays, axis=1) + rows["low"][:, None]


@pytest.mark.parametrize("sizes, shift", [(None, 0), (None, 1), ((2, 2, 2), 0)])
def test_another_kind_of_teacher_needs_nothing_of_the_head(sizes, shift):
    inputs = [np.concatenate([x, x[::-1]]) for x in make_inputs()]
    inputs[2], inputs[3] = make_inputs(student_vocab=V + 6, teacher_vocab=V + 2)[2:4]
    config = make_head()
    if sizes is not None:
        mesh = make_mesh(MeshConfig(data=sizes[0], fsdp=sizes[1], tensor=sizes[2]), 2 * B)
        config = dataclasses.replace(make_head(), mesh=mesh)
    student, live, targets = sides(*inputs)
    z = jnp.einsum("BSD,VD->BSV", live.hidden, live.head)
    low = jnp.mean(z, axis=-1)
    ids = (jnp.arange(V + 2) + shift) % (V + 2)
    table = Table({"high": z - low[..., None], "low": low}, ids)
    run = jax.jit(kd_head, static_argnums=0)
    (want, _), (got, _) = (
        run(config, scalars_of(config), student, teacher, targets) for teacher in (live, table)
    )
    assert (float(got) == pytest.approx(float(want), rel=1e-6)) == (shift == 0)


def test_the_teacher_gets_no_gradient():
    student, teacher, targets = sides(*make_inputs())

    def loss(student, teacher):
        return kd_head(make_head(), scalars_of(make_head()), student, teacher, targets)[0]

    d_student, d_teacher = jax.jit(jax.grad(loss, argnums=(0, 1)))(student, teacher)
    assert np.asarray(d_student.hidden).any()
    assert not any(np.asarray(x).any() for x in (d_student.head, *d_teacher))


def loop_bodies(program):
    """Yields the text of each while loop's body in a compiled program, with what it calls."""
    parts = dict(re.findall(r"^(?:ENTRY )?(%[\w.-]+) \(.*?\{\n(.*?)^\}", program, re.M | re.S))
    for body in re.findall(r"body=(%[\w.-]+)", program):
        seen, waiting = set(), [body]
        while waiting:
            name = waiting.pop()
            if name not in seen:
                seen.add(name)
                waiting += [called for called in parts if f"{called}," in parts[name]]
        yield "".join(parts[name] for name in seen)


@pytest.mark.fast
def test_devices_say_nothing_to_each_other_between_chunks():
    config = dataclasses.replace(make_head(head_trainable=True), chunk_tokens=2)
    mesh = make_mesh(MeshConfig(data=2, fsdp=4), 2 * B)
    config = dataclasses.replace(config, mesh=mesh)
    inputs = [np.concatenate([x, x[::-1]]) for x in make_inputs()]
    inputs[2], inputs[3] = make_inputs()[2:4]
    rows, whole = (NamedSharding(mesh, PartitionSpec(x)) for x in (("data", "fsdp"), None))
    placed = [jax.device_put(x, whole if i in (2, 3) else rows) for i, x in enumerate(inputs)]
    program = value_and_gradients.lower(config, *placed).compile().as_text()
    collectives = re.compile("all-(reduce|gather|to-all)|reduce-scatter|collective-permute")
    bodies = list(loop_bodies(program))
    assert collectives.search(program) and any("dot" in body for body in bodies)
    assert not any(collectives.search(body) for body in bodies)


# torchtune's own test inputs (bfloat16, [2, 4, 4]) and what it expects of them.
STUDENT = [
    [[1.1250, -0.4102, -0.0879, -2.5000], [0.2676, 0.3535, 0.8711, -1.4688],
     [-0.1084, 1.6641, 0.0084, 0.1196], [0.5000, -0.6406, -0.2236, -1.5938]],
    [[-1.5312, -1.9219, 0.0000, -0.5039], [-1.5391, 1.5312, 0.5820, 0.2695],
     [-0.3887, 1.2188, 0.0000, 0.6055], [0.5000, 1.3828, 0.1309, -1.0312]],
]  # fmt: skip
TEACHER = [
    [[-0.0381, -1.2578, -1.2031, 0.0947], [-0.7852, 0.4492, 1.5547, 0.0972],
     [0.8203, 0.0012, 0.7656, 0.3477], [-1.5781, 0.4297, 0.5977, 0.3926]],
    [[1.5156, 0.1641, 2.0781, -0.7734], [-0.5898, 0.4453, -0.7969, 0.6328],
     [0.6289, -0.8359, 0.9258, 0.2109], [0.0006, 0.5195, 3.2344, -1.5781]],
]  # fmt: skip
LABELS = [[0, 3, 3, 1], [1, 1, 1, 1]]


def test_torchtunes_values_are_reached():
    student, teacher = (np.asarray(x, jnp.bfloat16).astype(np.float32) for x in (STUDENT, TEACHER))
    eye = np.eye(4, dtype=np.float32)  # the hidden states are the logits
    config = dataclasses.replace(make_head(kd_ratio=0.5), chunk_tokens=2, vocab_size=4)
    arrays = (student, teacher, eye, eye, np.array(LABELS), np.ones((2, 4), bool))
    _, sums = jax.jit(kd_head, static_argnums=0)(config, scalars_of(config), *sides(*arrays))
    means = {name: float(value) / 8 for name, value in sums.items()}
    assert means["kd_loss"] + means["teacher_entropy"] == pytest.approx(1.7208780, abs=1e-6)
    reverse = token_values(config, *arrays)["kl_reverse"]
    assert reverse.mean() == pytest.approx(0.6774863, abs=1e-6)
    assert means["teacher_entropy"] == pytest.approx(1.0915937, abs=1e-6)
    assert means["ce_loss"] == pytest.approx(1.4755845, abs=1e-6)


# Sums of one kind, of a mixture, with a weight found by a search, of powers, and of both kinds.
OF_EACH_KIND = ("forward_kl", "jsd", "adaptive_kl", "alpha_beta", "lk_hybrid")


@pytest.mark.parametrize(
    "divergence, dtype", [*((name, jnp.bfloat16) for name in OF_EACH_KIND), ("jsd", jnp.float32)]
)
def test_four_logits_of_a_chunk_are_all_that_is_stored(divergence, dtype):
    config = dataclasses.replace(make_head(divergence=divergence), chunk_tokens=64, vocab_size=8000)
    shapes = [(2, 128, DS), (2, 128, DT), (8000, DS), (8000, DT)]
    arrays = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
    arrays += [jax.ShapeDtypeStruct((2, 128), kind) for kind in (jnp.int32, jnp.bool)]
    mesh = make_mesh(MeshConfig(data=8), 8)
    run = jax.jit(
        lambda *x: value_and_gradients(config, *x), compiler_options=compiler_options(mesh)
    )
    memory = run.lower(*arrays).compile().memory_analysis()
    logits = 64 * 8000 * 4  # bytes of a chunk's, beside which the hidden states are small
    assert memory.temp_size_in_bytes <= 4.1 * logits


def test_hidden_states_are_not_copied():
    """What is stored grows with the tokens by the student's gradient alone."""

    def stored(tokens):
        config = dataclasses.replace(make_head(), chunk_tokens=16, vocab_size=64)
        shapes = [(1, tokens, 128), (1, tokens, 512), (64, 128), (64, 512)]
        arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
        arrays += [jax.ShapeDtypeStruct((1, tokens), kind) for kind in (jnp.int32, jnp.bool)]
        run = jax.jit(partial(value_and_gradients, config))
        return run.lower(*arrays).compile().memory_analysis().temp_size_in_bytes

    gradient = (4096 - 1024) * 128 * 4
    assert stored(4096) - stored(1024) < 1.2 * gradient


@pytest.mark.parametrize("size", [49_152, 128_256, 151_936])
def test_a_long_tail_counts_beside_one_likely_token(size):
    """Each term of the tail is less than half an ulp of the first."""
    terms = np.random.default_rng(0).uniform(0, 4e-8, (1, size)).astype(np.float32)
    terms[0, 0] = 1.0
    want = terms.astype(np.float64).sum()

    def error(function):
        run = jax.jit(function, compiler_options=compiler_options(make_mesh(MeshConfig(), 8)))
        return abs(run((terms, terms))[0].item() / want - 1)

    assert error(sum_over_vocab) < 1e-5
    assert error(_plain_sums) > 2e-5  # the test can fail


@pytest.mark.parametrize("size", [300, 1024, 2048])
def test_the_largest_entries_are_those_of_a_whole_search(size):
    """Logits with many equal ones, of which the first come first."""
    logits = np.random.default_rng(size).integers(0, size // 8, (7, size)).astype(np.float32)
    got = top_k(jnp.asarray(logits), 3, Vocab(jnp.arange(size)))
    np.testing.assert_array_equal(got, np.argsort(-logits, axis=1, kind="stable")[:, :3])
