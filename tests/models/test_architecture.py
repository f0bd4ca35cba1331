"""config.json: every key is honoured, refused by name, or ignored for a listed reason."""

import math
import re

import numpy as np
import pytest
import tiny
from num_weights import NUM_WEIGHTS
from published_configs import NAMED_SMALLER, PUBLISHED, PUBLISHED_REFUSED, WARNED

from kd_jax.config import UserError
from kd_jax.models.architecture import FAMILIES, read_architecture
from kd_jax.models.known import KNOWN_MODELS
from kd_jax.models.weight_table import weights

CONFIG = tiny.make_config()
SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
)  # fmt: skip


def architecture(family="llama", **changes):
    return read_architecture(tiny.make_config(family, **changes), "config.json")


OTHER_VALUES = {
    "vocab_size": 322,
    "hidden_size": 128,
    "intermediate_size": 98,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-4,
    "head_dim": 48,
    "hidden_act": "gelu",
    "model_type": "gpt2",
    "rope_parameters": {"rope_type": "default", "rope_theta": 123.0},
    "tie_word_embeddings": False,
    "attention_bias": True,
    "mlp_bias": True,
    "is_encoder_decoder": True,
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.5,
    "attention_multiplier": 0.7,
    "logits_scaling": 3.0,
    "query_pre_attn_scalar": 99,
    "no_rope_layers": [1, 0, 0],
    "no_rope_layer_interval": 3,
    "hidden_activation": "gelu",
    "use_bidirectional_attention": True,
    "final_logit_softcapping": 30.0,
    "attn_logit_softcapping": 50.0,
    "layer_types": ["sliding_attention"] * 3,
}
# Keys of sliding windows and dropout, which have tests of their own below.
ELSEWHERE = {"sliding_window", "use_sliding_window", "max_window_layers", "attention_dropout"}
ELSEWHERE |= {"resid_pdrop", "embd_pdrop"}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_key_that_transformers_writes_is_honoured_refused_or_ignored(family, capsys):
    from transformers import AutoConfig

    plain = architecture(family)
    for key in AutoConfig.for_model(family).to_dict().keys() - ELSEWHERE:
        if key in OTHER_VALUES:
            try:
                assert architecture(family, **{key: OTHER_VALUES[key]}) != plain, key
            except UserError as error:
                assert f"{key}: expected" in str(error)
        else:
            assert architecture(family, **{key: "anything"}) == plain, key
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_defaults_are_read_without_a_warning(family, capsys):
    from transformers import AutoConfig

    window = {} if family == "gemma3_text" else {"sliding_window": None}
    theirs = AutoConfig.for_model(family, **window).to_dict()
    arch, rope = read_architecture(theirs, "theirs"), theirs["rope_parameters"]
    theta = rope.get("full_attention", rope)["rope_theta"]
    assert (arch.rms_norm_eps, arch.rope.theta) == (theirs["rms_norm_eps"], theta)
    sizes = {key: theirs[key] for key in tiny.SHAPE if key in SIZES}
    written = sizes | {"model_type": family} | window
    assert read_architecture(written, "sizes alone") == arch
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("hub_id", KNOWN_MODELS)
def test_models_of_the_hub_have_the_number_of_weights_on_their_cards(hub_id):
    config = KNOWN_MODELS[hub_id]
    arch = read_architecture(config, hub_id)
    assert sum(math.prod(w.shape) for w in weights(arch).values()) == NUM_WEIGHTS[hub_id]
    assert arch.rope.theta == config["rope_theta"]
    assert arch.qkv_bias == (config["model_type"] == "qwen2")
    assert arch.qk_norm == ("head" if config["model_type"] == "qwen3" else "none")


@pytest.mark.parametrize("hub_id", KNOWN_MODELS)
def test_the_hubs_spelling_and_that_of_transformers_5_give_one_architecture(hub_id):
    from transformers import AutoConfig

    config = KNOWN_MODELS[hub_id]
    new = AutoConfig.for_model(**config).to_dict()
    assert "rope_parameters" in new and "rope_theta" not in new
    assert read_architecture(new, "new") == read_architecture(config, "old")


