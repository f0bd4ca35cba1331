"""The hidden-state loss against float64 NumPy, and which layers leave the model."""

import dataclasses
from functools import cache
from typing import get_args, get_type_hints

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from kd_jax.config import HiddenConfig, LossConfig, UserError
from kd_jax.config.record import dump, from_json
from kd_jax.losses.hidden import KINDS, check_layers, hidden_loss, init_projection
from kd_jax.models.architecture import read_architecture
from kd_jax.models.decoder import Decoder
from kd_jax.models.weight_table import projection_weight, weights

PAIRS, B, S = 3, 2, 5
WIDTHS = [(6, 8), (8, 8)]
BOTH = pytest.mark.parametrize("kind", sorted(KINDS))


def rms(x):
    return np.sqrt((x * x).mean(-1, keepdims=True))


def reference(kind, student, teacher, projection, mask, student_rms=None):
    """Returns the summed loss in float64, from the definition."""
    student, teacher = np.asarray(student, np.float64), np.asarray(teacher, np.float64)
    total = 0.0
    for i in range(len(student)):
        size = rms(student[i]) if student_rms is None else student_rms[i]
        z, u = student[i] / size, teacher[i] / rms(teacher[i])
        if projection is not None:
            z = z @ np.asarray(projection[i], np.float64).T
        if kind == "mse":
            value = ((z - u) ** 2).mean(-1)
        else:
            lengths = np.linalg.norm(z, axis=-1) * np.linalg.norm(u, axis=-1)
            value = 1 - (z * u).sum(-1) / lengths
        total += value[mask].sum()
    return total / len(student)


def draw(widths=WIDTHS[0], seed=0):
    """Returns states with norms of very different sizes, a projection and a mask."""
    rng = np.random.default_rng(seed)
    size = np.array([0.02, 1.0, 50.0])[:, None, None, None]
    student, teacher = (size * rng.normal(size=(PAIRS, B, S, D)) for D in widths)
    projection = rng.normal(size=(PAIRS, widths[1], widths[0])) if widths[0] != widths[1] else None
    mask = rng.random((B, S)) < 0.6
    assert 0 < mask.sum() < mask.size
    return student, teacher, projection, mask


def float32(*arrays):
    return [None if x is None else jnp.asarray(x, jnp.float32) for x in arrays]


def derivative(function, x, direction, step=1e-5):
    """Returns the derivative along a direction by central differences, in float64."""
    return (function(x + step * direction) - function(x - step * direction)) / (2 * step)


@BOTH
@pytest.mark.parametrize("widths", WIDTHS, ids=str)
def test_value_and_gradients_equal_float64(kind, widths):
    student, teacher, projection, mask = draw(widths)
    arguments = (*float32(student, teacher, projection), jnp.asarray(mask))
    value, (d_student, d_projection) = jax.value_and_grad(hidden_loss, argnums=(1, 3))(
        kind, *arguments
    )
    # float32 rounds 1e-7 of each term; sums of a few dozen of them.
    np.testing.assert_allclose(value, reference(kind, student, teacher, projection, mask), 1e-6)
    rng = np.random.default_rng(7)
    for _ in range(4):
        direction = rng.normal(size=student.shape) * rms(student)
        want = derivative(
            lambda x: reference(kind, x, teacher, projection, mask), student, direction
        )
        assert np.sum(d_student * direction) == pytest.approx(want, rel=1e-5, abs=1e-6)
        if projection is not None:
            direction = rng.normal(size=projection.shape)
            want = derivative(
                lambda x: reference(kind, student, teacher, x, mask), projection, direction
            )
            assert np.sum(d_projection * direction) == pytest.approx(want, rel=1e-5, abs=1e-6)


