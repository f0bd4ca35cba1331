"""Adapters: PEFT's own layer, initialisation, names and merge, and float64 NumPy."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file, save_file
from tiny import logits

from kd_jax.config import LoraConfig, MeshConfig, UserError
from kd_jax.config.run import LINEAR_NAMES
from kd_jax.models.architecture import read_architecture
from kd_jax.models.decoder import Decoder, Linear
from kd_jax.models.lora import init_adapters, merge
from kd_jax.models.weight_table import (
    FACTORS,
    FUSED,
    abstract_weights,
    hf_names,
    is_adapter,
    weights,
)
from kd_jax.parallel.mesh import Layout, make_mesh
from kd_jax.weights import adapters, load
from kd_jax.weights import folder as weights_folder
from kd_jax.weights.adapters import peft_name

pytestmark = pytest.mark.devices(8)

CONFIG = tiny.make_config()
ARCH = read_architecture(CONFIG, "config")
TOKENS = np.arange(40, dtype=np.int32).reshape(2, 20) % 37
PLACES = (np.broadcast_to(np.arange(20, dtype=np.int32), (2, 20)), np.ones((2, 20), np.int32))


def random_arrays():
    rng = np.random.default_rng(0)
    return {
        path: jnp.asarray(rng.standard_normal(w.shape, np.float32) / w.shape[-1] ** 0.5)
        for path, w in weights(ARCH).items()
    }


def random_model():
    return Decoder(tiny.make_spec(ARCH), random_arrays())


def adapted(config, start=None, seed=0):
    return with_adapters(ARCH, random_arrays(), config, start, seed)


def with_adapters(arch, arrays, config, start=None, seed=0):
    """Returns a decoder with adapters, in their first values or those of `start`."""
    spec = tiny.make_spec(arch, lora_scale=config.alpha / config.rank, dropout=config.dropout)
    return Decoder(spec, arrays | (start or init_adapters(config, arch, seed)))


def compute(decoder):
    return np.asarray(jax.jit(logits)(decoder, TOKENS, *PLACES))


def test_adapters_change_nothing_before_training():
    plain = compute(random_model())
    decoder = adapted(LoraConfig(rank=4, target_modules=LINEAR_NAMES))
    np.testing.assert_array_equal(compute(decoder), plain)
    arrays = tiny.arrays_of(decoder)
    grown = {name: x + 0.1 for name, x in arrays.items() if is_adapter(name)}
    changed = adapted(LoraConfig(rank=4, target_modules=LINEAR_NAMES), grown)
    assert np.abs(compute(changed) - plain).max() > 0.1


@pytest.mark.parametrize("targets", [("q_proj",), ("down_proj", "k_proj"), LINEAR_NAMES])
def test_the_target_projections_get_float32_factors_and_no_others(targets):
    arrays = tiny.arrays_of(adapted(LoraConfig(rank=5, target_modules=targets)))
    expected = {}
    for path, weight in weights(ARCH).items():
        if path.removesuffix(".weight").endswith(targets):
            L, num_out, num_in = weight.shape
            module = path.removesuffix(".weight")
            expected |= {f"{module}.lora_A": (L, 5, num_in), f"{module}.lora_B": (L, num_out, 5)}
    factors = {name: x for name, x in arrays.items() if is_adapter(name)}
    assert {name: x.shape for name, x in factors.items()} == expected
    assert all(x.dtype == jnp.float32 for x in factors.values())
    assert arrays.keys() - factors.keys() == weights(ARCH).keys()


def test_each_factor_a_is_its_own_draw_and_follows_the_seed():
    config = LoraConfig(rank=4, target_modules=LINEAR_NAMES)
    first, again, other = (tiny.arrays_of(adapted(config, seed=seed)) for seed in (0, 0, 1))
    rows = [x[i, 0, :64] for n, x in first.items() if n.endswith("lora_A") for i in range(3)]
    assert len({row.tobytes() for row in map(np.asarray, rows)}) == len(rows) == 21
    for name in filter(is_adapter, first):
        np.testing.assert_array_equal(first[name], again[name])
        assert name.endswith("lora_B") or (first[name] != other[name]).any()


def peft_model(rank=4, seed=1, random_b=True, family="llama", **options):
    """Returns PEFT's model around transformers' tiny model, float32, B random where asked."""
    import peft
    import torch

    options = {"target_modules": list(LINEAR_NAMES), "lora_alpha": 6, **options}
    theirs = peft.get_peft_model(
        tiny.make_torch_model(family, seed),
        peft.LoraConfig(r=rank, task_type="CAUSAL_LM", **options),
    )
    torch.manual_seed(seed)
    for name, weight in theirs.named_parameters():
        if "lora_B" in name and random_b:
            torch.nn.init.normal_(weight, std=0.2)
    return theirs


def test_factors_begin_as_in_peft():
    theirs = peft_model(rank=64, random_b=False).state_dict()
    ours = tiny.arrays_of(adapted(LoraConfig(rank=64, target_modules=LINEAR_NAMES)))
    for name in filter(is_adapter, ours):
        names = [peft_name(n).replace(".weight", ".default.weight") for n in hf_names(name, ARCH)]
        want, got = np.stack([theirs[n].numpy() for n in names]), np.asarray(ours[name])
        assert got.shape == want.shape and got.dtype == want.dtype
        if name.endswith("lora_B"):
            assert not want.any() and not got.any()
            continue
        bound = 1 / want.shape[-1] ** 0.5  # of kaiming_uniform_(a=sqrt(5))
        for x in (want, got):
            assert 0.999 * bound < np.abs(x).max() <= bound
        # 12,288 draws at least: the quantiles of one distribution differ by a few hundredths.
        at = np.linspace(0, 1, 21)
        np.testing.assert_allclose(
            np.quantile(got, at), np.quantile(want, at), rtol=0, atol=0.05 * bound
        )


def make_linear(seed=0, dropout=0.0, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    W, A, B, x = (rng.standard_normal(shape) for shape in ((5, 7), (3, 7), (5, 3), (2, 4, 7)))
    return linear_of(W, A, B, 8 / 3, dropout, dtype), jnp.asarray(x, dtype)


def linear_of(W, A, B, scale, dropout=0.0, dtype=jnp.float32):
    arrays = {
        "mlp.up_proj.weight": jnp.asarray(W, dtype),
        "mlp.up_proj.lora_A": jnp.asarray(A, jnp.float32),
        "mlp.up_proj.lora_B": jnp.asarray(B, jnp.float32),
    }
    spec = tiny.make_spec(ARCH, dtype, lora_scale=scale, dropout=dropout)
    return Linear(spec, arrays, "mlp.up_proj")


def by_definition(linear, x, x_low):
    """y = x Wᵀ + scale (x_low Aᵀ) Bᵀ in float64."""
    W, A, B = (
        np.asarray(p[...], np.float64) for p in (linear.weight, linear.lora_A, linear.lora_B)
    )
    x, x_low = np.asarray(x, np.float64), np.asarray(x_low, np.float64)
    return x @ W.T + linear.spec.lora_scale * (x_low @ A.T) @ B.T


def test_the_output_is_that_of_the_definition():
    linear, x = make_linear()
    np.testing.assert_allclose(linear(x), by_definition(linear, x, x), rtol=0, atol=1e-5)
    half, x = make_linear(dtype=jnp.bfloat16)
    assert half(x).dtype == jnp.bfloat16


def seen_by_adapter(x, key, dropout):
    """Returns what A was given, solved from the output where A and B are identities."""
    linear = linear_of(np.zeros((7, 7)), np.eye(7), np.eye(7), 1.0, dropout)
    return np.asarray(linear(x, key))


def test_dropout_zeroes_inputs_of_a_and_scales_the_rest():
    p, key = 0.25, jax.random.key(0)
    x = jax.random.normal(jax.random.key(1), (8, 64, 7))
    inside = seen_by_adapter(x, key, p)
    kept = inside != 0
    np.testing.assert_allclose(inside[kept], np.asarray(x)[kept] / (1 - p), rtol=1e-6)
    # 3,584 draws: five standard deviations of their mean are 0.036.
    assert abs(kept.mean() - (1 - p)) < 0.036

    full, x = make_linear(dropout=p)
    low = seen_by_adapter(x, key, p)
    np.testing.assert_allclose(full(x, key), by_definition(full, x, low), rtol=0, atol=1e-5)


def test_dropout_follows_its_key_and_is_off_without_one():
    linear, x = make_linear(dropout=0.5)
    one, two = jax.random.key(1), jax.random.key(2)
    np.testing.assert_array_equal(linear(x, one), linear(x, one))
    assert (linear(x, one) != linear(x, two)).any()
    np.testing.assert_allclose(linear(x), by_definition(linear, x, x), rtol=0, atol=1e-5)
    linear, x = make_linear(dropout=0.0)
    np.testing.assert_allclose(linear(x, one), by_definition(linear, x, x), rtol=0, atol=1e-5)


def test_the_decoder_passes_its_dropout_key_down():
    config = LoraConfig(rank=4, dropout=0.5, target_modules=("q_proj",))
    grown = {
        name: x + 0.3 for name, x in tiny.arrays_of(adapted(config)).items() if is_adapter(name)
    }
    decoder = adapted(config, grown)
    run = jax.jit(lambda decoder, key: decoder(TOKENS, *PLACES, key))
    off = run(decoder, None)
    outputs = [run(decoder, jax.random.key(seed)) for seed in (0, 0, 1)]
    np.testing.assert_array_equal(outputs[0], outputs[1])
    assert (outputs[0] != outputs[2]).any() and (outputs[0] != off).any()


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_merging_rounds_once_from_float32(dtype):
    rng = np.random.default_rng(0)
    W = rng.standard_normal((48, 32)).astype(dtype)
    A, B = rng.standard_normal((4, 32), np.float32), rng.standard_normal((48, 4), np.float32)
    exact = W.astype(np.float64) + 0.7 * (B.astype(np.float64) @ A.astype(np.float64))
    got = merge(W, (A, B), 0.7)
    assert got.dtype == dtype
    # Half a unit in the last place, and float32's own error of the sum.
    ulp = np.abs(np.spacing(exact.astype(np.float32))).astype(np.float64)
    ulp *= 2.0 ** {2: 13 if dtype == np.float16 else 16, 4: 0}[np.dtype(dtype).itemsize]
    assert (np.abs(got.astype(np.float64) - exact) <= 0.5 * ulp + 4e-6).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_merging_nothing_keeps_every_bit(dtype):
    kind = f"u{np.dtype(dtype).itemsize}"
    if np.dtype(dtype).itemsize == 2:
        every = np.arange(2**16)  # denormals, infinities, both zeros
    else:
        every = np.random.default_rng(0).integers(0, 2**32, 2**16)
    W = every.astype(kind).view(dtype).reshape(256, 256)
    with np.errstate(invalid="ignore"):  # a signalling NaN warns, and is no weight
        W = np.where(np.isnan(W), dtype(-0.0), W)
    A = np.random.default_rng(1).standard_normal((4, 256), np.float32)
    got = merge(W, (A, np.zeros((256, 4), np.float32)), 2.0)
    np.testing.assert_array_equal(got.view(kind), W.view(kind))


def save_peft(folder, **options):
    theirs = peft_model(**options)
    theirs.save_pretrained(folder)
    return theirs


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True, "rank": 7, "lora_alpha": 3, "exclude_modules": ["q_proj"]},
        {"target_modules": r".*\.(q|up)_proj"},
        {"target_modules": ["q_proj", "mlp.down_proj"], "layers_to_transform": [0, 2]},
        {"family": "qwen3", "target_modules": "all-linear", "init_lora_weights": "gaussian"},
        {"family": "phi3", "target_modules": "all-linear"},
    ],
    ids=str,
)
def test_merged_at_load_equals_pefts_merge(options, tmp_path):
    theirs = save_peft(tmp_path / "adapter", **options)
    base = tiny.make_torch_model(options.get("family", "llama"), 1)
    base.save_pretrained(tmp_path / "base")
    arch = weights_folder.load_architecture(tmp_path / "base")
    adapter = adapters.load_adapter(tmp_path / "adapter", arch)
    layout = Layout(make_mesh(MeshConfig(data=2, fsdp=2, tensor=2), 8))
    abstract = abstract_weights(weights(arch), layout, "float32")
    ours = load.load_arrays(tmp_path / "base", arch, abstract, adapter=adapter)
    plain, merged = base.state_dict(), theirs.merge_and_unload().state_dict()
    changed = 0
    for path, array in ours.items():
        for layer, name in enumerate(hf_names(path, arch)):
            got = np.asarray(array[layer] if weights(arch)[path].is_stacked else array)
            np.testing.assert_allclose(got, merged[name].numpy(), rtol=0, atol=1e-6, err_msg=name)
            changed += not np.array_equal(plain[name], merged[name])
    assert 2 * changed == len(adapter.factors) > 0


@pytest.mark.parametrize(
    "family, use_rslora",
    [
        ("llama", True),
        ("phi3", False),
        ("gemma3_text", False),
        *(pytest.param(x, False, marks=pytest.mark.slow) for x in ("qwen2", "granite", "olmo2")),
    ],
)
def test_going_on_from_pefts_factors_computes_what_peft_does(family, use_rslora, tmp_path):
    import torch

    first, *_ = names = ["qkv_proj" if family == "phi3" else "q_proj", "down_proj"]
    options = {"use_rslora": use_rslora, "target_modules": names}
    theirs = save_peft(tmp_path / "adapter", family=family, **options).eval()
    tiny.make_torch_model(family, 1).save_pretrained(tmp_path / "base")
    arch = weights_folder.load_architecture(tmp_path / "base")
    adapter = adapters.load_adapter(tmp_path / "adapter", arch)
    parts = FUSED.get(first, (first,))
    assert adapter.config.target_modules == (*parts, "down_proj")
    assert adapter.config.alpha / adapter.config.rank == pytest.approx(
        6 / (2 if use_rslora else 4), abs=1e-12
    )
    layout = Layout(make_mesh(MeshConfig(), 8))
    abstract = abstract_weights(weights(arch), layout, "float32")
    arrays = load.load_arrays(tmp_path / "base", arch, abstract)
    start = adapters.stack_adapter(adapter, arch)
    decoder = with_adapters(arch, arrays, adapter.config, start)
    got = compute(decoder)
    with torch.no_grad():
        want = theirs(torch.tensor(TOKENS, dtype=torch.long)).logits.numpy()
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4 * np.abs(want).max())


def test_our_names_are_those_in_pefts_file(tmp_path):
    save_peft(tmp_path, target_modules=["k_proj", "gate_proj"])
    arrays = tiny.arrays_of(adapted(LoraConfig(target_modules=("k_proj", "gate_proj"))))
    ours = {peft_name(n) for path in filter(is_adapter, arrays) for n in hf_names(path, ARCH)}
    assert ours == load_file(tmp_path / "adapter_model.safetensors").keys()


@pytest.fixture
def adapter(tmp_path):
    """A plain adapter of two projections in PEFT's form, written without torch or peft."""
    names = [f"model.layers.{i}.self_attn.{m}" for i in range(3) for m in ("q_proj", "v_proj")]
    tensors = {}
    for name in names:
        num_out = 64 if "q_proj" in name else 32
        tensors[peft_name(f"{name}.lora_A")] = np.ones((4, 64), np.float32)
        tensors[peft_name(f"{name}.lora_B")] = np.ones((num_out, 4), np.float32)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "bias": "none"}
    config["target_modules"] = ["q_proj", "v_proj"]
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    return tmp_path


