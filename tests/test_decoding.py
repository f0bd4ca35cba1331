"""Decoding against transformers' generate, token for token."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch
from test_model import port
from transformers import TopKLogitsWarper, TopPLogitsWarper

from kd_jax import decoding
from kd_jax.architecture import FAMILIES
from kd_jax.decoding import Sampling, choose, generate_all, unstack

NEW = 200


def prompts_of(lengths):
    rng = np.random.default_rng(0)
    return [rng.integers(5, 300, n).tolist() for n in lengths]


def torch_greedy(model, prompt, count):
    with torch.no_grad():
        ids = model.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), max_new_tokens=count,
            do_sample=False, eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
    return ids[0, len(prompt) :].tolist()


def decoder_of(family="llama"):
    theirs = tiny.make_torch_model(family, 3, tie_word_embeddings=False)
    ours = port(theirs)
    return theirs, ours.arch, unstack(ours)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_are_those_of_transformers(family):
    theirs, arch, weights = decoder_of(family)
    prompts = prompts_of((7, 40, 1))
    ours = generate_all(arch, weights, prompts, max_new_tokens=NEW)
    for prompt, row in zip(prompts, ours, strict=True):
        want = torch_greedy(theirs, prompt, NEW)
        assert len(set(want)) > 20  # else a wrong cache could go unseen
        assert row == want


def test_a_row_ends_before_its_stop_token():
    _, arch, weights = decoder_of()
    prompts = prompts_of((9, 17))
    whole = generate_all(arch, weights, prompts, max_new_tokens=40)
    stop = whole[0][5]
    rows = generate_all(arch, weights, prompts, max_new_tokens=40, stop_tokens={stop})
    for row, full in zip(rows, whole, strict=True):
        assert row == full[: full.index(stop) if stop in full else None]


def test_prompts_of_near_lengths_share_their_programs():
    _, arch, weights = decoder_of()
    decoding._step.clear_cache()
    decoding._prefill.clear_cache()
    for lengths in ((3, 20), (32, 1), (7, 9)):
        generate_all(arch, weights, prompts_of(lengths), max_new_tokens=8)
    assert (decoding._step._cache_size(), decoding._prefill._cache_size()) == (1, 1)


def test_a_wrong_position_is_seen(monkeypatch):
    theirs, arch, weights = decoder_of()
    prompt = prompts_of((7,))[0]
    right = decoding.rope_tables
    monkeypatch.setattr(
        decoding, "rope_tables", lambda p, *rest: right(p + (p.shape[1] == 1), *rest)
    )
    decoding._step.clear_cache()
    wrong = generate_all(arch, weights, [prompt], max_new_tokens=50)
    decoding._step.clear_cache()
    assert wrong[0] != torch_greedy(theirs, prompt, 50)


def frequencies(sampling, logits, count=4000):
    keys = jax.random.split(jax.random.key(0), count)
    draws = jax.vmap(lambda key: choose(logits[None], sampling, key)[0])(keys)
    return np.bincount(np.asarray(draws), minlength=len(logits)) / count


@pytest.mark.parametrize(
    "options", [{}, {"top_k": 3}, {"top_p": 0.7}, {"top_k": 4, "top_p": 0.6}], ids=str
)
def test_draws_have_the_odds_of_transformers_warpers(options):
    logits = np.array([2.0, 1.5, 0.3, 0.0, -1.0, 1.4, -3.0], np.float32)
    scores = torch.tensor(logits)[None] / 1.3
    for name, make in (("top_k", TopKLogitsWarper), ("top_p", TopPLogitsWarper)):
        if name in options:
            scores = make(options[name])(None, scores)
    want = scores.softmax(-1)[0].numpy()
    got = frequencies(Sampling(temperature=1.3, **options), jnp.asarray(logits))
    assert (got[want == 0] == 0).all()
    np.testing.assert_allclose(got, want, atol=0.035)  # four deviations of 4,000 draws


def test_temperature_zero_takes_the_likeliest():
    logits = jnp.asarray([[0.0, 3.0, 1.0], [5.0, 3.0, 1.0]])
    assert choose(logits, Sampling(), jax.random.key(0)).tolist() == [1, 0]
