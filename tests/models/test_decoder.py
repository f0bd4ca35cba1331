"""The decoder against transformers, in float32, over the whole vocabulary."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch
from flax import nnx
from tiny import logits

from kd_jax.config import MeshConfig
from kd_jax.inference.unstacking import unstack_layers
from kd_jax.models import decoder as model_module
from kd_jax.models.architecture import FAMILIES, read_architecture
from kd_jax.models.decoder import Attention, Decoder, activate, rotate
from kd_jax.models.rope import Rope
from kd_jax.models.weight_table import abstract_weights, weights
from kd_jax.parallel.mesh import Layout, make_mesh
from kd_jax.weights.folder import load_architecture
from kd_jax.weights.load import load_arrays

# Both sides round float32 sums of a few hundred terms in different orders.
TOLERANCE = 1e-4
SCALINGS = {
    "factor 8": {**tiny.LLAMA3, "factor": 8.0},
    "factor 32": tiny.LLAMA3,
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "unscaled": tiny.DEFAULT_ROPE,
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 1e4,
        "factor": 4.0,
        "beta_fast": 8.0,
        "original_max_position_embeddings": 512,
    },
}
SHAPES = {
    "tied": {"tie_word_embeddings": True},
    "untied": {"tie_word_embeddings": False},
    "explicit head_dim": {"head_dim": 24},
    "one key head": {"num_key_value_heads": 1},
    "no groups": {"num_key_value_heads": 4},
    "biases": {"attention_bias": True, "mlp_bias": True},
}

ON = {"use_sliding_window": True, "sliding_window": 7}
WINDOWS = [
    ("mistral", {"sliding_window": 12}),
    ("qwen2", {**ON, "max_window_layers": 2}),
    ("qwen3", {**ON, "layer_types": ["sliding_attention", "full_attention", "full_attention"]}),
]
PLACES = (np.zeros((2, 48), np.int32),) * 3


def port(torch_model, **options):
    """Returns our decoder with a transformers model's weights, float32."""
    state = {name: value.numpy() for name, value in torch_model.state_dict().items()}
    arch = read_architecture(torch_model.config.to_dict(), "config")
    arrays = {}
    for path in weights(arch):
        if path.startswith("layers."):
            names = [f"model.layers.{i}.{path[7:]}" for i in range(arch.num_hidden_layers)]
            arrays[path] = jnp.asarray(np.stack([state[name] for name in names]))
        else:
            arrays[path] = jnp.asarray(state[path if "lm_head" in path else f"model.{path}"])
    return Decoder(tiny.make_spec(arch, **options), arrays)