def test_a_gradient_that_takes_the_norm_for_a_constant_is_seen():
    student, teacher, projection, mask = draw()
    got = jax.grad(hidden_loss, argnums=1)(
        "mse", *float32(student, teacher, projection), jnp.asarray(mask)
    )
    sizes = rms(student)

    def along(held):
        return derivative(
            lambda x: reference("mse", x, teacher, projection, mask, held), student, student
        )

    right, wrong = along(None), along(sizes)
    assert right == pytest.approx(0, abs=1e-6)  # states of another length are as good
    assert np.sum(got * student) == pytest.approx(right, abs=1e-5) and abs(wrong) > 0.1


@BOTH
def test_padding_contributes_nothing(kind):
    student, teacher, projection, mask = draw()
    run = jax.value_and_grad(hidden_loss, argnums=(1, 3))

    def gradients(noise):
        at = ~mask[None, :, :, None]
        noisy = float32(student + noise * at, teacher - noise * at, projection)
        return run(kind, *noisy, jnp.asarray(mask))

    want, got = gradients(0.0), gradients(3.0)
    for a, b in zip(jax.tree.leaves(want), jax.tree.leaves(got), strict=True):
        np.testing.assert_array_equal(a, b)
    assert not np.asarray(want[1][0])[:, ~mask].any()
    everywhere = run(kind, *float32(student, teacher, projection), jnp.ones_like(mask))
    assert abs(everywhere[0] - want[0]) > 0.1  # an ignored mask would be seen


@BOTH
def test_alike_is_zero_whatever_the_norms(kind):
    student, _, _, mask = draw((8, 8))
    loss = hidden_loss(kind, *float32(student, 30 * student), None, jnp.asarray(mask))
    assert abs(loss) < 1e-5
    twice = hidden_loss(kind, *float32(student, -student), None, jnp.asarray(mask))
    assert twice / mask.sum() == pytest.approx({"mse": 4, "cosine": 2}[kind], rel=1e-6)


def test_without_a_projection_the_mean_square_is_twice_the_cosine():
    student, teacher, _, mask = draw((8, 8))
    mse, cos = (
        float(hidden_loss(kind, *float32(student, teacher), None, jnp.asarray(mask)))
        for kind in ("mse", "cosine")
    )
    assert mse == pytest.approx(2 * cos, rel=1e-6)


def test_a_projection_that_explains_nothing_costs_one_and_one_that_explains_all_nothing():
    student, _, projection, _ = draw()
    teacher = np.einsum("iBSd,ied->iBSe", student / rms(student), projection)
    size = rms(teacher)[0, 0, 0, 0]
    one = (student[:1, :1, :1], teacher[:1, :1, :1] / size)
    here = jnp.ones((1, 1), bool)
    loss = hidden_loss("mse", *float32(*one, projection[:1] / size), here)
    assert abs(loss) < 1e-10
    assert hidden_loss("mse", *float32(*one, 0 * projection[:1]), here) == pytest.approx(1)


@BOTH
@pytest.mark.parametrize("size", [0.0, 1e-8, 1e15])
def test_extreme_states_are_finite(kind, size):
    student, teacher, projection, mask = draw()
    student, teacher = size * np.sign(student), size * np.sign(teacher)
    out = jax.value_and_grad(hidden_loss, argnums=(1, 3))(
        kind, *float32(student, teacher, projection), jnp.asarray(mask)
    )
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(out))


@BOTH
def test_bfloat16_states_are_compared_in_float32(kind):
    student, teacher, projection, mask = draw()
    student, teacher, projection = (
        x.astype(jnp.bfloat16) for x in float32(student, teacher, projection)
    )
    masters = projection.astype(jnp.float32)
    value, (d_student, d_projection) = jax.value_and_grad(hidden_loss, argnums=(1, 3))(
        kind, student, teacher, masters, jnp.asarray(mask)
    )
    # Of inputs without rounding nothing but float32 arithmetic follows.
    np.testing.assert_allclose(value, reference(kind, student, teacher, projection, mask), 1e-6)
    assert (value.dtype, d_projection.dtype) == (jnp.float32, jnp.float32)
    assert d_student.dtype == jnp.bfloat16