@pytest.mark.parametrize("hub_id", PUBLISHED)
def test_a_published_config_is_read_as_transformers_reads_it(hub_id, capsys):
    from transformers import AutoConfig

    config = PUBLISHED[hub_id]
    arch = read_architecture(config, hub_id)
    warning = WARNED.get(hub_id, "")
    assert capsys.readouterr().err.count("\n") == (1 if warning else 0)
    assert read_architecture(AutoConfig.for_model(**config).to_dict(), "theirs") == arch
    assert warning in capsys.readouterr().err
    size = re.search(r"(\d+(?:\.\d+)?)([bm])\b", hub_id.lower().replace("_", "-"))
    if size:
        count = float(size[1]) * {"b": 1e9, "m": 1e6}[size[2]]
        count = NAMED_SMALLER.get(hub_id, count)
        found = sum(math.prod(w.shape) for w in weights(arch).values())
        assert found == pytest.approx(count, rel=0.25)


@pytest.mark.parametrize("hub_id", PUBLISHED_REFUSED)
def test_a_published_config_is_refused_for_the_right_reasons_alone(hub_id):
    config, reasons = PUBLISHED_REFUSED[hub_id]
    with pytest.raises(UserError) as error:
        read_architecture(config, hub_id)
    lines = str(error.value).splitlines()[1:]
    assert [line.split(":")[0].strip() for line in lines] == reasons


@pytest.mark.parametrize("family", FAMILIES)
def test_keys_that_are_left_out_mean_what_they_mean_to_transformers(family):
    from transformers import AutoConfig

    for key in ("num_key_value_heads", "head_dim", "tie_word_embeddings", "rope_parameters"):
        # 64 heads, because transformers' own number of key/value heads must divide them.
        config = tiny.make_config(family, num_attention_heads=64, hidden_size=128)
        config.pop(key, None)
        theirs = AutoConfig.for_model(**config).to_dict()
        assert read_architecture(config, "ours") == read_architecture(theirs, "theirs"), key


@pytest.mark.parametrize("scaling", [None, tiny.LLAMA3, {**tiny.LLAMA3, "factor": 8.0}])
def test_the_old_spelling_of_rope_means_what_transformers_makes_of_it(scaling):
    from transformers import LlamaConfig

    old = {key: value for key, value in CONFIG.items() if key != "rope_parameters"}
    old |= {"rope_theta": 12345.0, "rope_scaling": scaling and dict(scaling)}
    if scaling:
        del old["rope_scaling"]["rope_theta"]
    new = LlamaConfig(**old).to_dict()
    assert "rope_scaling" not in new
    assert read_architecture(old, "old") == read_architecture(new, "new")
    assert read_architecture(old, "old").rope.theta == 12345.0


REFUSED = {
    "model_type": "gpt2",
    "hidden_act": "gelu",
    "attention_bias": True,
    "mlp_bias": True,
    "sliding_window": 4096,
    "quantization_config": {"quant_method": "bitsandbytes"},
    "layer_types": ["full_attention"],
    "use_qk_norm": True,
    "rope_scaling": {"rope_type": "longrope", "factor": 4.0},
    "num_key_value_heads": 3,
}


def test_everything_that_the_decoder_does_not_do_is_refused_at_once():
    with pytest.raises(UserError) as error:
        architecture(**REFUSED, rope_parameters=None)
    lines = str(error.value).splitlines()
    assert lines[0] == "config.json: this model cannot be run as configured:"
    for key in {**REFUSED, "rope_type": 0}.keys() - {"rope_scaling"}:
        assert any(line.startswith(f"  {key}: ") for line in lines), key
    assert len(lines) == len(REFUSED) + 1


