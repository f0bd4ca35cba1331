"""Every divergence against float64 NumPy, published implementations, and what must hold of it."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import published
import pytest
import reference
import tiny

from kd_jax.config import LossConfig
from kd_jax.losses import divergences, token_loss
from kd_jax.losses.fused_head import kd_head
from kd_jax.losses.head_inputs import HeadConfig, Student, Targets
from kd_jax.losses.token_loss import LossScalars, agreement_terms
from kd_jax.losses.token_weights import adaptive_weight, token_weight
from kd_jax.losses.vocabulary import sum_over_vocab
from kd_jax.teachers.live import HiddenStates

N, V = 5, 40
CASES = [
    {"divergence": "forward_kl"},
    {"divergence": "reverse_kl"},
    {"divergence": "symmetric_kl", "symmetric_weight": 0.3},
    *({"divergence": "jsd", "jsd_beta": beta} for beta in (0.0, 0.1, 0.5, 0.9, 1.0)),
    *({"divergence": "jsd_cross", "jsd_beta": beta} for beta in (0.0, 0.2, 0.5, 0.97, 1.0)),
    *({"divergence": "skew_forward_kl", "skew_alpha": alpha} for alpha in (0.0, 0.1, 0.7)),
    *({"divergence": "skew_reverse_kl", "skew_alpha": alpha} for alpha in (0.0, 0.1, 0.7)),
    {"divergence": "tvd"},
    {"divergence": "nla"},
    {"divergence": "lk_hybrid"},
    *({"divergence": "adaptive_kl", "akl_mass": mass} for mass in (0.5, 0.9)),
    *(
        {"divergence": "alpha_beta", "ab_alpha": alpha, "ab_beta": beta}
        for alpha, beta in [
            (0.2, 0.7), (1.0, 0.0), (0.0, 1.0), (0.5, 0.0), (0.0, 0.5), (0.0, 0.0),
            (0.5, -0.5), (-0.5, 0.5), (1.0, 1.0), (1.5, -0.5), (-0.3, 1.0),
        ]
    ),
]  # fmt: skip


def name_of(case):
    return " ".join(str(value) for value in case.values())


every_case = pytest.mark.parametrize("case", CASES, ids=name_of)


def make_logits(seed=0, num_tokens=N, size=V, deviation=2.5):
    """Returns the student's and the teacher's logits, float32, which agree in part."""
    rng = np.random.default_rng(seed)
    shared = rng.normal(size=(num_tokens, size))
    logits = (0.6 * shared + 0.8 * rng.normal(size=(num_tokens, size)) for _ in range(2))
    return tuple((deviation * z).astype(np.float32) for z in logits)


def divergence(log_q, log_p, config):
    """Returns the divergence, [...], and its gradient in the logits at temperature 1, [..., V]."""
    weight = token_weight(log_q, log_p, config)
    terms = divergences.divergence_terms(log_q, log_p, config, weight)
    sums = sum_over_vocab(terms)
    return sums.value[..., 0], terms.grad_log_q - jnp.exp(log_q) * sums.grad_log_q


def of_logits(config, temperature, student, teacher):
    """Returns the divergence and its gradient in the student's logits, [N] and [N, V]."""
    value, gradient = divergence(
        *(jax.nn.log_softmax(z / temperature) for z in (student, teacher)), config
    )
    return value, gradient / temperature


compiled = jax.jit(of_logits, static_argnums=(0, 1))


def run(case, student, teacher, temperature=1.0, padding=0, of=compiled):
    """Returns each token's divergence [N] and its gradient in the student's logits [N, V]."""
    wide = [(0, 0), (0, padding)]
    logits = (np.pad(z, wide, constant_values=divergences.NEGATIVE) for z in (student, teacher))
    value, gradient = of(LossConfig(**case), temperature, *logits)
    assert value.dtype == gradient.dtype == np.float32
    assert (np.asarray(gradient)[:, student.shape[1] :] == 0).all()
    return np.asarray(value), np.asarray(gradient)[:, : student.shape[1]]