def test_choices_are_what_is_implemented():
    assert set(get_args(get_type_hints(HiddenConfig)["kind"])) == set(KINDS)


def make_model(depth=4, remat="none", dtype="float32", seed=0):
    arch = read_architecture(tiny.make_config(num_hidden_layers=depth), "tiny")
    rng = np.random.default_rng(seed)
    arrays = {
        path: jnp.asarray(rng.normal(size=w.shape) / w.shape[-1] ** 0.5, jnp.float32)
        for path, w in weights(arch).items()
    }
    return Decoder(tiny.make_spec(arch, dtype, remat=remat), arrays)


def make_inputs():
    rng = np.random.default_rng(1)
    tokens = jnp.asarray(rng.integers(0, 320, (B, S)), jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(S), (B, S))
    return tokens, positions, jnp.ones((B, S), jnp.int32)


@cache
def one_by_one(depth):
    """Returns each layer's output: what a model of only the layers up to it computes."""
    full, outputs = make_model(depth), []
    arrays = tiny.arrays_of(full)
    for count in range(1, depth + 1):
        part = {n: x[:count] if n.startswith("layers.") else x for n, x in arrays.items()}
        arch = dataclasses.replace(full.spec.arch, num_hidden_layers=count)
        model = Decoder(dataclasses.replace(full.spec, arch=arch), part)
        model.norm = lambda x: x
        outputs.append(np.asarray(model(*make_inputs())))
    return outputs


@pytest.mark.parametrize("layers", [(-1,), (3, 0), (2, 2, -4), (0, 1, 2, 3)], ids=str)
def test_chosen_layers_leave_the_model_in_the_order_asked_for(layers):
    model = make_model()
    hidden, kept = jax.jit(lambda m: m.with_layers(*make_inputs(), layers))(model)
    outputs = one_by_one(4)
    assert kept.shape == (len(layers), B, S, 64)
    for layer, got in zip(layers, kept, strict=True):
        # float32 through a few layers of which XLA orders sums differently
        np.testing.assert_allclose(got, outputs[layer], atol=1e-5)
        assert np.abs(got - outputs[(layer + 1) % 4]).max() > 0.1  # a layer off would be seen
    np.testing.assert_allclose(hidden, model(*make_inputs()), atol=1e-5)


def equations(jaxpr):
    """Yields the equations of a program and of the programs within it."""
    for eqn in jaxpr.eqns:
        yield eqn
        for value in eqn.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


def scan_outputs(jaxpr):
    """Returns the shapes of all that scans give whose last dimension is the model's width."""
    results = [v for eqn in equations(jaxpr) if eqn.primitive.name == "scan" for v in eqn.outvars]
    return [tuple(v.aval.shape) for v in results if v.aval.shape[-1:] == (64,)]


def gradient_program(remat, layers, depth=5):
    """Returns the program of a gradient that reaches the weights through the chosen layers."""
    model = make_model(depth, remat)

    def total(arrays):
        hidden, kept = Decoder(model.spec, arrays).with_layers(*make_inputs(), layers)
        return jnp.sum(hidden**2) + (0 if kept is None else jnp.sum(kept**3))

    return jax.make_jaxpr(jax.grad(total))(tiny.arrays_of(model)).jaxpr


@pytest.mark.parametrize("remat", ["none", "layer"])
def test_only_the_chosen_layers_leave_the_scan(remat):
    model = make_model(5, remat)
    whole = (5, B, S, 64)

    def forward(layers):
        program = jax.make_jaxpr(lambda m: m.with_layers(*make_inputs(), layers))(model).jaxpr
        return scan_outputs(program)

    assert whole not in forward((1, 4)) and (2, B, S, 64) in forward((1, 4))
    assert whole in forward((0, 1, 2, 3, 4))  # all of them would be seen
    # The residuals of the backward pass are the same as without them: no buffer per layer.
    plain, kept = (scan_outputs(gradient_program(remat, layers)) for layers in ((), (1, 4)))
    assert whole in plain and sorted(kept) == sorted(plain + [(2, B, S, 64)] * 2)