def edit(adapter, drop=(), add=None, **config):
    tensors = load_file(adapter / "adapter_model.safetensors")
    for name in drop:
        del tensors[name]
    save_file(tensors | (add or {}), adapter / "adapter_model.safetensors")
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))


FIRST_A, FIRST_B = (peft_name(f"model.layers.0.self_attn.q_proj.{f}") for f in FACTORS)
UNFIT = {
    "dora": ({"use_dora": True}, "use_dora: expected False, got True"),
    "bias": ({"bias": "lora_only"}, "bias: expected 'none', got 'lora_only'"),
    "modules_to_save": ({"modules_to_save": ["lm_head"]}, "modules_to_save: expected None"),
    "rank_pattern": ({"rank_pattern": {"q_proj": 2}}, "rank_pattern: expected {}"),
    "alpha_pattern": ({"alpha_pattern": {"q_proj": 2}}, "alpha_pattern: expected {}"),
    "pissa": ({"init_lora_weights": "pissa"}, "init_lora_weights: expected True, got 'pissa'"),
    "another method": ({"peft_type": "IA3"}, "peft_type: expected 'LORA', got 'IA3'"),
    "layer_replication": ({"layer_replication": [[0, 2]]}, "layer_replication: unknown"),
    "lora_bias": ({"lora_bias": True}, "lora_bias: unknown, got True"),
    "activated": ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens: unknown"),
    "no rank": ({"r": None}, "r: expected a whole number of at least 1, got None"),
    "no alpha": ({"lora_alpha": "x"}, "above 0 and below 1e9, got 'x'"),
    "infinite alpha": ({"lora_alpha": float("inf")}, "lora_alpha: expected a number above 0"),
    "huge rank": ({"r": 10**30}, "r: expected a whole number"),
    "layers_pattern": ({"layers_pattern": "h"}, "layers_pattern: expected None, got 'h'"),
    "number": ({"target_modules": 8}, "target_modules: expected names or a regular expression"),
    "numbers": ({"exclude_modules": [8]}, "exclude_modules: expected names or a regular"),
    "no layers": ({"layers_to_transform": ["a"]}, "layers_to_transform: expected whole numbers"),
    "endless expression": (
        {"target_modules": r"(\w|\.|_|[a-z])*[XYZ]"},
        "not a usable regular expression (not matched in",
    ),
    "rank": ({"r": 2}, f"misshapen: {FIRST_A}: expected [2, 64], got [4, 64]"),
    "shape": (
        {"add": {FIRST_B: np.ones((32, 4), np.float32)}},
        f"misshapen: {FIRST_B}: expected [64, 4], got [32, 4]",
    ),
    "factor missing": ({"drop": [FIRST_B]}, f"missing: {FIRST_B}"),
    "layer missing": ({"drop": [FIRST_A, FIRST_B]}, f"missing: {FIRST_A}"),
    "module missing": (
        {"target_modules": ["q_proj", "v_proj", "up_proj"]},
        f"missing: {peft_name('model.layers.2.mlp.up_proj.lora_A')}",
    ),
    "not a target": ({"target_modules": ["q_proj"]}, "unexpected: base_model.model.model.layers.0"),
    "unknown tensor": (
        {"add": {"base_model.model.lm_head.lora_A.weight": np.ones((4, 64), np.float32)}},
        "unexpected: base_model.model.lm_head.lora_A.weight",
    ),
    "unknown module": (
        {"target_modules": ["q_proj", "v_proj", "lm_head"]},
        f"target_modules: expected some of {', '.join(LINEAR_NAMES)}, got ['lm_head']",
    ),
    "no match": ({"target_modules": "query"}, "got query"),
    "bad expression": ({"target_modules": "(q"}, "not a usable regular expression"),
    "no targets": ({"target_modules": None}, "no projection is left to adapt"),
}  # fmt: skip