def options_of(case):
    options = {name: value for name, value in case.items() if name != "divergence"}
    return {**options, "name": case["divergence"]}


def weight_of(case, student, teacher, temperature):
    """Returns the weight of the forward KL, which is constant in the gradient, if there is one."""
    q, p = (np.exp(reference.log_softmax(np.float64(z) / temperature)) for z in (student, teacher))
    if case["divergence"] == "adaptive_kl":
        return {"weight": reference.adaptive_weight(q, p, case["akl_mass"])}
    return {"weight": reference.hybrid_weight(q, p)} if case["divergence"] == "lk_hybrid" else {}


def expected(case, student, teacher, temperature=1.0):
    """Returns the same from the definitions, the gradient by central differences."""
    options = {**options_of(case), "temperature": temperature}
    options |= weight_of(case, student, teacher, temperature)
    student, gradient = np.float64(student), np.zeros(student.shape)
    for v in range(student.shape[1]):
        step = 1e-5 * (np.arange(student.shape[1]) == v)
        above, below = (
            reference.divergence(student=student + s, teacher=teacher, **options)
            for s in (step, -step)
        )
        gradient[:, v] = (above - below) / 2e-5
    return reference.divergence(student=student, teacher=teacher, **options), gradient


def assert_equal(got, want):
    """Compares values to 1e-6, and gradients to 1e-5 of a token's largest."""
    np.testing.assert_allclose(got[0], want[0], rtol=1e-6, atol=1e-6)
    largest = np.abs(want[1]).max(axis=-1, keepdims=True)
    assert (np.abs(got[1] - want[1]) <= 1e-5 * largest).all()


ONE_EACH = {case["divergence"]: case for case in CASES if case.get("jsd_beta") not in (0.5, 1.0)}


@every_case
def test_value_and_gradient_equal_float64(case):
    logits = make_logits()
    assert_equal(run(case, *logits), expected(case, *logits))


@pytest.mark.parametrize("name", ONE_EACH)
def test_temperature_and_padding_are_as_in_float64(name):
    logits, case = make_logits(), ONE_EACH[name]
    assert_equal(run(case, *logits, 2.5, padding=9), expected(case, *logits, 2.5))


def is_seen(case):
    """Tells whether the comparison with float64 fails, of the functions as they are now."""
    logits = make_logits()
    try:
        assert_equal(run(case, *logits, of=of_logits), expected(case, *logits))
    except AssertionError:
        return True
    return False


@pytest.mark.slow
@pytest.mark.parametrize("name", divergences.DIVERGENCES)
def test_swapped_models_are_seen(name, monkeypatch):
    right = divergences.DIVERGENCES[name]
    assert not is_seen(ONE_EACH[name])
    monkeypatch.setitem(divergences.DIVERGENCES, name, lambda u, v, *rest: right(v, u, *rest))
    assert is_seen(ONE_EACH[name])


@pytest.mark.parametrize("name", ["jsd", "jsd_cross", "skew_forward_kl", "skew_reverse_kl"])
def test_the_wrong_side_of_a_mixture_is_seen(name, monkeypatch):
    for helper in ("_against_mixture", "_mixture_over"):
        right = getattr(divergences, helper)
        monkeypatch.setattr(
            divergences, helper, lambda u, v, share, right=right: right(u, v, 1 - share)
        )
    assert is_seen(ONE_EACH[name])


@pytest.mark.parametrize("name", ["symmetric_kl", "adaptive_kl", "lk_hybrid"])
def test_the_wrong_share_of_the_forward_kl_is_seen(name, monkeypatch):
    right = divergences._mix
    monkeypatch.setattr(divergences, "_mix", lambda *inputs: right(*inputs[:-1], 1 - inputs[-1]))
    assert is_seen(ONE_EACH[name])