@pytest.mark.parametrize("kind", ["su", "longrope", "mrope", ["linear"], 8])
@pytest.mark.parametrize("spelling", ["type", "rope_type"])
def test_other_rotary_scalings_are_refused_by_name(kind, spelling):
    with pytest.raises(UserError, match="rope_type: expected .* got " + re.escape(repr(kind))):
        architecture(rope_parameters=None, rope_scaling={spelling: kind})


@pytest.mark.parametrize("key", [*SIZES, "model_type"])
def test_a_missing_key_is_named(key):
    config = {name: value for name, value in CONFIG.items() if name != key}
    with pytest.raises(UserError, match=f"{key}: "):
        read_architecture(config, "config.json")


@pytest.mark.parametrize(
    "key, value",
    [
        ("vocab_size", None),
        ("vocab_size", "320"),
        ("num_attention_heads", 0),
        ("num_hidden_layers", -1),
        ("num_key_value_heads", 2.0),
        ("head_dim", 15),
        ("num_hidden_layers", 10**9),
        ("hidden_size", 4096.0),
        ("vocab_size", True),
        ("intermediate_size", 2**40),
        ("tie_word_embeddings", 1),
        ("rms_norm_eps", None),
        ("rms_norm_eps", math.inf),
        ("rms_norm_eps", math.nan),
        ("rms_norm_eps", 10**400),
        ("rms_norm_eps", True),
        ("model_type", ["llama"]),
        ("rms_norm_eps", "1e-5"),
        ("tie_word_embeddings", "yes"),
        ("hidden_size", 66),
        ("attention_dropout", "0.1"),
        ("attention_dropout", math.nan),
        ("hidden_dropout", 2.0),
    ],
)
def test_a_value_of_no_use_is_named(key, value):
    with pytest.raises(UserError, match=f"\n  {key}: expected"):
        architecture(**{key: value})


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default", "rope_theta": None},
        {"rope_type": "default", "rope_theta": "big"},
        {"rope_type": "default", "rope_theta": math.inf},
        {"rope_type": "default", "rope_theta": math.nan},
        {"rope_type": "default", "rope_theta": 10**400},
        {"rope_type": "default", "rope_theta": True},
        {"rope_type": "linear", "rope_theta": 1e4},
        {"rope_type": "linear", "rope_theta": 1e4, "factor": "4"},
        {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 0},
        {**tiny.LLAMA3, "factor": math.inf},
        {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
        {"rope_type": "llama3", "rope_theta": 1e4, "factor": None},
        {**tiny.LLAMA3, "low_freq_factor": 0},
        {**tiny.LLAMA3, "low_freq_factor": 4.0},
        {"rope_type": "default", "rope_theta": 1e4, "factor": 8.0},
        {**tiny.LLAMA3, "beta_fast": 32},
        {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "truncate": False},
        "llama3",
    ],
    ids=str,
)
def test_a_rope_of_no_use_is_refused(rope):
    with pytest.raises(UserError, match=r"rope"):
        architecture(rope_parameters=rope)


ON = {"use_sliding_window": True, "sliding_window": 8}
FULL, SLIDING = ["full_attention"] * 3, ["full_attention", "sliding_attention", "full_attention"]


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
@pytest.mark.parametrize(
    "change",
    [
        {"use_sliding_window": False, "sliding_window": 8, "max_window_layers": 0},
        {"use_sliding_window": True, "sliding_window": None, "max_window_layers": 0},
        {**ON, "max_window_layers": 3},
        {"layer_types": FULL},
        {"layer_types": None},
    ],
    ids=str,
)
def test_a_sliding_window_that_no_layer_has_changes_nothing(family, change):
    from transformers import AutoConfig

    assert set(AutoConfig.for_model(**tiny.make_config(family, **change)).layer_types) == {FULL[0]}
    assert architecture(family, **change) == architecture(family)