@pytest.mark.parametrize("case", UNFIT)
def test_an_adapter_that_cannot_be_honoured_is_refused_by_name(case, adapter):
    assert len(adapters.load_adapter(adapter, ARCH).factors) == 12
    change, message = UNFIT[case]
    edit(adapter, **change)
    with pytest.raises(UserError) as error:
        adapters.load_adapter(adapter, ARCH)
    assert str(error.value).startswith(f"{adapter / 'adapter_config.json'}: ")
    assert message in str(error.value)


def test_all_that_is_wrong_with_an_adapter_is_listed(adapter):
    edit(adapter, drop=[FIRST_A], use_dora=True, bias="all", lora_bias=True, r=8)
    with pytest.raises(UserError) as error:
        adapters.load_adapter(adapter, ARCH)
    lines = str(error.value).splitlines()[1:]
    assert [line.split(":")[0].strip() for line in lines] == [
        "use_dora", "bias", "lora_bias", "missing", *["misshapen"] * 11
    ]  # fmt: skip


@pytest.mark.parametrize(
    "options", [{"use_dora": True}, {"layer_replication": [[0, 2], [1, 3]]}], ids=str
)
def test_what_peft_writes_for_other_methods_is_refused(options, tmp_path):
    save_peft(tmp_path, **options)
    with pytest.raises(UserError, match=next(iter(options))):
        adapters.load_adapter(tmp_path, ARCH)


