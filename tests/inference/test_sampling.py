"""The batched sampler against transformers, exact distributions and itself."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch
from scipy.stats import chisquare
from test_decoder import port
from tiny import logits
from transformers import TopPLogitsWarper

from kd_jax.config import LoraConfig, MeshConfig
from kd_jax.inference import sampling as sampling_module
from kd_jax.inference.drawing import Sampling, draw
from kd_jax.inference.sampling import key_data, sample, stop_length
from kd_jax.models.decoder import Decoder
from kd_jax.models.weight_table import adapter_weights, weights
from kd_jax.parallel.mesh import Layout, make_mesh

pytestmark = pytest.mark.devices(8)

HOT = Sampling(temperature=1.0)
LAYERS = 2  # each is compiled for itself
LENGTHS = (7, 40, 1, 3, 25, 12, 33, 5, 19)
PROMPTS = [np.random.default_rng(0).integers(5, 300, n).tolist() for n in LENGTHS]
SHORT = [prompt for prompt in PROMPTS if len(prompt) < 30][:6]  # one program reads them all


@pytest.fixture(scope="module")
def pair():
    """transformers' tiny Llama, and our decoder with its weights."""
    shape = {"tie_word_embeddings": False, "num_hidden_layers": LAYERS}
    theirs = tiny.make_torch_model("llama", 3, **shape)
    return theirs, port(theirs)


def drawn(ours, prompts=PROMPTS, **options):
    options = {"keys": range(len(prompts)), "max_new_tokens": 24, "sampling": HOT, **options}
    return sample(options.pop("spec", ours.spec), tiny.arrays_of(ours), prompts, **options)


def lists(sampled):
    return [row.tolist() for row in sampled.tokens]


def greedy_by_transformers(model, prompts, count, stop):
    """Returns transformers' rows from one left-padded batch, stop tokens included."""
    size = max(map(len, prompts))
    ids = torch.tensor([[0] * (size - len(x)) + x for x in prompts])
    seen = torch.tensor([[0] * (size - len(x)) + [1] * len(x) for x in prompts])
    with torch.no_grad():
        out = model.generate(
            ids, attention_mask=seen, max_new_tokens=count, do_sample=False,
            eos_token_id=stop, pad_token_id=0,
        )[:, size:].tolist()  # fmt: skip
    ends = [next((i for i, t in enumerate(row) if t in stop), count - 1) for row in out]
    return [row[: end + 1] for row, end in zip(out, ends, strict=True)]


def test_greedy_rows_and_their_ends_are_those_of_transformers(pair):
    theirs, ours = pair
    free = greedy_by_transformers(theirs, PROMPTS[:2], 24, [-1])
    stop = [free[0][9], free[1][15]]
    found = drawn(ours, sampling=Sampling(), stop_tokens=stop, batch_rows=3)
    want = greedy_by_transformers(theirs, PROMPTS, 24, stop)
    assert lists(found) == want
    assert found.ended.tolist() == [row[-1] in stop for row in want]
    assert 0 < found.ended.sum() < len(PROMPTS)
    assert all(row.dtype == np.int32 for row in found.tokens)


def test_several_tokens_in_order_end_a_row(pair):
    _, ours = pair
    free = lists(drawn(ours, SHORT))
    ends = [tuple(free[0][8:10]), tuple(free[1][3:6]), (free[2][1],), (free[3][0], 999)]
    found = drawn(ours, SHORT, stop_tokens=[*ends[:2], free[2][1], ends[3]], batch_rows=2)

    def cut(row):
        for size in range(1, len(row) + 1):
            if any(tuple(row[max(0, size - len(end)) : size]) == end for end in ends):
                return row[:size]
        return row

    want = [cut(row) for row in free]
    assert lists(found) == want and [len(row) for row in want[:3]] != [24] * 3
    assert found.ended.tolist() == [stop_length(row, ends) > 0 for row in want]
    assert stop_length(want[0], ends) == 2 and stop_length(free[5][:0], ends) == 0


def test_windows_hold_in_the_ring():
    shape = {"tie_word_embeddings": False, "num_hidden_layers": LAYERS}
    theirs = tiny.make_torch_model("gemma3_text", 3, **shape)
    found = drawn(port(theirs), sampling=Sampling(), batch_rows=2, max_new_tokens=40)
    assert lists(found) == greedy_by_transformers(theirs, PROMPTS, 40, [-1])


