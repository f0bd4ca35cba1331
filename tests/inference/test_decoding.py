"""Decoding against transformers' generate, token for token."""

import importlib.util
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch
from test_decoder import port
from transformers import TopKLogitsWarper, TopPLogitsWarper

from kd_jax.config import LoraConfig, MeshConfig
from kd_jax.inference import decoding
from kd_jax.inference.decoding import DecodingProgram
from kd_jax.inference.drawing import Sampling, _kept, argmax, draw
from kd_jax.inference.sampling import generate
from kd_jax.inference.unstacking import unstack_layers
from kd_jax.models import decoder
from kd_jax.models.architecture import read_architecture
from kd_jax.models.lora import merge
from kd_jax.models.weight_table import (
    FACTORS,
    abstract_weights,
    adapter_weights,
    is_adapter,
    layer_weights,
    weights,
)
from kd_jax.parallel.mesh import Layout, make_mesh, replicated
from kd_jax.planning.chips import find_topology
from kd_jax.planning.topology import devices_of, prepare

pytestmark = pytest.mark.devices(8)

NEW = 200


def prompts_of(lengths):
    rng = np.random.default_rng(0)
    return [rng.integers(5, 300, n).tolist() for n in lengths]


def generate_all(spec, arrays, prompts, **options):
    """Returns all new tokens of each row."""
    steps = list(generate(spec, arrays, prompts, **options))
    return [[step[i] for step in steps if step[i] is not None] for i in range(len(prompts))]


def torch_greedy(model, prompt, count):
    with torch.no_grad():
        ids = model.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), max_new_tokens=count,
            do_sample=False, eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
    return ids[0, len(prompt) :].tolist()


def decoder_of(family="llama", **changes):
    shape = {"tie_word_embeddings": False, "num_hidden_layers": 2}
    theirs = tiny.make_torch_model(family, 3, **shape, **changes)
    ours = port(theirs)
    arrays = tiny.arrays_of(ours)
    unstack_layers(ours.spec, arrays)
    return theirs, ours.spec, arrays


@pytest.mark.parametrize(
    "family, changes",
    [
        ("llama", {}),
        ("smollm3", {}),  # layers without RoPE
        ("gemma3_text", {}),  # layers with windows, two RoPE bases
        ("mistral", {"sliding_window": 30}),
        *(
            pytest.param(x, {}, marks=pytest.mark.slow)
            for x in ("qwen3", "granite", "olmo2", "phi3")
        ),
    ],
)
def test_greedy_tokens_are_those_of_transformers(family, changes):
    theirs, spec, arrays = decoder_of(family, **changes)
    prompts = prompts_of((7, 40, 1))
    count = NEW if family == "llama" else 50
    ours = generate_all(spec, arrays, prompts, max_new_tokens=count)
    for prompt, row in zip(prompts, ours, strict=True):
        want = torch_greedy(theirs, prompt, count)
        assert len(set(want)) > count / 10  # else a wrong cache could go unseen
        assert row == want


def test_a_row_ends_before_its_stop_token():
    _, spec, arrays = decoder_of()
    prompts = prompts_of((9, 17))
    whole = generate_all(spec, arrays, prompts, max_new_tokens=40)
    stop = whole[0][5]
    rows = generate_all(spec, arrays, prompts, max_new_tokens=40, stop_tokens={stop})
    for row, full in zip(rows, whole, strict=True):
        assert row == full[: full.index(stop) if stop in full else None]


def test_prompts_of_near_lengths_share_their_programs():
    _, spec, arrays = decoder_of()
    decoding.advance.clear_cache()
    decoding.admit.clear_cache()
    for lengths in ((3, 20), (32, 1), (7, 9)):
        generate_all(spec, arrays, prompts_of(lengths), max_new_tokens=8)
    assert (decoding.advance._cache_size(), decoding.admit._cache_size()) == (1, 1)


def test_a_wrong_position_is_seen(monkeypatch):
    theirs, spec, arrays = decoder_of()
    prompt = prompts_of((7,))[0]
    right = decoder.rope_tables
    monkeypatch.setattr(
        decoder, "rope_tables", lambda p, *rest: right(p + (p.shape[1] == 1), *rest)
    )
    decoding.advance.clear_cache()
    wrong = generate_all(spec, arrays, [prompt], max_new_tokens=50)
    decoding.advance.clear_cache()
    assert wrong[0] != torch_greedy(theirs, prompt, 50)


@pytest.mark.parametrize(
    "rows, sampling", [(1, Sampling(temperature=1, top_k=5, top_p=0.9)), (5, Sampling())]
)
def test_bfloat16_generates_for_any_number_of_rows(rows, sampling):
    exact = port(tiny.make_torch_model("qwen2", 3, num_hidden_layers=2))
    spec, arrays = replace(exact.spec, dtype=jnp.dtype("bfloat16")), tiny.arrays_of(exact)
    unstack_layers(spec, arrays)
    prompts = [prompts_of((9,))[0]] * rows
    found = generate_all(
        spec, arrays, prompts, max_new_tokens=12, sampling=sampling, vocab_size=300
    )
    assert [len(row) for row in found] == [12] * rows
    assert all(token < 300 for row in found for token in row)
    if sampling.temperature == 0:
        assert all(row == found[0] for row in found)