def some_tokens(rows=2, length=48):
    """Returns tokens and positions, [rows, length]; the second half lies beyond 8,192."""
    tokens = np.random.default_rng(0).integers(0, 320, (rows, length))
    positions = np.arange(length) + np.where(np.arange(length) < length // 2, 0, 20_000)
    return tokens.astype(np.int32), np.broadcast_to(positions, tokens.shape).astype(np.int32)


def torch_logits(torch_model, tokens, positions):
    with torch.no_grad():
        out = torch_model(
            torch.tensor(tokens),
            position_ids=torch.tensor(positions),
            attention_mask=torch.ones(tokens.shape),  # one document, although positions jump
        )
    return out.logits.float().numpy()


def our_logits(decoder, tokens, positions, segment_ids=None):
    if segment_ids is None:
        segment_ids = np.ones_like(tokens)
    run = jax.jit(lambda *inputs: logits(*inputs))  # a new function: some tests patch the model
    return np.asarray(run(decoder, tokens, positions, segment_ids))


def distance(torch_model, decoder):
    """Returns the largest difference of any logit, relative to the largest logit."""
    tokens, positions = some_tokens()
    if decoder.spec.arch.layer_windows:  # transformers measures windows in places
        positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    theirs = torch_logits(torch_model, tokens, positions)
    assert theirs.std() > 1
    return np.abs(our_logits(decoder, tokens, positions) - theirs).max() / np.abs(theirs).max()


@pytest.mark.parametrize(
    "family, shape",
    [("llama", x) for x in SHAPES]
    + [("qwen3", "explicit head_dim")]
    + [(family, "tied") for family in FAMILIES if family != "llama"]
    + [("gemma3_text", "untied")],
)
def test_logits_equal_transformers(family, shape):
    theirs = tiny.make_torch_model(family, 3, **SHAPES[shape])
    assert distance(theirs, port(theirs)) < TOLERANCE


@pytest.mark.parametrize("family, change", WINDOWS)
def test_windows_equal_transformers(family, change):
    theirs = tiny.make_torch_model(family, 3, **change)
    ours = port(theirs)
    assert distance(theirs, ours) < TOLERANCE
    windows = ours.spec.arch.layer_windows
    for wrong in ((), tuple(x and x + 1 for x in windows), tuple(reversed(windows))):
        if wrong != windows:
            arch = dataclasses.replace(ours.spec.arch, layer_windows=wrong)
            model = Decoder(dataclasses.replace(ours.spec, arch=arch), tiny.arrays_of(ours))
            assert distance(theirs, model) > 10 * TOLERANCE


def test_a_window_as_long_as_the_rows_leaves_the_program_as_it_is():
    texts = [
        jax.jit(logits).lower(port(tiny.make_torch_model("mistral", 3, sliding_window=w)), *PLACES)
        for w in (None, 48, 47)
    ]
    assert texts[0].as_text() == texts[1].as_text() != texts[2].as_text()


FAULTS = [
    ("granite", {"embedding_multiplier": 1.0}),
    ("granite", {"residual_multiplier": 1.0}),
    ("granite", {"logits_scaling": 1.0}),
    ("granite", {"attention_scale": None}),
    ("smollm3", {"other_rope_layers": (True, False, True)}),
    ("smollm3", {"other_rope": None, "other_rope_layers": ()}),
    ("phi3", {"rope": Rope(theta=1e4)}),
    ("gemma3_text", {"norm_offset": 0.0}),
    ("gemma3_text", {"hidden_act": "silu"}),
    ("gemma3_text", {"other_rope": Rope(theta=1e6)}),
    ("gemma3_text", {"embedding_multiplier": 1.0}),
    ("gemma3_text", {"layer_windows": ()}),
]


@pytest.mark.slow
@pytest.mark.parametrize("family, change", FAULTS, ids=str)
def test_a_wrong_constant_of_a_family_is_seen(family, change):
    theirs = tiny.make_torch_model(family, 3)
    ours = port(theirs)
    arch = dataclasses.replace(ours.spec.arch, **change)
    model = Decoder(dataclasses.replace(ours.spec, arch=arch), tiny.arrays_of(ours))
    assert distance(theirs, model) > 10 * TOLERANCE


@pytest.mark.parametrize(
    "family, names",
    [
        ("llama", ("self_attn.o_proj.bias", "mlp.down_proj.bias")),
        ("olmo2", ("post_attention_layernorm.weight", "post_feedforward_layernorm.weight")),
        ("gemma3_text", ("post_attention_layernorm.weight", "pre_feedforward_layernorm.weight")),
        ("phi3", ("mlp.gate_up_proj.weight",)),
        ("phi3", ("self_attn.qkv_proj.weight",)),
    ],
)
def test_swapped_weights_of_a_family_are_seen(family, names):
    theirs = tiny.make_torch_model(family, 3, **SHAPES["biases"] if family == "llama" else {})
    ours = port(theirs)
    arrays = tiny.arrays_of(ours)
    first, last = f"layers.{names[0]}", f"layers.{names[-1]}"
    if len(names) == 2:
        arrays[first], arrays[last] = arrays[last], arrays[first]
    else:  # parts of a fused projection in another order
        arrays[first] = jnp.roll(arrays[first], arrays[first].shape[1] // 2, axis=1)
    assert distance(theirs, Decoder(ours.spec, arrays)) > 10 * TOLERANCE


@pytest.mark.parametrize("scaling", SCALINGS)
def test_rotary_scalings_equal_transformers(scaling):
    theirs = tiny.make_torch_model("llama", 3, rope_parameters=SCALINGS[scaling])
    assert distance(theirs, port(theirs)) < TOLERANCE


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_a_folder_that_transformers_wrote_computes_what_it_computes_there(family, tmp_path):
    theirs = tiny.make_torch_model(family, 3)
    theirs.save_pretrained(tmp_path)
    arch = load_architecture(tmp_path)
    layout = Layout(make_mesh(MeshConfig(), 8))
    arrays = load_arrays(tmp_path, arch, abstract_weights(weights(arch), layout, "float32"))
    decoder = Decoder(tiny.make_spec(arch, layout=layout), arrays)
    assert distance(theirs, decoder) < TOLERANCE


def by_pair(tables):
    """Returns cos and sin of each pair, which the tables have twice."""
    return (table[..., table.shape[-1] // 2 :] for table in tables)


def interleaved(x, *tables):
    cos, sin = by_pair(tables)
    first, second = x[..., ::2], x[..., 1::2]
    return jnp.stack([first * cos - second * sin, second * cos + first * sin], -1).reshape(x.shape)


def swapped_halves(x, *tables):
    cos, sin = by_pair(tables)
    second, first = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def without_causal_mask(q, k, v, *_, **__):
    return jax.nn.dot_product_attention(q, k, v)


@pytest.mark.parametrize(
    "name, wrong",
    [("rotate", interleaved), ("rotate", swapped_halves), ("attention", without_causal_mask)],
)
def test_a_wrong_formula_is_seen(name, wrong, monkeypatch):
    theirs = tiny.make_torch_model("llama", 3)
    monkeypatch.setattr(model_module, name, wrong)
    assert distance(theirs, port(theirs)) > 10 * TOLERANCE


@pytest.mark.parametrize("name", ["q_proj", "k_proj", "o_proj"])
def test_a_transposed_projection_is_seen(name):
    theirs = tiny.make_torch_model("llama", 3, num_key_value_heads=4)
    decoder = port(theirs)
    weight = getattr(decoder.layers.self_attn, name).weight
    weight[...] = jnp.swapaxes(weight[...], 1, 2)
    assert distance(theirs, decoder) > 10 * TOLERANCE


@pytest.mark.parametrize("name", ["q_proj", "k_proj", "v_proj"])
def test_a_lost_bias_is_seen(name):
    theirs = tiny.make_torch_model("qwen2", 3)
    decoder = port(theirs)
    getattr(decoder.layers.self_attn, name).bias = None
    assert distance(theirs, decoder) > 10 * TOLERANCE


@pytest.mark.parametrize("name", ["q_norm", "k_norm"])
def test_a_head_norm_without_its_weight_is_seen(name):
    theirs = tiny.make_torch_model("qwen3", 3)
    decoder = port(theirs)
    weight = getattr(decoder.layers.self_attn, name).weight
    weight[...] = jnp.ones_like(weight[...])
    assert distance(theirs, decoder) > 10 * TOLERANCE


def test_swapped_or_lost_head_norms_are_seen():
    theirs = tiny.make_torch_model("qwen3", 3)
    swapped, lost = port(theirs), port(theirs)
    block = swapped.layers.self_attn
    block.q_norm, block.k_norm = block.k_norm, block.q_norm
    assert distance(theirs, swapped) > 10 * TOLERANCE
    lost.layers.self_attn.q_norm = lost.layers.self_attn.k_norm = None
    assert distance(theirs, lost) > 10 * TOLERANCE


def test_a_head_norm_after_the_rotation_is_seen(monkeypatch):
    def norm_late(self, x, rope, attend, kind, keys):
        q, k, v = self._project(x, keys)
        q, k = self.q_norm(rotate(q, *rope)), self.k_norm(rotate(k, *rope))
        out, made = attend(q, k, v, kind.window)
        return self.o_proj(out.reshape(*x.shape[:2], -1)), made

    theirs = tiny.make_torch_model("qwen3", 3)
    monkeypatch.setattr(Attention, "__call__", norm_late)
    assert distance(theirs, port(theirs)) > 10 * TOLERANCE


@pytest.mark.parametrize("family", ["qwen2", "phi3", "gemma3_text"])
def test_every_array_gets_a_gradient(family):
    """Biases, fused projections, norms of all kinds."""
    tokens, positions = some_tokens(rows=1)
    model = port(tiny.make_torch_model(family, 3))
    arrays = tiny.arrays_of(model)

    def score(arrays):
        return jnp.sum(jnp.sin(Decoder(model.spec, arrays)(tokens, positions, 0 * tokens)))

    for name, gradient in jax.jit(jax.grad(score))(arrays).items():
        if name != "embed_tokens.weight":
            assert (np.abs(gradient).max(axis=tuple(range(1, gradient.ndim))) > 0).all(), name


@pytest.mark.parametrize(
    "change",
    [
        {"rms_norm_eps": 0.1},
        {"rope_parameters": {**tiny.LLAMA3, "low_freq_factor": 2.0}},
        {"rope_parameters": {**tiny.LLAMA3, "high_freq_factor": 8.0}},
        {"rope_parameters": {**tiny.LLAMA3, "original_max_position_embeddings": 2048}},
        {"rope_parameters": {**tiny.LLAMA3, "rope_theta": 10000.0}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
    ],
    ids=str,
)
def test_each_constant_of_config_json_is_used(change):
    theirs = tiny.make_torch_model("llama", 3)
    ours = port(theirs)
    changed = read_architecture({**theirs.config.to_dict(), **change}, "config")
    spec = dataclasses.replace(ours.spec, arch=changed)
    assert distance(theirs, Decoder(spec, tiny.arrays_of(ours))) > 10 * TOLERANCE


def test_both_spellings_of_rope_give_one_architecture():
    config = tiny.make_torch_model("llama", 3).config.to_dict()
    old = {name: value for name, value in config.items() if name != "rope_parameters"}
    scaling = {name: value for name, value in tiny.LLAMA3.items() if name != "rope_theta"}
    old |= {"rope_theta": tiny.LLAMA3["rope_theta"], "rope_scaling": scaling}
    assert read_architecture(old, "old") == read_architecture(config, "new")


def test_packed_documents_do_not_see_each_other():
    decoder = port(tiny.make_torch_model("llama", 3))
    tokens, _ = some_tokens(rows=1, length=30)
    lengths = (7, 13, 10)
    positions = np.concatenate([np.arange(n) for n in lengths])[None].astype(np.int32)
    segment_ids = np.repeat([1, 2, 3], lengths)[None].astype(np.int32)
    packed = our_logits(decoder, tokens, positions, segment_ids)[0]
    start = 0
    for length in lengths:
        here = slice(start, start + length)
        alone = our_logits(decoder, tokens[:, here], positions[:, here])[0]
        np.testing.assert_allclose(packed[here], alone, atol=1e-4 * np.abs(alone).max(), rtol=0)
        start += length


def test_a_token_sees_its_documents_past_and_nothing_else():
    decoder = port(tiny.make_torch_model("llama", 3))
    tokens, _ = some_tokens(rows=1, length=12)
    segment_ids = np.repeat([1, 2], 6)[None].astype(np.int32)
    positions = np.tile(np.arange(6), 2)[None].astype(np.int32)
    arrays = tiny.arrays_of(decoder)

    def score(embedded):  # one embedding for each place, so that its gradient is that place's
        changed = Decoder(decoder.spec, arrays | {"embed_tokens.weight": embedded})
        place = np.arange(12, dtype=np.int32)[None]
        return jnp.sum(changed(place, positions, segment_ids)[0, 8] ** 2)

    embedded = arrays["embed_tokens.weight"][tokens[0]]
    seen = np.abs(np.asarray(jax.jit(jax.grad(score))(embedded))).max(axis=1)
    assert (seen[6:9] > 0).all()
    assert (seen[:6] == 0).all() and (seen[9:] == 0).all()


def test_remat_changes_no_gradient():
    theirs = tiny.make_torch_model("llama", 3)
    tokens, positions = some_tokens(rows=1)

    def gradient(policy):
        model = port(theirs, remat=policy)

        def score(arrays):
            return jnp.sum(jnp.sin(Decoder(model.spec, arrays)(tokens, positions, 0 * tokens)))

        return jax.jit(jax.grad(score))(tiny.arrays_of(model))

    plain = gradient("none")
    for remat in ("dots", "attention", "layer"):
        recomputed = gradient(remat)
        for name, value in plain.items():
            atol = 1e-5 * np.abs(value).max()
            np.testing.assert_allclose(
                recomputed[name], value, atol=atol, err_msg=f"{remat} {name}"
            )


@pytest.mark.parametrize("family", ["llama", "granite", "gemma3_text"])
def test_bfloat16_stays_near_float32(family):
    theirs = tiny.make_torch_model(family, 3)
    exact = port(theirs)
    half = {name: x.astype(jnp.bfloat16) for name, x in tiny.arrays_of(exact).items()}
    rounded = Decoder(dataclasses.replace(exact.spec, dtype=jnp.dtype("bfloat16")), half)
    tokens, positions = some_tokens()
    # transformers' own model in bfloat16 is the measure of what rounding does here.
    torch_half = torch_logits(theirs.to(torch.bfloat16), tokens, positions)
    want = our_logits(exact, tokens, positions)
    ours = our_logits(rounded, tokens, positions)
    assert ours.dtype == np.float32
    assert np.abs(ours - want).max() < 1.5 * np.abs(torch_half - want).max()


@pytest.mark.parametrize("family", FAMILIES)
def test_flax_names_the_arrays_as_the_table_does(family):
    decoder = port(tiny.make_torch_model(family, 3, tie_word_embeddings=False))
    arrays = tiny.arrays_of(decoder)
    assert arrays.keys() == weights(decoder.spec.arch).keys()
    again = tiny.arrays_of(Decoder(decoder.spec, arrays))
    assert all(again[name] is arrays[name] for name in arrays)
    assert hash(decoder.spec) == hash(dataclasses.replace(decoder.spec))  # static under jit
    graph, state = nnx.split(decoder)
    assert tiny.arrays_of(nnx.merge(graph, state)).keys() == arrays.keys()


@pytest.mark.parametrize("family", ["smollm3", "gemma3_text"])
def test_layers_apart_compute_what_stacked_ones_do(family):
    """Where layers differ; tests/inference/test_decoding.py has all families' apart."""
    decoder = port(tiny.make_torch_model(family, 3))
    apart = tiny.arrays_of(decoder)
    unstack_layers(decoder.spec, apart)
    tokens, positions = some_tokens()
    want = our_logits(decoder, tokens, positions)
    got = our_logits(Decoder(decoder.spec, apart), tokens, positions)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())


def test_a_bfloat16_activation_is_rounded_once_as_in_torch():
    x = jnp.asarray(np.random.default_rng(0).normal(size=10_000) * 4, jnp.bfloat16)
    in_torch = torch.from_numpy(np.asarray(x, np.float32)).to(torch.bfloat16)
    expected = torch.nn.functional.silu(in_torch).float().numpy()
    got = np.asarray(jax.jit(activate, static_argnums=0)("silu", x), np.float32)
    # A float32 result at the edge between two bfloat16 values can be rounded to either.
    assert np.count_nonzero(got != expected) < 20
    np.testing.assert_allclose(got, expected, rtol=2**-7)
