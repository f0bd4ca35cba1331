"""Entries of a token in place of its distribution: what is stored, and the loss of it."""

from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from kd_jax.config import Config, DataConfig, LossConfig, StudentConfig, TeacherConfig, UserError
from kd_jax.data.store import TEACHER
from kd_jax.losses.fused_head import kd_head
from kd_jax.losses.head_inputs import ChunkContext, HeadConfig, Student, Targets
from kd_jax.losses.token_loss import LossScalars
from kd_jax.losses.vocabulary import Vocab
from kd_jax.setup.cached import check_loss
from kd_jax.teachers import topk
from kd_jax.teachers.storage import token_bytes
from kd_jax.teachers.topk import Selection, TopKModel, topk_fields

B, S, D, V, K = 2, 4, 16, 40, 6
SIZES = {"chunk_tokens": 3, "vocab_size": V}  # of the head


@pytest.fixture(scope="module")
def states():
    """The student's hidden states and head, then the teacher's, and labels."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    labels = jnp.asarray(rng.integers(0, V, (B, S)), jnp.int32)
    return draw(B, S, D), draw(V, D) * 0.5, draw(B, S, D), draw(V, D) * 0.5, labels


def log_probs_of(hidden, head):
    return jax.nn.log_softmax(jnp.einsum("BSD,VD->BSV", hidden, head))


def choose(states, kind="topk", k=K):
    """Returns what is stored of the teacher."""
    _, _, hidden, head, labels = states
    select = Selection(kind=kind, k=k, num_entries=V)
    return jax.jit(lambda *arrays: select(*arrays))(hidden, head, labels)


def side(stored, treatment="bucket", num_entries=V):
    batch = {TEACHER + name: x for name, x in stored.items()}
    return TopKModel(num_entries, treatment)({}, batch)[0]


def dense(states, stored, treatment):
    """Returns the teacher's probabilities [B, S, V] of a treatment, in the head's own call."""

    @jax.jit
    def log_probs(hidden, head, labels, stored):
        teacher, z = side(stored, treatment), log_probs_of(hidden, head).reshape(-1, V)
        rows = jax.tree.map(lambda x: x.reshape(B * S, *x.shape[2:]), teacher.rows)
        context = ChunkContext(z, labels.reshape(-1), Vocab(teacher.entries), V)
        return teacher.logits(rows, teacher.entries, context)

    return np.exp(log_probs(*states[:2], states[-1], stored)).reshape(B, S, V)


def test_the_most_likely_entries_are_stored_with_the_mass_of_the_rest(states):
    assert token_bytes(topk_fields(64)) == 292
    want, stored = np.exp(log_probs_of(*states[2:4])), choose(states)
    order = np.argsort(-want, axis=-1)[..., :K]
    assert np.array_equal(np.sort(stored["ids"]), np.sort(order))
    got = np.exp(np.asarray(stored["log_probs"], np.float32))
    np.testing.assert_allclose(got, np.take_along_axis(want, order, -1), rtol=3e-3)
    np.testing.assert_allclose(np.exp(stored["rest"]), 1 - got.sum(-1), atol=2e-3)


def test_chunks_are_large_whatever_the_length_of_rows(states, monkeypatch):
    """Rows of an odd number of tokens were computed token by token."""
    whole, run, sizes = choose(states), Selection._choose, []

    def watched(self, hidden, *others):
        sizes.append(hidden.shape[1])
        return run(self, hidden, *others)

    monkeypatch.setattr(topk, "_CHUNK_TOKENS", 3 * B)
    monkeypatch.setattr(Selection, "_choose", watched)
    for name, x in choose(states).items():
        np.testing.assert_allclose(x, whole[name], rtol=1e-3)  # of float16
    assert sizes == [3]


def test_ids_above_16_bits_are_whole():
    head = np.zeros((70_000, 1), np.float32)
    head[[3, 69_999, 65_536, 65_535], 0] = [9, 8, 7, 6]

    @jax.jit
    def logits(head):
        found = Selection(kind="topk", k=4, num_entries=70_000)(
            jnp.ones((1, 1, 1)), head, jnp.ones((1, 1))
        )
        teacher = side(found, num_entries=70_000)
        rows = jax.tree.map(lambda x: x[0], teacher.rows)
        context = ChunkContext(
            jnp.zeros((1, 70_000)), jnp.zeros(1, int), Vocab(teacher.entries), 70_000
        )
        return teacher.logits(rows, teacher.entries, context)[0]

    order = np.argsort(-np.asarray(logits(head)), kind="stable")
    assert order[:4].tolist() == [3, 69_999, 65_536, 65_535]


def test_each_treatment_places_the_rest_as_it_says(states):
    stored = choose(states)
    mass = np.exp(np.asarray(stored["rest"]))[..., None]
    listed = np.zeros((B, S, V), bool)
    np.put_along_axis(listed, np.asarray(stored["ids"], int), True, axis=-1)
    student = np.where(listed, 0, np.exp(log_probs_of(*states[:2])))
    found = {name: dense(states, stored, name) for name in ("bucket", "uniform", "label")}
    for p in found.values():
        np.testing.assert_allclose(p.sum(-1), 1, atol=2e-3)  # of log-probabilities in float16
    bucket, uniform, label = (np.where(listed, 0, p) for p in found.values())
    np.testing.assert_allclose(bucket, mass * student / student.sum(-1, keepdims=True), rtol=1e-4)
    np.testing.assert_allclose(uniform, ~listed * mass / (V - K), rtol=1e-4)
    onehot = np.asarray(states[-1])[..., None] == np.arange(V)
    np.testing.assert_allclose(label, ~listed * onehot * mass, atol=1e-6)
    assert dense(states, stored, "renormalize")[~listed].max() == 0


def buckets(p, stored):
    """Returns probabilities [..., V] as those of K entries and of the rest, [..., K + 1]."""
    some = jnp.take_along_axis(p, jnp.asarray(stored["ids"], jnp.int32), axis=-1)
    return jnp.concatenate([some, 1 - some.sum(-1, keepdims=True)], axis=-1)


DIVERGENCES = {
    "forward_kl": lambda p, q: p * jnp.log(p / q),
    "jsd": lambda p, q: 0.5 * p * jnp.log(2 * p / (p + q)) + 0.5 * q * jnp.log(2 * q / (p + q)),
}


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_value_and_gradient_are_those_of_k_entries_and_one_for_the_rest(states, divergence):
    """Twin: with the rest spread uniformly they are others."""
    hidden, head, *_, labels = states
    stored = choose(states)
    log_p = jnp.concatenate([stored["log_probs"], stored["rest"][..., None]], axis=-1)
    p = jax.nn.softmax(jnp.asarray(log_p, jnp.float32))  # float16 sums to 1 within 1e-3

    def reference(hidden):
        q = buckets(jnp.exp(log_probs_of(hidden, head)), stored)
        return DIVERGENCES[divergence](p, q).sum()

    loss = LossConfig(kd_ratio=1.0, divergence=divergence)
    config = HeadConfig(loss=loss, mesh=tiny.one_device(), **SIZES)
    scalars = LossScalars(jnp.float32(1), jnp.float32(1))
    targets = Targets(labels, jnp.ones((B, S), bool))

    def ours(hidden, treatment):
        return kd_head(config, scalars, Student(hidden, head), side(stored, treatment), targets)[0]

    want, gradient = jax.jit(jax.value_and_grad(reference))(hidden)
    got, d_hidden = jax.jit(jax.value_and_grad(ours), static_argnums=1)(hidden, "bucket")
    np.testing.assert_allclose(got, want, rtol=1e-5)
    np.testing.assert_allclose(d_hidden, gradient, atol=1e-5 * np.abs(gradient).max())
    assert abs(jax.jit(ours, static_argnums=1)(hidden, "uniform") - want) > 1e-2 * want


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
def test_renormalize_both_compares_the_stored_entries_alone(states, divergence):
    """Twin: the head that looks at all of the student's entries."""
    hidden, head, *_, labels = states
    stored = choose(states)
    ids = jnp.asarray(stored["ids"], jnp.int32)
    targets = Targets(labels, jnp.ones((B, S), bool))
    scalars = LossScalars(jnp.float32(0.5), jnp.float32(1))
    loss = LossConfig(kd_ratio=0.5, divergence=divergence)

    def reference(hidden):
        log_q = log_probs_of(hidden, head)
        ce = -jnp.take_along_axis(log_q, labels[..., None], axis=-1).sum()
        u = jax.nn.log_softmax(jnp.take_along_axis(log_q, ids, axis=-1))
        v = jax.nn.log_softmax(jnp.asarray(stored["log_probs"], jnp.float32))
        terms = jnp.exp(v) * (v - u) if divergence == "forward_kl" else jnp.exp(u) * (u - v)
        return 0.5 * ce + 0.5 * terms.sum()

    def ours(hidden, listed_only):
        config = HeadConfig(loss=loss, mesh=tiny.one_device(), listed_only=listed_only, **SIZES)
        teacher = side(stored, "renormalize_both")
        return kd_head(config, scalars, Student(hidden, head), teacher, targets)[0]

    want, gradient = jax.jit(jax.value_and_grad(reference))(hidden)
    got, d_hidden = jax.jit(jax.value_and_grad(ours), static_argnums=1)(hidden, True)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    np.testing.assert_allclose(d_hidden, gradient, atol=1e-5 * np.abs(gradient).max())
    assert abs(jax.jit(ours, static_argnums=1)(hidden, False) - want) > 1e-2 * want


