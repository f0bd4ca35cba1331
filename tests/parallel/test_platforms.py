"""One table decides what runs on which platform, by the devices that a program is for."""

import ast

import jax
import pytest
from paths import ROOT

from kd_jax.config import UserError
from kd_jax.parallel import platforms
from kd_jax.parallel.experimental import KNOWN_VERSIONS, experimental
from kd_jax.parallel.platforms import PLATFORMS, by_platform

pytestmark = pytest.mark.fast


@pytest.mark.parametrize("trait", ["wide_products", "one_pass_softmax"])
@pytest.mark.parametrize("name", PLATFORMS)
def test_a_program_takes_the_form_of_the_devices_that_it_is_lowered_for(name, trait):
    run = by_platform(trait, jax.numpy.sin, jax.numpy.cos)
    row = PLATFORMS[name]
    text = jax.jit(run).trace(1.0).lower(lowering_platforms=(row.lowering,)).as_text()
    assert ("sine" in text.replace("cosine", "")) == getattr(row, trait)
    assert ("cosine" in text) != getattr(row, trait)


@pytest.mark.parametrize(
    "platform, features, dtype",
    [
        ("cpu", {"avx2", "amx_bf16"}, "bfloat16"),
        ("cpu", {"avx512f", "avx512_bf16"}, "bfloat16"),
        ("cpu", {"avx512f"}, "float32"),
        ("gpu", set(), "bfloat16"),
        ("tpu", set(), "bfloat16"),
    ],
)
def test_auto_is_the_dtype_that_the_device_multiplies_faster(
    monkeypatch, platform, features, dtype
):
    monkeypatch.setattr(platforms, "cpu_features", lambda: features)
    assert platforms.choose_dtype("auto", platform) == dtype
    assert {platforms.choose_dtype(x, platform) for x in ("bfloat16", "float32")} == {
        "bfloat16",
        "float32",
    }


def test_nothing_is_decided_by_the_default_backend():
    for file in (ROOT / "kd_jax").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            name = getattr(node, "attr", getattr(node, "id", ""))
            assert name != "default_backend", file
            if name == "platform_dependent":
                assert file.name == "platforms.py", file


def test_an_experimental_name_that_jax_removed_is_an_error_with_the_versions_that_have_it():
    assert callable(experimental("jax.experimental.topologies", "get_topology_desc"))
    kernel = experimental("jax.experimental.pallas.ops.tpu", "splash_attention")
    assert callable(kernel.make_splash_mha_single_device)
    for module, name in (("jax.experimental.topologies", "gone"), ("jax.experimental.gone", "x")):
        with pytest.raises(UserError) as error:
            experimental(module, name)
        assert all(version in str(error.value) for version in (*KNOWN_VERSIONS, jax.__version__))
        assert f"{module}.{name}" in str(error.value)