@pytest.mark.parametrize(
    "family, change",
    [
        ("mistral", {"sliding_window": 8}),
        ("qwen2", {**ON, "max_window_layers": 2}),
        ("qwen2", {**ON, "max_window_layers": 0}),
        ("qwen3", {**ON, "layer_types": SLIDING}),
    ],
    ids=str,
)
def test_windows_are_those_of_transformers(family, change):
    from transformers import AutoConfig

    theirs = AutoConfig.for_model(**tiny.make_config(family, **change))
    types = getattr(theirs, "layer_types", [SLIDING[1]] * 3)
    want = tuple(theirs.sliding_window if name == SLIDING[1] else None for name in types)
    assert architecture(family, **change).layer_windows == want
    assert read_architecture(theirs.to_dict(), "theirs") == architecture(family, **change)


@pytest.mark.parametrize(
    "family, change, named",
    [
        ("qwen3", {**ON, "max_window_layers": None}, "max_window_layers"),
        ("qwen3", {**ON, "sliding_window": 0}, "sliding_window"),
        ("qwen3", {**ON, "layer_types": ["sliding"] * 3}, "layer_types"),
        ("qwen3", {"layer_types": SLIDING}, "layer_types"),
        ("qwen2", {"layer_types": FULL[:2]}, "layer_types"),
        ("mistral", {"sliding_window": "4096"}, "sliding_window"),
        ("mistral", {"sliding_window": 4096, "layer_types": SLIDING}, "layer_types"),
        ("mistral", {"use_sliding_window": True}, "use_sliding_window"),
        ("llama", {"sliding_window": 4096}, "sliding_window"),
        ("llama", {"layer_types": SLIDING}, "layer_types"),
        ("llama", {"use_sliding_window": True}, "use_sliding_window"),
        ("mistral", {"attention_bias": True}, "attention_bias"),
        ("qwen3", {"attention_bias": "yes"}, "attention_bias"),
        ("granite", {"logits_scaling": 0}, "logits_scaling"),
        ("smollm3", {"no_rope_layers": [1, 0]}, "no_rope_layers"),
        ("smollm3", {"no_rope_layers": [1, 0, 2]}, "no_rope_layers"),
        ("smollm3", {"no_rope_layer_interval": 0}, "no_rope_layer_interval"),
        ("smollm3", ON, "sliding_window"),
        ("phi3", {"rope_parameters": {"partial_rotary_factor": 2}}, "partial_rotary_factor"),
        ("gemma3_text", {"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ("gemma3_text", {"hidden_activation": "silu"}, "hidden_activation"),
        ("gemma3_text", {"sliding_window_pattern": 0}, "sliding_window_pattern"),
        ("qwen2", {"hidden_act": "gelu"}, "hidden_act"),
    ],
    ids=str,
)
def test_what_would_change_the_computation_is_refused_by_name(family, change, named):
    with pytest.raises(UserError, match=f"\n  {named}: expected"):
        architecture(family, **change)


@pytest.mark.parametrize("kind, factor", [("linear", 2.0), ("yarn", 4.0)])
def test_a_scaled_rope_turns_no_more_of_a_head_than_its_share(kind, factor):
    scaled = {"rope_type": kind, "rope_theta": 1e4, "factor": factor, "partial_rotary_factor": 0.5}
    rope = architecture("phi3", rope_parameters=scaled).rope
    assert len(rope.inverse_frequencies(64)) == 16


def test_an_older_mistral_without_the_key_has_a_window():
    config = tiny.make_config("mistral")
    del config["sliding_window"]
    assert read_architecture(config, "config.json").layer_windows == (4096,) * 3


def test_another_model_type_is_told_which_there_are():
    known = re.escape("|".join(FAMILIES))
    with pytest.raises(UserError, match=f"model_type: expected {known}, got"):
        architecture(model_type="gemma3")


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_act": "swish"},
        {"hidden_activation": "silu", "activation_function": None},
        {"partial_rotary_factor": 1},
        {"pretraining_tp": 2, "pruned_heads": {}, "is_causal": True, "num_experts": 0},
        {"logits_scaling": 1.0, "attn_logit_softcapping": None, "rope_interleaved": False},
        {"unk_token_id": 0, "_anything": [1], "_attn_implementation_autoset": True},
        {"unsloth_anything": 1, "transformers.js_config": {"dtype": "q4"}, "tokenizer_class": "x"},
        {"rope_parameters": {**tiny.LLAMA3, "type": "linear"}},
        {"attention_dropout": 0.0, "resid_pdrop": None},
        {"use_sliding_window": False, "sliding_window": 8},
        {"rope_parameters": {**tiny.LLAMA3, "truncate": True}},
    ],
    ids=str,
)
def test_what_changes_nothing_is_ignored_without_a_word(change, capsys):
    assert architecture(**change) == architecture()
    assert capsys.readouterr().err == ""