def test_adapters_are_merged_into_the_weights_once():
    model = port(tiny.make_torch_model("qwen2", 3))
    lora = LoraConfig(rank=4, alpha=6.0, target_modules=("q_proj", "down_proj"))
    rng = np.random.default_rng(0)
    table = adapter_weights(lora, model.spec.arch)
    start = {n: jnp.asarray(rng.normal(size=w.shape), jnp.float32) for n, w in table.items()}
    stacked = tiny.arrays_of(model)
    arrays = stacked | start
    unstack_layers(replace(model.spec, lora_scale=1.5), arrays)
    assert len(start) == 4 and not any(map(is_adapter, arrays))
    for i in range(model.spec.arch.num_hidden_layers):
        for name in layer_weights(model.spec.arch):
            want = np.asarray(stacked[f"layers.{name}"][i])
            module = f"layers.{name.removesuffix('.weight')}"
            if name.endswith(".weight") and f"{module}.lora_A" in start:
                A, B = (np.asarray(start[f"{module}.{factor}"][i]) for factor in FACTORS)
                want = merge(want, (A, B), 1.5)
            got = arrays[f"layers.{i}.{name}"]
            np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5, err_msg=name)


@pytest.mark.slow
def test_stacked_layers_and_many_devices_generate_the_same_tokens():
    model, prompts = port(tiny.make_torch_model("llama", 3)), prompts_of((7, 40, 1, 3))
    stacked = tiny.arrays_of(model)
    want = generate_all(model.spec, stacked, prompts, max_new_tokens=20)
    apart = dict(stacked)
    unstack_layers(model.spec, apart)
    assert generate_all(model.spec, apart, prompts, max_new_tokens=20) == want
    layout = Layout(make_mesh(MeshConfig(data=2, fsdp=2, tensor=2), 4))
    spec = replace(model.spec, layout=layout)
    placed = {
        name: jax.device_put(stacked[name], layout.sharding(weight.dims, weight.shape))
        for name, weight in weights(spec.arch).items()
    }
    assert generate_all(spec, placed, prompts, max_new_tokens=20) == want
    unstack_layers(spec, placed)
    assert generate_all(spec, placed, prompts, max_new_tokens=20) == want


def decoding_programs(devices):
    """Returns the traced prefill and step of a bfloat16 model over two axes of four devices."""
    config = tiny.make_config(hidden_size=256, head_dim=64, intermediate_size=256, vocab_size=512)
    arch = read_architecture(config, "tiny")
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=2), 2, devices)
    spec = tiny.make_spec(arch, "bfloat16", attention="splash", layout=Layout(mesh))
    table = {name: weight for name, weight in weights(arch).items() if "layers." not in name}
    for i in range(arch.num_hidden_layers):
        table |= {f"layers.{i}.{name}": weight for name, weight in layer_weights(arch).items()}
    arrays = abstract_weights(table, spec.layout, "bfloat16")
    everywhere = replicated(mesh)

    def abstract(shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=everywhere)

    program = DecodingProgram(
        spec=spec, sampling=Sampling(), vocab_size=arch.vocab_size, length=192, by_sums=False
    )
    empty = decoding.empty_slots.trace(program, 2, np.int32([[1]])).out_info
    slots = jax.tree.map(lambda x: abstract(x.shape, x.dtype), empty)
    two = abstract((2,), jnp.int32)
    prompts = (abstract((2, 128), jnp.int32), abstract((2, 2), jnp.int32), two)
    prefill = decoding.admit.trace(program, arrays, slots, *prompts, abstract((2, 2), jnp.uint32))
    return prefill, decoding.advance.trace(program, arrays, slots, np.int32(0), np.int32(9))