def test_a_row_depends_on_its_prompt_and_key_alone(pair):
    _, ours = pair
    stop = [16, 65, 183]
    whole = drawn(ours, SHORT, stop_tokens=stop)
    order = np.random.default_rng(1).permutation(len(SHORT))
    mixed = [SHORT[i] for i in order]
    found = drawn(ours, mixed, keys=order, stop_tokens=stop, batch_rows=2)
    assert lists(found) == [lists(whole)[i] for i in order]
    for place, i in enumerate(order):
        np.testing.assert_allclose(found.log_probs[place], whole.log_probs[i], atol=1e-4)
    keys = jax.vmap(jax.random.key)(jnp.arange(len(SHORT)))
    assert lists(drawn(ours, SHORT, keys=keys, stop_tokens=stop)) == lists(whole)
    assert lists(drawn(ours, SHORT, keys=range(1, 7), stop_tokens=stop)) != lists(whole)


def test_log_probabilities_are_those_of_the_training_forward(pair):
    _, ours = pair
    hot = Sampling(temperature=1.7, top_p=0.8)
    found = drawn(ours, SHORT, sampling=hot, batch_rows=4)
    want = by_the_trainer(ours, SHORT, found.tokens)
    for log_probs, exact in zip(found.log_probs, want, strict=True):
        # Sums of float32 in another order.
        np.testing.assert_allclose(log_probs, exact, rtol=1e-5, atol=1e-5)


def by_the_trainer(model, prompts, answers):
    """Returns the log-probabilities of the answers' tokens by the forward pass of training."""
    rows = [[*prompt, *tokens] for prompt, tokens in zip(prompts, answers, strict=True)]
    size = 64  # one program for all rows
    tokens = jnp.array([row + [0] * (size - len(row)) for row in rows], jnp.int32)
    place = jnp.broadcast_to(jnp.arange(size)[None], tokens.shape)
    given = (model, tokens, place, jnp.zeros_like(tokens))
    exact = np.asarray(jax.nn.log_softmax(jax.jit(logits)(*given)))
    return [
        row[len(prompt) - 1 :][np.arange(len(answer)), answer]
        for row, prompt, answer in zip(exact, prompts, answers, strict=True)
    ]


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.8, "top_p": 0.9},
        pytest.param({"temperature": 1.3}, marks=pytest.mark.slow),
    ],
)
def test_20000_draws_have_the_exact_distribution(pair, options):
    theirs, ours = pair
    rows, length = 100, 200
    prompts = [SHORT[i % len(SHORT)] for i in range(rows)]
    found = drawn(ours, prompts, max_new_tokens=length, sampling=Sampling(**options))
    exact = np.concatenate(
        [
            exact_distributions(theirs, prompt, tokens, options)
            for prompt, tokens in zip(prompts, found.tokens, strict=True)
        ]
    )
    tokens = np.concatenate(found.tokens)
    assert exact[np.arange(len(tokens)), tokens].min() > 0
    assert p_value(tokens, exact) > 0.001
    tilted = exact * np.where(np.arange(exact.shape[1]) % 2, 1.4, 1)
    assert p_value(tokens, tilted / tilted.sum(axis=1, keepdims=True)) < 0.001


def exact_distributions(model, prompt, tokens, options):
    """Returns transformers' distribution of each new token, [tokens, V] float64."""
    with torch.no_grad():
        scores = model(torch.tensor([[*prompt, *tokens.tolist()]])).logits[0]
    scores = scores[len(prompt) - 1 : -1].double() / options["temperature"]
    if "top_p" in options:
        scores = TopPLogitsWarper(options["top_p"])(None, scores)
    return scores.softmax(-1).numpy()