@pytest.mark.parametrize(
    ("kind", "rest", "divergence", "words"),
    [
        ("topk", "renormalize", "reverse_kl", "got renormalize, with which it is infinite"),
        ("topk", "renormalize_both", "alpha_beta", "expected forward_kl"),
        ("sampled", "uniform", "forward_kl", "expected bucket, its default"),
        ("hidden", "label", "forward_kl", "expected bucket, its default"),
    ],
)
def test_what_a_treatment_cannot_serve_is_refused(kind, rest, divergence, words):
    loss = LossConfig(divergence=divergence)
    parts = {"student": StudentConfig(path="s"), "data": DataConfig(path="d"), "workdir": "w"}
    teacher = TeacherConfig(path="t", cache="c", cache_rest=rest)
    config = Config(teacher=teacher, loss=loss, steps=1, **parts)
    with pytest.raises(UserError, match=words):
        check_loss(SimpleNamespace(kind=kind, path="c"), config)
    fits = replace(config, teacher=replace(teacher, cache_rest="bucket"))
    check_loss(SimpleNamespace(kind=kind, path="c"), replace(fits, loss=LossConfig()))


def test_samples_add_up_to_an_unbiased_estimate(states):
    stored = choose(states, "sampled", k=4096)
    want = np.exp(log_probs_of(*states[2:4]))
    error = np.abs(dense(states, stored, "bucket") - want)
    assert (error < 5 * np.sqrt(want / 4096) + 1e-3).all() and error.max() > 1e-4
    again = choose(states, "sampled", k=4096)
    assert np.array_equal(stored["ids"], again["ids"])
    assert not np.array_equal(stored["ids"][0, 0], stored["ids"][0, 1])