PUBLISHED = [
    pytest.param(case, id=f"{system} {name_of(case['loss'])}")
    for system, record in json.loads(published.FILE.read_text()).items()
    for case in record["cases"]
]


@pytest.mark.parametrize("case", PUBLISHED)
def test_values_and_gradients_are_those_of_published_code(case):
    config = LossConfig(**case["loss"])
    logits = [jnp.asarray(z, jnp.float32) / config.temperature for z in published.make_logits()]
    value, gradient = divergence(*map(jax.nn.log_softmax, logits), config)
    scale = divergences.t2_factor(config.temperature, config)
    # Most of that code takes the softmax in float32, as this does: twice the rounding.
    assert float(jnp.mean(value)) * scale == pytest.approx(case["value"], rel=2e-6)
    want = np.array(case["gradient"])
    got = np.asarray(gradient) * scale / config.temperature
    assert np.abs(got - want).max() <= 1e-5 * np.abs(want).max()


def test_the_kl_of_maxtext_is_that_of_optax():
    config = LossConfig(compat="maxtext", temperature=3.0)
    log_q, log_p = (jax.nn.log_softmax(z / 3) for z in make_logits())
    got = divergence(log_q, log_p, config)[0] * divergences.t2_factor(3.0, config)
    want = 9 * optax.losses.kl_divergence(log_q, jnp.exp(log_p))  # as its soft loss has it
    np.testing.assert_allclose(got, want, rtol=2e-6)


def test_the_temperature_is_squared_where_asked_for_or_where_the_system_does():
    systems = {"none": 1, "torchtune": 1, "trl": 1, "distillkit": 9, "maxtext": 9}
    for compat, factor in systems.items():
        assert divergences.t2_factor(3.0, LossConfig(compat=compat)) == factor
    assert divergences.t2_factor(3.0, LossConfig(scale_by_t2=True)) == 9
    assert divergences.t2_factor(3.0, LossConfig(scale_by_t2=False)) == 1


def spread():
    """Returns logits of many kinds of tokens: alike, unlike, flat, sure of the same or another."""
    parts = [make_logits(seed, 20, deviation=d) for seed, d in enumerate((0.01, 1.0, 4.0, 30.0))]
    student, teacher = (np.concatenate(part) for part in zip(*parts, strict=True))
    return np.concatenate([student, teacher[:20]]), np.concatenate([teacher, teacher[:20]])


