"""The plan command: its reports, choices and errors."""

import dataclasses
import json
import re
import subprocess
import sys

import jax
import pytest
import tiny
from paths import CONFIGS

from kd_jax import plan
from kd_jax.config import UserError
from kd_jax.config.command import load_config, run_command
from kd_jax.planning import cost, mesh_choice, topology
from kd_jax.planning.chips import Topology, find_topology
from kd_jax.training import ahead

pytestmark = pytest.mark.devices(8)

MAIN = str(CONFIGS / "8b_to_1b.py")
FIELDS = {
    "fits", "peak_bytes_per_device", "limit_bytes_per_device", "argument_bytes_per_device",
    "temporary_bytes_per_device", "flops_per_step", "bound_step_seconds",
    "bound_tokens_per_second",
}  # fmt: skip


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """Restores the environment that planning for other devices changes."""
    monkeypatch.setattr(topology.os, "environ", dict(topology.os.environ))


@pytest.fixture(scope="module")
def tiny_config(tmp_path_factory):
    """A configuration whose models have only a config.json."""
    root = tmp_path_factory.mktemp("models")
    shape = {"num_attention_heads": 8, "num_key_value_heads": 8, "vocab_size": 328}
    for name, width in (("student", 64), ("teacher", 96)):
        (root / name).mkdir()
        config = tiny.make_config(hidden_size=width, head_dim=16, **shape)
        (root / name / "config.json").write_text(json.dumps(config))
    file = root / "config.py"
    file.write_text(f"""
from kd_jax.config import *
def get_config():
    return Config(
        workdir="unused", teacher=TeacherConfig(path="{root}/teacher"),
        student=StudentConfig(path="{root}/student"),
        data=DataConfig(path="unused", seq_len=128, batch_size=16), steps=1)
""")
    return str(file)


