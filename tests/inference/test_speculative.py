"""Speculative decoding has the target's distribution, whatever the draft model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from scipy.stats import chisquare
from test_decoder import port
from test_decoding import prompts_of, torch_greedy
from test_sampling import exact_distributions, p_value

from kd_jax.inference import speculative
from kd_jax.inference.drawing import Sampling
from kd_jax.inference.speculative import Model, accept, speculate


def model_of(seed, **changes):
    changes = {"tie_word_embeddings": False, "num_hidden_layers": 2, **changes}
    theirs = tiny.make_torch_model("llama", seed, **changes)
    ours = port(theirs)
    return theirs, Model(ours.spec, tiny.arrays_of(ours))


@pytest.fixture(scope="module")
def target():
    return model_of(3)


@pytest.fixture(scope="module")
def near(target):
    """A draft model near the target: its weights and some noise."""
    rng = np.random.default_rng(0)
    spec, arrays = target[1]
    return Model(spec, {n: x * (1 + 0.02 * rng.normal(size=x.shape)) for n, x in arrays.items()})


def rounds_of(target, draft, prompts, **options):
    """Returns each row's tokens, and the number of rounds."""
    pieces = list(speculate(target, draft, prompts, **options))
    rows = [[token for piece in pieces for token in piece[i]] for i in range(len(prompts))]
    return rows, len(pieces)


def test_greedy_tokens_are_the_targets(target, near):
    theirs, ours = target
    prompts = prompts_of((7, 40, 1))
    rows, rounds = rounds_of(ours, near, prompts, max_new_tokens=40)
    assert rows == [torch_greedy(theirs, prompt, 40) for prompt in prompts]
    assert rounds < 40  # some proposals were accepted
    stop = rows[0][9]
    cut, _ = rounds_of(ours, near, prompts, max_new_tokens=40, stop_tokens={stop})
    assert cut == [row[: row.index(stop)] if stop in row else row for row in rows]


@pytest.mark.slow
@pytest.mark.timeout(480)
@pytest.mark.parametrize("options", [{"temperature": 0.8}, {"temperature": 1.0, "top_p": 0.7}])
def test_20000_drawn_tokens_have_the_targets_distribution(target, near, options):
    (theirs, ours), count = target, 200
    prompts = [prompts_of((7, 20, 3, 12))[i % 4] for i in range(count)]
    rows, rounds = rounds_of(
        ours, near, prompts, max_new_tokens=100, sampling=Sampling(**options), proposed=3
    )
    assert rounds < 80
    exact = np.concatenate(
        [
            exact_distributions(theirs, prompt, np.array(row), options)
            for prompt, row in zip(prompts, rows, strict=True)
        ]
    )
    tokens = np.concatenate(rows)
    assert len(tokens) == 100 * count and exact[np.arange(len(tokens)), tokens].min() > 0
    assert p_value(tokens, exact) > 0.001


def accepted(p, q, count=20_000):
    """Returns the first tokens of rounds with the same p [k + 1, V] and q [k, V]."""
    rng = np.random.default_rng(0)
    k = len(q)
    proposals = np.stack([rng.choice(q.shape[1], count, p=row) for row in q], axis=1)
    keys = jax.random.key_data(jax.random.split(jax.random.key(0), count))
    arrays = (jnp.broadcast_to(jnp.float32(x)[None], (count, *x.shape)) for x in (p, q))
    run = jax.jit(lambda *inputs: accept(*inputs))  # a new function: one test patches a constant
    new, numbers = run(*arrays, jnp.int32(proposals), keys, jnp.zeros(count, jnp.int32))
    return np.asarray(new), np.asarray(numbers), k


def test_acceptance_has_the_targets_odds_and_the_expected_length(monkeypatch):
    rng = np.random.default_rng(1)
    p, q = rng.dirichlet(np.ones(6), 3), rng.dirichlet(np.ones(6), 2)
    new, numbers, k = accepted(p, q)
    for place in range(k + 1):
        there = new[numbers > place, place]
        counts = np.bincount(there, minlength=6)
        assert chisquare(counts, p[place] * len(there)).pvalue > 0.001
    rates = np.minimum(p[:k], q).sum(axis=1)
    assert numbers.mean() == pytest.approx(1 + rates[0] + rates[0] * rates[1], abs=0.02)
    # One number for two decisions is seen.
    monkeypatch.setattr(speculative, "REPLACED", speculative.ACCEPTED)
    new, numbers, _ = accepted(p, q)
    assert chisquare(np.bincount(new[:, 0], minlength=6), p[0] * len(new)).pvalue < 0.001
