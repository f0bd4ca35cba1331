"""All commands in sequence, without torch, so that they run on the newest jax too."""

import json
import re
import subprocess
import sys
import tomllib

import numpy as np
import pytest
import tiny
from paths import ROOT

from convert import from_hf, to_hf
from kd_jax import __main__, evaluate, train
from kd_jax.config import CheckpointConfig, TeacherConfig, UserError
from kd_jax.config.command import run_command
from kd_jax.inference.arguments import EvaluateArgs
from kd_jax.inference.comparison import _open_teacher
from kd_jax.inference.load import open_model

pytestmark = pytest.mark.fast


@pytest.fixture
def kd_jax(monkeypatch, capsys):
    """Returns a function that runs `kd-jax WORDS` and returns exit status, stdout and stderr."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["kd-jax", *words])
        capsys.readouterr()
        return __main__.main(), *capsys.readouterr()

    return run


def test_kd_jax_lists_every_command_on_a_line(kd_jax):
    status, listed, _ = kd_jax()
    assert status == 0 and kd_jax("--help")[1] == listed
    doors = [*(ROOT / "kd_jax").glob("*.py"), *(ROOT / "convert").glob("*.py")]
    names = {file.stem.replace("_", "-") for file in doors if not file.stem.startswith("_")}
    lines = re.findall(r"^  (\S+) +(\S.+)$", listed, re.MULTILINE)
    assert {name for name, _ in lines} == names and len(lines) == len(names)


def test_kd_jax_names_the_nearest_command(kd_jax):
    status, printed, error = kd_jax("trian")
    assert status == 2 and not printed and error.count("\n") == 1 and "Did you mean train?" in error
    assert "There are cache, demo, " in kd_jax("xyz")[2]


@pytest.mark.parametrize(
    "name, module, flags",
    [
        ("train", "kd_jax.train", ["--help"]),
        ("to-hf", "convert.to_hf", ["--sed", "1"]),
        ("lm_eval", "kd_jax.lm_eval", ["--help"]),
    ],
)
def test_kd_jax_name_is_python_m_name(name, module, flags):
    got, want = (
        subprocess.run([sys.executable, "-m", *words], capture_output=True, cwd=ROOT)
        for words in (["kd_jax", name, *flags], [module, *flags])
    )
    assert (got.returncode, got.stdout, got.stderr) == (want.returncode, want.stdout, want.stderr)
    assert got.returncode == (0 if flags == ["--help"] else 2)


def test_kd_jax_is_the_console_script_and_takes_no_jax():
    script = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert script == {"kd-jax": f"{__main__.__name__}:{__main__.main.__name__}"}
    code = "import sys; from kd_jax.__main__ import main; main(); print('jax' in sys.modules)"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert printed.stdout.endswith("False\n")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    tiny.write_plain_model(root / "student", seed=1)
    tiny.write_plain_model(root / "teacher", seed=2, hidden_size=96, num_hidden_layers=2)
    tiny.write_data(root / "train.jsonl")
    tiny.write_config(root, checkpoint=CheckpointConfig(every_steps=2))
    return root


def run(main, *argv):
    return run_command(main, [str(word) for word in argv])


def read_losses(workdir):
    return [line["loss"] for line in tiny.read_lines(workdir / "metrics.jsonl")]


def ce_of(folders, model, capsys):
    capsys.readouterr()
    rows = folders / "train.jsonl"
    assert run(evaluate.main, "--model", model, "--data", rows, "--seq-len", 128, "--json") == 0
    return json.loads(capsys.readouterr().out)["ce"]


@pytest.mark.parametrize("trainable", ["lora", pytest.param("full", marks=pytest.mark.slow)])
def test_train_export_and_evaluate(folders, trainable, tmp_path, capsys):
    config = ("--config", folders / "config.py", "--trainable", trainable)
    assert run(train.main, *config, "--workdir", tmp_path / "whole") == 0
    losses = read_losses(tmp_path / "whole")
    assert len(losses) == 4 and np.isfinite(losses).all() and losses[-1] < losses[0]

    assert run(to_hf.main, "--workdir", tmp_path / "whole", "--out", tmp_path / "out") == 0
    trained = ce_of(folders, tmp_path / "out", capsys)
    both = ("--model", tmp_path / "whole", "--against", folders / "student", "--save")
    rows = ("--data", folders / "train.jsonl", "--teacher", folders / "teacher")
    assert run(evaluate.main, *both, *rows) == 0
    saved = json.loads((tmp_path / "whole" / "evaluation.json").read_text())
    # Merging rounds the sum of weight and adapter to bfloat16.
    assert saved["ce"] == pytest.approx(trained, rel=5e-3)
    assert saved["against"]["ce"]["high"] < 0  # of the interval: better than untouched
    assert saved["arguments"]["step"] == 4


@pytest.mark.slow
def test_an_orbax_form_trains_as_its_source_does(folders, tmp_path):
    config = ("--config", folders / "config.py", "--steps", 2)
    for name in ("student", "teacher"):
        assert run(from_hf.main, "--source", folders / name, "--out", tmp_path / name) == 0
    paths = ("--student.path", tmp_path / "student", "--teacher.path", tmp_path / "teacher")
    assert run(train.main, *config, "--workdir", tmp_path / "source") == 0
    assert run(train.main, *config, *paths, "--workdir", tmp_path / "orbax") == 0
    assert read_losses(tmp_path / "orbax") == read_losses(tmp_path / "source")


def test_an_adapter_is_written_and_trained_on(folders, tmp_path):
    config = ("--config", folders / "config.py")
    assert run(train.main, *config, "--workdir", tmp_path / "first") == 0
    arguments = ("--workdir", tmp_path / "first", "--out", tmp_path / "out", "--format", "adapter")
    assert run(to_hf.main, *arguments) == 0
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= files
    flags = ("--student.adapter", tmp_path / "out")
    assert run(train.main, *config, *flags, "--workdir", tmp_path / "second") == 0
    assert read_losses(tmp_path / "second")[0] < read_losses(tmp_path / "first")[0]


@pytest.mark.parametrize("how", [pytest.param("no teacher", marks=pytest.mark.slow), "kd_ratio 0"])
def test_fine_tuning_needs_no_teacher(folders, how, tmp_path):
    teacher = None if how == "no teacher" else TeacherConfig(path="/not/there")
    given = {"student": folders / "student", "data": folders / "train.jsonl"}
    file = tiny.write_config(tmp_path, teacher=teacher, **given)
    ratio = () if how == "no teacher" else ("--loss.kd-ratio", 0)
    flags = ("--config", file, "--eval.path", folders / "train.jsonl", *ratio)
    assert run(train.main, *flags, "--workdir", tmp_path / "run") == 0
    lines = tiny.read_lines(tmp_path / "run" / "metrics.jsonl")
    steps = [line for line in lines if "loss" in line]
    assert all(line["loss"] == line["ce_loss"] and "kd_loss" not in line for line in steps)
    assert steps[-1]["loss"] < steps[0]["loss"]
    assert lines[-1].keys() >= {"eval/ce", "eval/perplexity"} and "eval/kl_forward" not in lines[-1]
    if how == "kd_ratio 0":
        return
    # A fine-tuned teacher is distilled.
    out = tmp_path / "adapter"
    assert run(to_hf.main, "--workdir", tmp_path / "run", "--out", out, "--format", "adapter") == 0
    given = ("--teacher.path", folders / "student", "--teacher.adapter", out)
    flags = ("--config", folders / "config.py", *given)
    assert run(train.main, *flags, "--workdir", tmp_path / "distilled") == 0
    # Its evaluation takes this adapter and no other.
    names = {"model": tmp_path / "distilled", "teacher": folders / "student"}
    args = EvaluateArgs(data="d", **{name: str(path) for name, path in names.items()})
    model = open_model(args.model, "float32")
    assert _open_teacher(args, model).files.adapter is not None
    with (out / "adapter_config.json").open("a") as file:
        file.write(" ")
    with pytest.raises(UserError, match=r"teacher\.adapter: expected the content that the run"):
        _open_teacher(args, model)