def run_spread(**case):
    """Returns what `run` does of all tokens of `spread`, N at a time: the program of N is there."""
    logits = (np.split(z, len(z) // N) for z in spread())
    parts = [run(case, *some) for some in zip(*logits, strict=True)]
    return tuple(np.concatenate(part) for part in zip(*parts, strict=True))


@every_case
def test_a_divergence_is_never_below_zero_and_zero_for_equal_models(case):
    value, gradient = run_spread(**case)
    assert (value >= -1e-6).all() and (value[:80] > 1e-7).any()
    np.testing.assert_allclose(value[80:], 0, atol=1e-6)
    np.testing.assert_allclose(gradient[80:], 0, atol=1e-6)


@pytest.mark.parametrize("beta", [0.01, 0.5, 0.9])
def test_bounds_hold(beta):
    entropy = -beta * np.log(beta) - (1 - beta) * np.log(1 - beta)
    jsd = run_spread(divergence="jsd", jsd_beta=beta)[0]
    assert jsd.max() <= entropy + 1e-6 and jsd.max() > 0.9 * entropy
    # A skewed KL is no more than the log of the share that is mixed in.
    for side in ("forward", "reverse"):
        skewed = run_spread(divergence=f"skew_{side}_kl", skew_alpha=beta)[0]
        assert skewed.max() <= -np.log(beta) + 1e-5
    distance, forward, hybrid, acceptance = (
        run_spread(divergence=name)[0] for name in ("tvd", "forward_kl", "lk_hybrid", "nla")
    )
    assert distance.max() <= 1 + 1e-6 and distance.max() > 0.9
    assert (distance <= np.sqrt(forward / 2) + 1e-5).all()  # Pinsker
    terms = agreement_terms(*map(jax.nn.log_softmax, spread()))
    accepted = sum_over_vocab(terms["acceptance"])
    np.testing.assert_allclose(distance, 1 - accepted[:, 0], atol=1e-6)
    # The mixture of the KL and the distance is between them.
    low, high = np.minimum(distance, forward), np.maximum(distance, forward)
    assert ((low - 1e-6 <= hybrid) & (hybrid <= high * (1 + 1e-6) + 1e-6)).all()
    assert (acceptance >= distance - 1e-6).all()  # -log(1 - x) >= x


def test_acceptance_losses_are_those_of_torch_autograd():
    torch = pytest.importorskip("torch")
    student, teacher = make_logits()
    z = torch.tensor(student, dtype=torch.float64, requires_grad=True)
    q, p = z.softmax(-1), torch.tensor(teacher, dtype=torch.float64).softmax(-1)
    rate = torch.minimum(p, q).sum(-1)
    weight = torch.exp(-3 * rate.detach())
    kl = (p * (p.log() - q.log())).sum(-1)
    losses = {"nla": -rate.log(), "lk_hybrid": weight * kl + (1 - weight) * (1 - rate)}
    for name, loss in losses.items():
        (gradient,) = torch.autograd.grad(loss.sum(), z, retain_graph=True)
        value, got = run({"divergence": name}, student, teacher)
        np.testing.assert_allclose(value, loss.detach(), rtol=1e-6)
        np.testing.assert_allclose(got, gradient, atol=1e-6)


FORWARD, REVERSE = {"divergence": "forward_kl"}, {"divergence": "reverse_kl"}
NEARLY = 1e-4  # the limits are approached in proportion to it


@pytest.mark.parametrize(
    "case, limit, factor",
    [
        ({"divergence": "jsd_cross", "jsd_beta": NEARLY}, FORWARD, 1),
        ({"divergence": "jsd_cross", "jsd_beta": 1 - NEARLY}, REVERSE, 1),
        ({"divergence": "jsd", "jsd_beta": NEARLY}, FORWARD, NEARLY),
        ({"divergence": "jsd", "jsd_beta": 1 - NEARLY}, REVERSE, NEARLY),
        ({"divergence": "skew_forward_kl", "skew_alpha": NEARLY}, FORWARD, 1),
        ({"divergence": "skew_reverse_kl", "skew_alpha": NEARLY}, REVERSE, 1),
        ({"divergence": "alpha_beta", "ab_alpha": 1.0, "ab_beta": NEARLY}, FORWARD, 1),
        ({"divergence": "alpha_beta", "ab_alpha": NEARLY, "ab_beta": 1.0}, REVERSE, 1),
        *(
            (
                {"divergence": "alpha_beta", "ab_alpha": alpha + by, "ab_beta": beta + NEARLY},
                {"divergence": "alpha_beta", "ab_alpha": alpha, "ab_beta": beta},
                1,
            )
            for alpha, beta, by in [
                (0.0, 0.5, NEARLY), (0.5, 0.0, NEARLY), (0.5, -0.5, NEARLY), (0.0, 0.0, NEARLY),
                (0.0, 0.0, -NEARLY),
            ]
        ),
    ],
    ids=str,
)  # fmt: skip
def test_limits_are_reached(case, limit, factor):
    logits = make_logits(deviation=1.0)
    got, want = run(case, *logits), run(limit, *logits)
    np.testing.assert_allclose(got[0], factor * want[0], rtol=1e-2)
    largest = np.abs(want[1]).max()
    np.testing.assert_allclose(got[1] / factor, want[1], atol=1e-2 * largest)


@pytest.mark.parametrize(
    "case, same",
    [
        ({"divergence": "alpha_beta", "ab_alpha": 1.0, "ab_beta": 0.0}, FORWARD),
        ({"divergence": "alpha_beta", "ab_alpha": 0.0, "ab_beta": 1.0}, REVERSE),
        ({"divergence": "symmetric_kl", "symmetric_weight": 1.0}, FORWARD),
        ({"divergence": "symmetric_kl", "symmetric_weight": 0.0}, REVERSE),
        ({"divergence": "jsd_cross", "jsd_beta": 0.5}, {"divergence": "jsd"}),
        *(
            ({"divergence": name, field: end}, REVERSE if end else FORWARD)
            for name, field in (("jsd", "jsd_beta"), ("jsd_cross", "jsd_beta"))
            for end in (0.0, 1.0)
        ),
        ({"divergence": "skew_forward_kl", "skew_alpha": 0.0}, FORWARD),
        ({"divergence": "skew_reverse_kl", "skew_alpha": 0.0}, REVERSE),
    ],
    ids=str,
)
def test_special_cases_are_the_same_divergence(case, same):
    logits = make_logits()
    for got, want in zip(run(case, *logits), run(same, *logits), strict=True):
        np.testing.assert_allclose(got, want, rtol=2e-6, atol=1e-6)


@every_case
def test_extreme_logits_and_padding_of_minus_infinity_are_finite(case):
    rng = np.random.default_rng(0)
    for scale in (1e4, -1e4):
        student = (1e4 * rng.normal(size=(N, V))).astype(np.float32)
        teacher = (scale / 1e4 * student).astype(np.float32)
        student[:, V - 7 :] = teacher[:, V - 7 :] = -np.inf
        value, gradient = run(case, student, teacher)
        assert np.isfinite(value).all() and np.isfinite(gradient).all()
        assert (gradient[:, V - 7 :] == 0).all()


def test_metrics_of_losses_handle_entries_without_probability():
    log_p = jnp.array([[0.0, -1e30, -1e30], [-1e30, 0.0, -1e30]])
    log_q = jnp.log(jnp.array([[0.5, 0.5, 0.0], [0.25, 0.5, 0.25]]))
    value, gradient = divergence(log_q, log_p, LossConfig())
    np.testing.assert_allclose(value, [np.log(2), np.log(2)], rtol=1e-6)
    np.testing.assert_allclose(gradient, [[-0.5, 0.5, 0], [0.25, -0.5, 0.25]], atol=1e-7)
    sums = sum_over_vocab(agreement_terms(log_q, log_p))
    np.testing.assert_allclose(sums["kl_forward"][:, 0], value, rtol=1e-6)
    assert np.isfinite(sums["kl_reverse"]).all()
    np.testing.assert_allclose(sums["acceptance"][:, 0], [0.5, 0.5], rtol=1e-6)


@pytest.mark.parametrize("mass, deviation", [(0.1, 0.3), (0.5, 2.0), (0.9, 8.0)])
def test_the_head_of_the_teachers_mass_is_that_of_a_sort(mass, deviation):
    student, teacher = make_logits(3, num_tokens=40, size=5000, deviation=deviation)
    log_q, log_p = (np.asarray(jax.nn.log_softmax(z)) for z in (student, teacher))
    got = jax.jit(adaptive_weight, static_argnums=2)(log_q, log_p, mass)[:, 0]
    q, p = (np.exp(np.float64(x)) for x in (log_q, log_p))
    want = reference.adaptive_weight(q, p, mass)
    assert np.ptp(want) > 0.001
    error = np.abs(got - want)
    assert (error < 2e-6).mean() > 0.95
    # At the boundary two entries may all but tie, and the sum may all but equal the mass.
    assert error.max() < 1e-3


def test_entries_that_tie_are_in_the_head_together():
    log_p = jnp.log(
        jnp.array([[0.4, 0.2, 0.2, 0.2], [0.25, 0.25, 0.25, 0.25], [0.7, 0.1, 0.1, 0.1]])
    )
    log_q = jnp.log(jnp.array([[0.1, 0.3, 0.3, 0.3], [0.1, 0.3, 0.3, 0.3], [0.4, 0.2, 0.2, 0.2]]))
    # Of 0.7 the first alone, since three of 0.2 are too many; all four of 0.25; the first always.
    got = adaptive_weight(log_q, log_p, 0.7 - 0.01)
    np.testing.assert_allclose(got, [[0.5], [1.0], [0.5]], rtol=1e-5)


B, S, DS, DT = 2, 7, 5, 6


def run_head(case, temperature, padding, length):
    """Returns what the head and float64 NumPy say of loss, kd_loss and the hidden gradient.

    The gradient is that along four random directions.
    """
    rng = np.random.default_rng(4)
    h_s, h_t = (rng.normal(size=(B, S, D)).astype(np.float32) for D in (DS, DT))
    w_s, w_t = (rng.normal(size=(V + padding, D)).astype(np.float32) for D in (DS, DT))
    labels, mask = rng.integers(0, V, (B, S)), rng.random((B, S)) < 0.7
    loss = LossConfig(kd_ratio=0.4, temperature=temperature, scale_by_t2=True, **case)
    config = HeadConfig(loss=loss, chunk_tokens=length, vocab_size=V, mesh=tiny.one_device())
    scalars = LossScalars(jnp.float32(0.4), jnp.float32(temperature))

    def measure(hidden):
        student, targets = Student(hidden, w_s), Targets(labels, mask)
        return kd_head(config, scalars, student, HiddenStates(h_t, w_t), targets)

    (value, metrics), gradient = jax.jit(jax.value_and_grad(measure, has_aux=True))(h_s)
    teacher = np.float64(h_t) @ np.float64(w_t[:V]).T
    options = {**options_of(case), "kd_ratio": 0.4, "temperature": temperature}
    options |= {"scale": temperature**2, "divergence_name": options.pop("name")}
    options |= weight_of(case, np.float64(h_s) @ np.float64(w_s[:V]).T, teacher, temperature)

    def exact(hidden):
        return reference.distil(hidden @ np.float64(w_s[:V]).T, teacher, labels, mask, **options)

    directions = rng.normal(size=(4, *h_s.shape))
    ahead, behind = ([exact(h_s + s * x)["loss"] for x in directions] for s in (1e-5, -1e-5))
    along, want = np.subtract(ahead, behind) / 2e-5, exact(np.float64(h_s))
    got = value, metrics["kd_loss"], np.tensordot(directions, gradient, 3)
    return got, (want["loss"], want["kd_loss"], along)


@pytest.mark.parametrize(
    "name, temperature, padding, length",
    [
        *((name, 2.5, 3, 3) for name in divergences.DIVERGENCES),
        *((name, 1.0, 0, 7) for name in ("forward_kl", "reverse_kl")),  # sums that metrics share
    ],
)
def test_the_head_minimises_each_divergence(name, temperature, padding, length):
    got, want = run_head(ONE_EACH[name], temperature, padding, length)
    for ours, exact in zip(got[:2], want[:2], strict=True):
        assert float(ours) == pytest.approx(exact, rel=2e-6)
    assert np.abs(got[2] - want[2]).max() <= 1e-5 * np.abs(want[2]).max()


def test_a_missing_term_of_the_softmax_is_seen(monkeypatch):
    def without_slope(*inputs):
        sums, values = right(*inputs)
        return sums._replace(grad_log_q=0 * sums.grad_log_q), values

    right = token_loss._sums_and_metrics
    monkeypatch.setattr(token_loss, "_sums_and_metrics", without_slope)
    got, want = run_head(ONE_EACH["jsd"], 2.5, 3, 3)
    assert float(got[0]) == pytest.approx(want[0], rel=2e-6)
    assert np.abs(got[2] - want[2]).max() > 1e-3 * np.abs(want[2]).max()
