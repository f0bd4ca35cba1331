"""config.json: every key is honoured, refused by name, or ignored for a listed reason."""

import pytest
import tiny

from kd_jax import architecture as architecture_module
from kd_jax.architecture import read_architecture
from kd_jax.config import UserError

pytestmark = pytest.mark.fast

CONFIG = {
    **tiny.SHAPE,
    "model_type": "llama",
    "tie_word_embeddings": True,
    "rope_parameters": tiny.LLAMA3,
}


def architecture(**changes):
    return read_architecture({**CONFIG, **changes}, "config.json")


OTHER_VALUES = {
    "vocab_size": 322,
    "hidden_size": 128,
    "intermediate_size": 98,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-4,
    "head_dim": 32,
    "hidden_act": "gelu",
    "model_type": "mistral",
    "rope_parameters": tiny.DEFAULT_ROPE,
    "tie_word_embeddings": False,
    "attention_bias": True,
    "attention_dropout": 0.1,
    "mlp_bias": True,
}


def test_every_key_that_transformers_writes_is_honoured_refused_or_listed_as_ignored():
    from transformers import LlamaConfig

    for key in LlamaConfig().to_dict():
        if key in OTHER_VALUES:
            try:
                assert architecture(**{key: OTHER_VALUES[key]}) != architecture(), key
            except UserError as error:
                assert f"{key}: expected" in str(error)
        else:
            assert key in architecture_module._IGNORED, key
            assert architecture(**{key: "anything"}) == architecture(), key


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
    "model_type": "qwen2",
    "hidden_act": "gelu",
    "attention_bias": True,
    "mlp_bias": True,
    "sliding_window": 4096,
    "quantization_config": {"quant_method": "bitsandbytes"},
    "layer_types": ["full_attention"],
    "use_qk_norm": True,
    "rope_scaling": {"rope_type": "yarn", "factor": 4.0},
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


@pytest.mark.parametrize("kind", ["yarn", "linear", "dynamic", "longrope"])
@pytest.mark.parametrize("spelling", ["type", "rope_type"])
def test_other_rotary_scalings_are_refused_by_name(kind, spelling):
    with pytest.raises(UserError, match=f"rope_type: expected .* got '{kind}'"):
        architecture(rope_parameters=None, rope_scaling={spelling: kind})


@pytest.mark.parametrize("key", ["vocab_size", "hidden_size", "rms_norm_eps", "model_type"])
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
        ("rms_norm_eps", None),
        ("rms_norm_eps", "1e-5"),
        ("tie_word_embeddings", "yes"),
        ("hidden_size", 66),
        ("attention_dropout", 0.1),
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
        {"rope_type": "llama3", "rope_theta": 1e4, "factor": None},
        {**tiny.LLAMA3, "low_freq_factor": 0},
        {**tiny.LLAMA3, "low_freq_factor": 4.0},
        {"rope_type": "default", "rope_theta": 1e4, "factor": 8.0},
        {**tiny.LLAMA3, "beta_fast": 32},
        "llama3",
    ],
    ids=str,
)
def test_a_rope_of_no_use_is_refused(rope):
    with pytest.raises(UserError, match=r"rope"):
        architecture(rope_parameters=rope)