def test_training_cannot_go_on_from_factors_in_some_layers_only(adapter):
    gone = [
        peft_name(f"model.layers.1.self_attn.{name}.{factor}")
        for name in ("q_proj", "v_proj")
        for factor in FACTORS
    ]
    edit(adapter, drop=gone, layers_to_transform=[0, 2])
    with pytest.raises(UserError) as error:
        adapters.stack_adapter(adapters.load_adapter(adapter, ARCH), ARCH)
    for name in ("q_proj", "v_proj"):
        assert f"layers.self_attn.{name}: none in layers 1" in str(error.value)


def test_a_folder_without_an_adapter_is_refused(adapter):
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(UserError, match="pickled weights"):
        adapters.load_adapter(adapter, ARCH)
    (adapter / "adapter_config.json").unlink()
    with pytest.raises(
        UserError, match=r"adapter_config.json: expected a PEFT adapter, got adapter_model.bin"
    ):
        adapters.load_adapter(adapter, ARCH)


@pytest.mark.parametrize(
    "dtype, remat, tolerance, names",
    [
        ("float32", "layer", 1e-4, LINEAR_NAMES),
        pytest.param("bfloat16", "dots", 3e-2, ("q_proj", "down_proj"), marks=pytest.mark.slow),
    ],
)
def test_a_weight_and_its_adapter_in_one_product_are_as_in_two(dtype, remat, tolerance, names):
    """Joined on one CPU device, not on two."""
    plain = adapted(LoraConfig(rank=4, target_modules=names))
    spec = replace(plain.spec, dtype=jnp.dtype(dtype), remat=remat)
    two = replace(spec, layout=Layout(make_mesh(MeshConfig(), 2, jax.devices()[:2])))
    arrays = {n: x + 0.02 if is_adapter(n) else x for n, x in tiny.arrays_of(plain).items()}

    def gradients(spec, arrays):
        def score(arrays):
            return jnp.sum(jnp.sin(Decoder(spec, arrays)(TOKENS, *PLACES).astype(jnp.float32)))

        return jax.jit(jax.grad(score))(arrays)

    want, got = gradients(two, arrays), gradients(spec, arrays)
    for name, value in want.items():
        scale = np.abs(value).max()
        np.testing.assert_allclose(got[name], value, atol=tolerance * scale, rtol=0, err_msg=name)
    if dtype == "bfloat16":
        return
    wrong = gradients(replace(spec, lora_scale=2.2), arrays)  # twin: 2.0 is right
    found = [name for name in want if name.endswith("lora_B")]
    gaps = [np.abs(wrong[name] - want[name]).max() / np.abs(want[name]).max() for name in found]
    assert min(gaps) > tolerance


def test_only_rows_on_one_device_are_multiplied_so():
    spec, rows = random_model().spec, jnp.zeros((2, 5, 3))
    two = replace(spec, layout=Layout(make_mesh(MeshConfig(), 2, jax.devices()[:2])))
    assert spec.joins_adapters(rows) and not two.joins_adapters(rows)
    assert not spec.joins_adapters(rows[:, :1])  # decoding
