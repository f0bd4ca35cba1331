"""Scores of packed requests, whatever shares a row, against each request run alone."""

import dataclasses

import jax
import numpy as np
import pytest
import reference
import tiny
from tiny import logits

from kd_jax.config import MeshConfig
from kd_jax.inference import likelihoods
from kd_jax.inference.likelihoods import Scorer, score
from kd_jax.inference.load import load_model, open_model
from kd_jax.models import attention
from kd_jax.models.decoder import Decoder
from kd_jax.parallel.mesh import make_mesh
from kd_jax.setup.model_files import shared_vocab


@pytest.fixture(scope="module")
def scorer(tmp_path_factory):
    folder = tiny.write_plain_model(tmp_path_factory.mktemp("model"), seed=1)
    model = open_model(str(folder), "float32")
    mesh = make_mesh(MeshConfig(), jax.device_count())
    models = load_model(model, mesh)
    vocab_size = shared_vocab(model.files, None).size
    return Scorer(
        spec=models.student, arrays=models.frozen, mesh=mesh,
        vocab_size=vocab_size, row_tokens=32, batch_tokens=512,
    )  # fmt: skip


def make_requests():
    """Returns requests of many lengths, several with one context, contexts of one token too."""
    rng = np.random.default_rng(0)

    def tokens(length):
        return tuple(rng.integers(5, 300, length).tolist())

    requests = []
    for length in (1, 2, 7, 7, 20, 45):
        context = tokens(length)
        requests += [(context, tokens(n)) for n in (1, 1, 3, 9, 30)]
    return requests


def run_alone(scorer, *tokens):
    """Returns the logits after each token of one document, [n, V] float64."""
    whole = np.zeros((1, 96), np.int32)
    whole[0, : len(tokens)] = tokens
    model = Decoder(scorer.spec, scorer.arrays)
    inputs = (whole, np.arange(96)[None], np.ones_like(whole))
    return np.asarray(jax.jit(logits)(model, *inputs), np.float64)[0, : len(tokens)]


def expected_score(scorer, context, continuation):
    z = run_alone(scorer, *context, *continuation)[len(context) - 1 : -1]
    picked = reference.log_softmax(z)[np.arange(len(z)), continuation]
    return picked.sum(), (z.argmax(-1) == continuation).all()


@pytest.fixture(scope="module")
def expected(scorer):
    requests = make_requests()
    for context in dict(requests):  # and what the model itself would go on with
        greedy = ()
        for _ in range(2):
            greedy = (*greedy, int(run_alone(scorer, *context, *greedy)[-1].argmax()))
        requests.append((context, greedy))
    return {request: expected_score(scorer, *request) for request in requests}


@pytest.mark.parametrize("row_tokens", [1, 16, 32, 256])
def test_what_shares_a_row_changes_no_score(row_tokens, scorer, expected):
    scorer = dataclasses.replace(scorer, row_tokens=row_tokens)
    got = dict(score(scorer, [*expected, *expected]))
    assert got.keys() == expected.keys()
    assert {greedy for _, greedy in expected.values()} == {True, False}
    for request, (value, greedy) in expected.items():
        assert got[request].log_likelihood == pytest.approx(value, rel=1e-5, abs=1e-4)
        assert got[request].is_greedy == greedy


def test_a_context_is_run_once(scorer, monkeypatch):
    filled = []
    fill = likelihoods._fill

    def spy(batch, r, row):
        places = list(fill(batch, r, row))
        filled.append(batch["tokens"][r].copy())
        return places

    monkeypatch.setattr(likelihoods, "_fill", spy)
    context = tuple(range(100, 118))
    requests = [(context, (token, token + 1)) for token in range(20, 26)]
    assert len(dict(score(scorer, requests))) == 6
    assert (np.concatenate(filled) == 100).sum() == 1  # 17 + 6 * 2 tokens fit one row


def test_a_continuation_that_saw_another_would_be_noticed(scorer, expected, monkeypatch):
    def blind(q, k, v, segment_ids, layout, **options):  # of the context and all siblings
        return attention.attention(q, k, v, segment_ids[1], layout, **options)

    monkeypatch.setattr("kd_jax.models.decoder.attention", blind)
    jax.clear_caches()
    got = dict(score(scorer, list(expected)))
    jax.clear_caches()
    gaps = [abs(got[request].log_likelihood - value) for request, (value, _) in expected.items()]
    assert max(gaps) > 1