def report(capsys, *flags):
    """Returns the JSON object that the command prints."""
    assert run_command(plan.main, [*flags, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


# Mesh flags, and the collectives of a step on that mesh.
MESHES = {
    "data 8 x fsdp 1 x tensor 1": (("1", "1"), {"all-reduce"}, {"all-gather"}),
    "data 1 x fsdp 4 x tensor 2": (("4", "2"), {"all-reduce", "all-gather"}, set()),
}


@pytest.mark.parametrize(
    "mesh",
    [pytest.param(x, marks=pytest.mark.slow if "tensor 1" in x else ()) for x in MESHES],
)
def test_the_real_step_is_compiled_for_devices_that_fake_ones_stand_for(capsys, tiny_config, mesh):
    (fsdp, tensor), sent, not_sent = MESHES[mesh]
    flags = ("--topology", "cpu:8", "--mesh.fsdp", fsdp, "--mesh.tensor", tensor)
    exam = ("--eval.path", "d", "--eval.accuracy", "9999", "--eval.max-new-tokens", "9999")
    got = report(capsys, "--config", tiny_config, *flags, *exam)
    known = report(capsys, "--config", tiny_config, *flags, *exam, "--analytic")
    assert got["temporary_bytes_per_device"] == known["temporary_bytes_per_device"]  # of the exam
    assert FIELDS | {"compile_seconds", "largest_temporaries"} <= got.keys()
    assert got["method"] == "compiled" and got["devices"] == 8 and got["fits"]
    kinds = sum(got["bytes_by_kind"].values())
    assert kinds <= got["argument_bytes_per_device"] <= kinds + 100  # scalars
    total = got["argument_bytes_per_device"] + got["temporary_bytes_per_device"]
    assert total == got["peak_bytes_per_device"]
    assert got["largest_temporaries"][0]["num_bytes"] > 0
    found = {kind for kind, x in got["collectives"].items() if x["bytes"] > 0}
    assert sent <= found and not not_sent & found
    text = plan.describe(got)
    for words in (mesh, "fits: ", "teacher", "sent and received", *sent, ".py:"):
        assert words in text
    long = {"shape": "f32[8,128,128256,128256,1024]", "opcode": "collective-permute-start"}
    array = got["largest_temporaries"][0] | long
    text = plan.describe(got | {"largest_temporaries": [array]})
    assert " ".join([*long.values(), array["source"]]) in text


def test_estimates_need_no_jax():
    command = f"""
import sys
from kd_jax import plan
plan.main(["--config", {MAIN!r}, "--topology", "h200:1x8", "--analytic", "--json"])
assert "jax" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    got = json.loads(done.stdout)
    assert got.keys() >= FIELDS and got["method"] == "analytic"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.py")), ids=lambda path: path.stem)
@pytest.mark.parametrize("name", ["h200:1x8", "v5p-16"])
def test_every_configuration_fits_eight_large_devices(capsys, path, name):
    flags = ["--config", str(path), "--topology", name, "--analytic"]
    config = load_config(path)
    if config.student.path.startswith("runs/"):  # made of its teacher, on one device
        flags += ["--student.path", config.teacher.path, "--data.batch-size", "8"]
    got = report(capsys, *flags)
    assert got["fits"] and got["devices"] == 8
    bounds = got["bound_seconds"]
    assert got["bound_step_seconds"] == bounds[got["bound_by"]] == max(bounds.values())


def test_weights_are_split_where_memory_asks_for_it(capsys):
    flags = ("--config", MAIN, "--data.batch-size", "8", "--analytic")
    assert report(capsys, *flags, "--topology", "h200:1x8")["mesh"] == {
        "data": 8, "fsdp": 1, "tensor": 1,
    }  # fmt: skip
    small = report(capsys, *flags, "--topology", "v5e:2x4")
    assert small["mesh"]["fsdp"] > 1 and small["fits"]
    given = report(capsys, *flags, "--topology", "h200:1x8", "--mesh.fsdp", "4")
    assert given["mesh"]["fsdp"] == 4


def examples():
    """Returns the commands in docs/planning.md that need no compiler, and what they print."""
    text = (CONFIGS.parent / "docs" / "planning.md").read_text()
    found = re.findall(r"```console\n\$ python -m kd_jax\.plan (.*?)\n(.*?)```", text, re.S)
    return [(command, output) for command, output in found if "--analytic" in command]


@pytest.mark.parametrize("command, output", examples())
def test_the_documented_examples_are_what_the_command_prints(capsys, monkeypatch, command, output):
    monkeypatch.chdir(CONFIGS.parent)
    assert run_command(plan.main, command.split()) == 0
    lines = output.removesuffix("...\n").splitlines()
    assert len(lines) > 5 and capsys.readouterr().out.splitlines()[: len(lines)] == lines


def test_a_search_gives_what_fits_with_the_fastest_first(capsys):
    flags = ("--config", MAIN, "--topology", "v5e:2x4", "--analytic")
    got = report(capsys, *flags, "--search")
    found = got["search"]
    bounds = [x["bound_tokens_per_second"] for x in found]
    assert bounds == sorted(bounds, reverse=True) and all(mesh_choice.fits(x) for x in found)
    assert bounds[0] >= report(capsys, *flags)["bound_tokens_per_second"]
    same = ("mesh", "batch_size", "remat", "peak_bytes_per_device")
    assert [got[name] for name in same] == [found[0][name] for name in same]


@pytest.mark.parametrize("flags", [("--topology", "h20:1x8"), ("--topology", "v5e:3x3")])
def test_a_topology_that_does_not_exist_is_answered_with_those_that_do(capsys, flags):
    assert run_command(plan.main, ["--config", MAIN, *flags]) == 2
    message = capsys.readouterr().err
    assert flags[1] in message
    assert all(name in message for name in ("h100", "h200", "a100", "b200", "v4", "v5e", "2x4"))


@pytest.mark.parametrize("name, extra", [("h200:1x8", "cuda13"), ("v5e:2x4", "tpu")])
def test_a_missing_compiler_is_answered_with_the_extra_that_has_it(
    capsys, monkeypatch, name, extra
):
    monkeypatch.setattr(topology, "_is_installed", lambda module: False)
    assert run_command(plan.main, ["--config", MAIN, "--topology", name]) == 2
    assert f"'kd-jax[{extra}]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags, words",
    [
        (("--topology", "h100:1x1", "--config", str(CONFIGS / "70b_to_8b.py")), "more devices"),
        (
            (  # a quarter of the rows has less than one to sample
                *("--topology", "v5e:2x2", "--data.batch-size", "64", "--remat", "none"),
                *("--on-policy.fraction", "0.02"),
            ),
            "It fits with",
        ),
        (("--topology", "h200:1x8", "--mesh.tensor", "3"), "mesh: expected a product of 8"),
        (("--topology", "h200:1x8", "--data.batch-size", "3", "--mesh.tensor", "1"), "batch-size"),
        (("--topology", "h200:1x8", "--target-share", "0"), "--target-share"),
        (("--topology", "cpu:8", "--search"), "--search: expected devices of known speed"),
        (
            ("--topology", "v5e:1x1", "--search", "--config", str(CONFIGS / "70b_to_8b.py")),
            "--search: expected a run that fits 1 devices of 15.8 GiB, found none",
        ),
        (
            ("--topology", "v5e:2x2", "--search", "--mesh.fsdp", "1", "--mesh.tensor", "1"),
            "found none. It fits with",
        ),
        (("--topology", "h200:1x8", "--meshes", "3"), "--meshes: no such flag"),
        (
            ("--topology", "h200:1x8", "--mesh.context", "4", "--data.seq-len", "2046"),
            "mesh.context: expected a divisor of data.seq-len, 2,046 tokens, got 4",
        ),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_with_what_could(capsys, flags, words):
    given = flags if "--config" in flags else ("--config", MAIN, *flags)
    assert run_command(plan.main, [*given, "--analytic"]) == 2
    assert words in capsys.readouterr().err


# The message of libtpu 0.0.42.
REFUSAL = (
    "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
    "temporaries (93.24G) exceeds available HBM (15.75G)."
)


def test_a_tpu_compilers_refusal_is_a_report():
    config = load_config(MAIN)
    archs = [plan.find_architecture(part.path, "x") for part in (config.student, config.teacher)]
    sizes, v5e = {"data": 4, "fsdp": 1, "tensor": 1}, find_topology("v5e:2x2")
    case = cost.Case(config=config, student=archs[0], teacher=archs[1], sizes=sizes, topology=v5e)
    got = ahead._too_large(case, RuntimeError(REFUSAL))
    assert not got["fits"] and got["temporary_bytes_per_device"] == int(93.24 * 2**30)
    with pytest.raises(RuntimeError, match="another"):
        ahead._too_large(case, RuntimeError("another"))


def test_a_program_that_is_refused_for_its_size_is_described(capsys, monkeypatch, tiny_config):
    def refuse(lowered):
        raise RuntimeError(REFUSAL)

    monkeypatch.setattr(jax.stages.Lowered, "compile", refuse)
    monkeypatch.setattr(Topology, "memory_limit", 2**30)
    flags = ["--config", tiny_config, "--topology", "cpu:8"]
    assert run_command(plan.main, flags) == 0
    out = capsys.readouterr().out
    assert "does not fit" in out and "compiled in" in out and "largest" not in out


def test_an_architecture_comes_from_its_folder_or_what_is_known_of_it(tmp_path):
    known = plan.find_architecture("meta-llama/Llama-3.1-8B-Instruct", "teacher.path")
    assert known.num_hidden_layers == 32
    (tmp_path / "config.json").write_text(json.dumps(tiny.make_config()))
    assert plan.find_architecture(str(tmp_path), "teacher.path").hidden_size == 64
    with pytest.raises(UserError, match=r"teacher\.path"):
        plan.find_architecture("nobody/nothing", "teacher.path")


def test_rows_beyond_the_models_context_are_warned_of(capsys):
    flags = ("--topology", "h200:1x8", "--analytic", "--data.seq-len", "131073")
    argv = ["--config", str(CONFIGS / "8b_to_1b.py"), *flags]
    assert run_command(plan.main, argv) == 0
    warning = capsys.readouterr().err
    assert "exceed the student's context (max_position_embeddings 131,072)" in warning
    assert "the teacher's context" in warning


def test_rows_are_split_where_nothing_else_fits(capsys):
    flags = ("--config", MAIN, "--topology", "v5e:2x4", "--data.batch-size", "1", "--analytic")
    shorter, longer = (
        report(capsys, *flags, "--data.seq-len", length) for length in ("65536", "131072")
    )
    assert shorter["mesh"] == {"data": 1, "fsdp": 1, "tensor": 8}
    assert longer["mesh"]["context"] > 1 and longer["fits"]


def test_a_plan_with_split_rows_says_so(capsys):
    flags = ("--topology", "h100:1x8", "--data.seq-len", "32768", "--mesh.context", "4")
    got = report(capsys, "--config", MAIN, *flags, "--mesh.tensor", "1", "--analytic")
    assert got["mesh"] == {"data": 2, "fsdp": 1, "context": 4, "tensor": 1} and got["fits"]
    assert set(got["collectives"]) == {"all-gather", "reduce-scatter", "all-reduce"}
    assert "data 2 x fsdp 1 x context 4 x tensor 1" in plan.describe(got)


def test_no_layout_is_refused_for_its_rows_where_tensor_takes_the_devices():
    config = load_config(MAIN)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, batch_size=4))
    archs = [plan.find_architecture(part.path, "x") for part in (config.student, config.teacher)]
    sizes = mesh_choice.choose_sizes(config, *archs, find_topology("h200:1x8"))
    assert sizes["tensor"] > 1 and sizes["data"] * sizes["fsdp"] <= 4