def test_the_program_is_of_one_size_for_every_depth_and_number_of_layers():
    def size(depth, layers):
        return len(list(equations(gradient_program("layer", layers, depth))))

    assert size(4, (3,)) == size(12, (1, 5, 7, 11))


ON = HiddenConfig(weight=0.5, student_layers=(0, -1), teacher_layers=(1, -1))


@pytest.mark.parametrize(
    "changes, names",
    [
        ({"hidden": dataclasses.replace(ON, weight=-1.0)}, ["hidden.weight"]),
        ({"hidden": dataclasses.replace(ON, weight=float("inf"))}, ["hidden.weight"]),
        ({"hidden": dataclasses.replace(ON, teacher_layers=(1,))}, ["hidden.teacher-layers"]),
        ({"hidden": HiddenConfig(weight=1.0)}, ["hidden.student-layers"]),
        ({"hidden": HiddenConfig(weight=1.0, teacher_layers=(1,))},
         ["hidden.student-layers", "hidden.teacher-layers"]),
        ({"hidden": ON, "teacher": None}, ["hidden.weight"]),
        ({"hidden": ON, "loss": LossConfig(kd_ratio=0.0)}, ["hidden.weight"]),
        ({"hidden": HiddenConfig(kind="l2", student_layers=(1.0,))},
         ["hidden.kind", "hidden.student-layers"]),
    ],
)  # fmt: skip
def test_all_problems_are_reported_at_once(changes, names):
    with pytest.raises(UserError) as caught:
        tiny.plain_config(**changes)
    assert sorted(line.split(":")[0] for line in str(caught.value).splitlines()) == names


def test_the_term_needs_weight_and_a_teacher_and_survives_json():
    assert tiny.plain_config(hidden=ON).compares_hidden
    assert not tiny.plain_config(hidden=dataclasses.replace(ON, weight=0.0)).compares_hidden
    assert from_json(dump(tiny.plain_config(hidden=ON))) == tiny.plain_config(hidden=ON)


def test_layers_that_do_not_exist_are_named_with_the_valid_range():
    student, teacher = (
        read_architecture(tiny.make_config(num_hidden_layers=depth), "tiny") for depth in (3, 5)
    )
    check_layers(ON, student, teacher)
    wrong = HiddenConfig(weight=1.0, student_layers=(0, 3, -4), teacher_layers=(4, -6, -5))
    with pytest.raises(UserError) as caught:
        check_layers(wrong, student, teacher)
    assert str(caught.value).splitlines() == [
        "hidden.student-layers: expected -3 to 2 (the student has 3 layers), got 3",
        "hidden.student-layers: expected -3 to 2 (the student has 3 layers), got -4",
        "hidden.teacher-layers: expected -5 to 4 (the teacher has 5 layers), got -6",
    ]
    with pytest.raises(UserError, match=r"^hidden\.teacher-layers"):  # of a student that is broken
        check_layers(wrong, None, teacher)


def test_widths_that_differ_have_a_projection_that_keeps_sizes():
    student, teacher = (
        read_architecture(tiny.make_config(hidden_size=width, head_dim=16), "tiny")
        for width in (64, 96)
    )
    weight = projection_weight(tiny.plain_config(hidden=ON), student, teacher)
    assert weight is not None and weight.shape == (2, 96, 64)
    assert projection_weight(tiny.plain_config(hidden=ON), student, student) is None
    assert projection_weight(tiny.plain_config(), student, teacher) is None
    value = init_projection((2, 500, 400), 3)
    out = value @ np.random.default_rng(0).normal(size=400).astype(np.float32)
    assert value.dtype == jnp.float32 and float(jnp.mean(out**2)) == pytest.approx(1, rel=0.2)
    assert (value != init_projection((2, 500, 400), 4)).any() and (value[0] != value[1]).any()