@pytest.mark.parametrize(
    "dtype, by_sums", [("float32", True), ("float32", False), ("bfloat16", False)]
)
def test_a_token_attends_to_the_cache_and_to_itself(dtype, by_sums):
    """Sums, as on a CPU, and matmuls, as elsewhere, against float64 NumPy."""
    B, K, G, H, T = 3, 2, 2, 8, 5
    arch = read_architecture(tiny.make_config(), "tiny")
    spec = tiny.make_spec(arch, dtype)
    program = DecodingProgram(
        spec=spec, sampling=Sampling(), vocab_size=9, length=T, by_sums=by_sums
    )
    rng = np.random.default_rng(0)
    shapes = ((B, 1, K * G, H), (B, K, H, T), (B, K, T, H), (B, 1, K, H), (B, 1, K, H))
    q, keys, values, k, v = (
        np.asarray(jnp.asarray(rng.normal(size=shape), dtype), np.float64) for shape in shapes
    )
    mask = np.arange(T) < np.array([[0], [2], [5]])
    all_keys = np.concatenate([keys, np.moveaxis(k, 1, 3)], axis=3)
    all_values = np.concatenate([values, np.swapaxes(v, 1, 2)], axis=2)
    z = np.einsum("bkgh,bkht->bkgt", q.reshape(B, K, G, H), all_keys) / H**0.5
    seen = np.concatenate([mask, np.ones((B, 1), bool)], axis=1)[:, None, None]
    weights = np.where(seen, np.exp(z), 0)
    want = np.einsum("bkgt,bkth->bkgh", weights / weights.sum(-1, keepdims=True), all_values)
    given = [jnp.asarray(x, dtype) for x in (q, keys, values, k, v)]
    got = decoding.attend_token(program, given[0], given[1:3], given[3:], jnp.asarray(mask))
    assert got.dtype == dtype
    tolerance = 2e-6 if dtype == "float32" else 3e-2  # weights and result are rounded
    np.testing.assert_allclose(got.reshape(want.shape).astype(float), want, atol=tolerance)


@pytest.mark.parametrize("by_sums", [True, False])
def test_attention_over_a_cache_has_the_models_dtype(by_sums):
    """Whatever the cache's: the layers after it would compute in float32."""
    arch = read_architecture(tiny.make_config(), "tiny")
    spec = tiny.make_spec(arch, "bfloat16")
    program = DecodingProgram(
        spec=spec, sampling=Sampling(), vocab_size=9, length=5, by_sums=by_sums
    )
    cache = jnp.ones((3, 2, 5, 8), program.cache_dtype)
    queries, mask = jnp.ones((3, 2, 4, 8), spec.dtype), jnp.ones((3, 2, 5), bool)
    out = decoding.attend_cache(program, queries, cache, cache, mask)
    assert out.dtype == spec.dtype and (out == 1).all()


def test_decoding_lowers_for_tpus_with_their_attention_kernel():
    prefill, step = decoding_programs(jax.devices()[:4])
    assert "tpu_custom_call" in prefill.lower(lowering_platforms=("tpu",)).as_text()
    assert "sdy" in step.lower(lowering_platforms=("tpu",)).as_text()


@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="libtpu is not installed")
def test_decoding_compiles_for_four_tpu_chips():
    topology = find_topology("v5e:2x2")
    prepare(topology)
    for program in decoding_programs(devices_of(topology)):
        assert program.lower().compile().memory_analysis().temp_size_in_bytes > 0


@pytest.mark.parametrize("size", [1, 7, 300, 320, 4096])
def test_the_place_of_the_maximum_is_the_first_one(size):
    x = np.random.default_rng(0).integers(0, 4, (5, size)).astype(np.float32)
    np.testing.assert_array_equal(argmax(jnp.asarray(x)), x.argmax(axis=1))


def frequencies(sampling, logits, count=4000):
    keys = jax.random.key_data(jax.random.split(jax.random.key(0), count))
    rows = jnp.broadcast_to(logits[None], (count, len(logits)))
    tokens, _ = jax.jit(draw, static_argnums=1)(rows, sampling, keys, jnp.arange(count))
    return np.bincount(np.asarray(tokens), minlength=len(logits)) / count


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


def test_ties_and_far_tails_are_treated_as_transformers_does():
    rng = np.random.default_rng(1)
    logits = (rng.normal(size=(40, 320)) * rng.choice([1, 30], (40, 1))).astype(np.float32)
    logits[:5] = np.round(logits[:5])  # ties
    for options in ({"top_p": 0.9}, {"top_p": 1e-6}, {"top_k": 1}, {"top_k": 7}):
        shifted = jnp.asarray(logits - logits.max(axis=1, keepdims=True))
        sampling = Sampling(temperature=1.0, **options)
        kept = np.asarray(_kept(shifted, jnp.exp(shifted), sampling)) > 0
        scores = torch.tensor(logits)
        for name, make in (("top_k", TopKLogitsWarper), ("top_p", TopPLogitsWarper)):
            scores = make(options[name])(None, scores) if name in options else scores
        want = (scores.softmax(-1) > 0).numpy()
        np.testing.assert_array_equal(kept[5:], want[5:], err_msg=str(options))
        assert (kept[:5] >= want[:5]).all()  # of tied tokens transformers may drop some


def test_temperature_zero_takes_the_likeliest():
    logits = jnp.asarray([[0.0, 3.0, 1.0], [5.0, 3.0, 1.0]])
    keys = jnp.zeros((2, 2), jnp.uint32)
    greedy = jax.jit(draw, static_argnums=1)
    tokens, log_probs = greedy(logits, Sampling(), keys, jnp.zeros(2, jnp.int32))
    assert tokens.tolist() == [1, 0]
    want = torch.tensor(np.asarray(logits)).log_softmax(-1).max(-1).values.numpy()
    np.testing.assert_allclose(log_probs, want, atol=1e-6)