def p_value(tokens, exact):
    """Returns chi-square's p-value of draws from distributions [tokens, V] of their own.

    A draw's cumulative probability, uniform between that of its token and the one before, is
    uniform from 0 to 1. Even tokens come first, so that a tilt of the odd ones is seen.
    """
    order = np.argsort(np.arange(exact.shape[1]) % 2, kind="stable")
    ends = exact[:, order].cumsum(axis=1)
    rows, place = np.arange(len(tokens)), np.argsort(order)[tokens]
    at = ends[rows, place] - np.random.default_rng(0).random(len(tokens)) * exact[rows, tokens]
    return chisquare(np.histogram(at, 40, (0, 1))[0]).pvalue


def test_devices_change_probabilities_by_rounding(pair):
    _, ours = pair
    arrays = tiny.arrays_of(ours)
    want = drawn(ours, SHORT, max_new_tokens=12, batch_rows=8)
    layout = Layout(make_mesh(MeshConfig(data=2, fsdp=2, tensor=2), 8))
    spec = replace(ours.spec, layout=layout)
    placed = {
        name: jax.device_put(arrays[name], layout.sharding(weight.dims, weight.shape))
        for name, weight in weights(spec.arch).items()
    }
    found = sample(
        spec, placed, SHORT, keys=range(6), max_new_tokens=12, sampling=HOT, batch_rows=8
    )
    assert lists(found) == lists(want)
    for one, other in zip(found.log_probs, want.log_probs, strict=True):
        np.testing.assert_allclose(np.exp(one), np.exp(other), atol=1e-5)
    assert all(not x.is_deleted() for x in placed.values())


def test_adapters_of_the_trained_state_are_used_and_left_as_they_are(pair):
    _, ours = pair
    rng = np.random.default_rng(0)
    lora = LoraConfig(rank=4, alpha=6.0, target_modules=("q_proj", "down_proj"))
    factors = {
        n: jnp.asarray(rng.normal(size=w.shape) / 4, jnp.float32)
        for n, w in adapter_weights(lora, ours.spec.arch).items()
    }
    arrays = tiny.arrays_of(ours) | factors
    before = dict(arrays)
    spec = replace(ours.spec, lora_scale=1.5)
    found = sample(spec, arrays, SHORT, keys=range(6), max_new_tokens=12, sampling=HOT)
    assert arrays == before
    assert lists(found) != lists(drawn(ours, SHORT, max_new_tokens=12))
    want = by_the_trainer(Decoder(spec, arrays), SHORT, found.tokens)
    for log_probs, exact in zip(found.log_probs, want, strict=True):
        np.testing.assert_allclose(log_probs, exact, rtol=1e-5, atol=1e-5)


def test_bfloat16_rows_have_the_trainers_probabilities(pair):
    _, ours = pair
    spec = replace(ours.spec, dtype=jnp.dtype("bfloat16"))
    found = drawn(ours, SHORT, spec=spec, max_new_tokens=12)
    want = by_the_trainer(Decoder(spec, tiny.arrays_of(ours)), SHORT, found.tokens)
    for log_probs, exact in zip(found.log_probs, want, strict=True):
        np.testing.assert_allclose(log_probs, exact, atol=0.4)  # bfloat16's rounding


def test_rows_at_once_fit_the_cache(pair, monkeypatch):
    _, ours = pair
    arrays = tiny.arrays_of(ours)
    row_bytes = 2 * LAYERS * 2 * 64 * 16 * 4  # keys and values, layers, heads, tokens, H, float32
    monkeypatch.setattr(sampling_module, "CACHE_BYTES", 5 * row_bytes + 1)
    assert sampling_module.cache_rows(ours.spec, 64, arrays) == 5
    monkeypatch.setattr(sampling_module, "CACHE_BYTES", 2**40)
    assert sampling_module.cache_rows(ours.spec, 64, arrays) == 32


def test_no_prompts_give_no_answers(pair):
    assert drawn(pair[1], []).tokens == []


def test_a_temperature_near_0_is_greedy():
    logits = jnp.asarray(np.random.default_rng(0).normal(0, 3, (4, 40)), jnp.float32)
    logits = logits.at[:, -1].set(-jnp.inf)  # padding of the vocabulary
    keys, counts = key_data(range(4)), jnp.zeros(4, jnp.int32)
    token, _ = jax.jit(draw, static_argnums=1)(logits, Sampling(temperature=1e-46), keys, counts)
    np.testing.assert_array_equal(token, jnp.argmax(logits, axis=-1))