def test_generation_defaults_of_old_configs_are_ignored_without_a_word(capsys):
    from transformers import GenerationConfig

    old = {"max_length": 4096, "do_sample": True, "temperature": 0.7, "bad_words_ids": [[1]]}
    old |= {"use_bfloat16": True, "torchscript": True, "finetuning_task": "x", "num_beams": 4}
    new = {key: 1 for key in GenerationConfig().to_dict()}
    for key, value in {**old, **new}.items():
        assert architecture(**{key: value}) == architecture()
        assert capsys.readouterr().err == "", key


def test_an_unknown_key_is_one_warning_that_names_it(capsys):
    assert architecture(foo=3, my_note="x" * 200, bar=None, attention_dropout=0.1) == architecture()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("warning: config.json: unknown keys: foo 3, my_note 'xxx")
    assert lines[0].endswith("Assumed not to change what the model computes")
    assert len(lines[0]) < 250
    assert lines[1].endswith(
        "attention_dropout 0.1: dropout is not applied, not in training either"
    )


@pytest.mark.parametrize(
    "change",
    [
        {"final_logit_softcapping": 30.0},
        {"use_qk_norm": True},
        {"quantization_config": {"quant_method": "gptq"}},
        {"quantization": {"bits": 4}},
        {"embedding_multiplier": 12.0},
        {"logit_scale": 0.0625},
        {"clip_qkv": 8.0},
        {"num_local_experts": 8},
        {"is_causal": False},
        {"rope_interleaved": True},
        {"partial_rotary_factor": math.nan},
        {"hidden_activation": "gelu"},
        {"hidden_act": None},
        {"rotary_pct": True},
        {"add_cross_attention": True},
    ],
    ids=str,
)
def test_a_key_known_to_change_the_computation_is_refused_by_name(change):
    with pytest.raises(UserError, match=f"\n  {next(iter(change))}: expected"):
        architecture(**change)


@pytest.mark.parametrize(
    "rope, most",  # max_position_embeddings, or other keys
    [
        ({"rope_type": "linear", "factor": 4.0}, 2048),
        ({"type": "linear", "factor": 1.0}, 2048),
        ({"type": "dynamic", "factor": 2.0}, 256),
        ({**tiny.LLAMA3, "factor": 8.0}, 2048),
        ({k: v for k, v in tiny.LLAMA3.items() if k != "original_max_position_embeddings"}, 2048),
        (tiny.LLAMA3, {"original_max_position_embeddings": 128}),
        ({"type": "yarn", "factor": 4.0}, {"original_max_position_embeddings": 128}),
    ],
    ids=str,
)
def test_frequencies_are_transformers(rope, most, capsys):
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = {key: value for key, value in CONFIG.items() if key != "rope_parameters"}
    config |= {"rope_scaling": dict(rope), "rope_theta": 1e4, "max_position_embeddings": 8192}
    config |= most if isinstance(most, dict) else {"max_position_embeddings": most}
    ours = read_architecture(config, "config.json")
    theirs = LlamaRotaryEmbedding(LlamaConfig(**config)).inv_freq.numpy()
    np.testing.assert_array_max_ulp(ours.rope.inverse_frequencies(ours.head_dim), theirs, 2)
    dynamic = "texts of at most 256 tokens" in capsys.readouterr().err
    assert dynamic == (rope.get("type") == "dynamic")
