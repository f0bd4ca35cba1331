"""Runs of every family, and of a pair with vocabularies padded to different sizes."""

import json
import shutil

import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file, save_file

from convert import to_hf
from kd_jax import evaluate, train
from kd_jax.config import MeshConfig, OptimConfig
from kd_jax.config.command import run_command
from kd_jax.data.chat import load_tokenizer
from kd_jax.weights.safetensors import open_folder

pytestmark = [pytest.mark.slow, pytest.mark.fast, pytest.mark.devices(8)]

# One tokenizer, two padded sizes, as Qwen2.5's 151,936 and 152,064.
STUDENT_ROWS, TEACHER_ROWS = 320, 344


def run(main, *argv):
    assert run_command(main, [str(word) for word in argv]) == 0


@pytest.fixture
def pair(tmp_path):
    """Returns a function that writes a family's pair of models and its config."""

    def write(family, trainable):
        student, teacher = tmp_path / "student", tmp_path / "teacher"
        tiny.write_plain_model(student, 1, family=family, vocab_size=STUDENT_ROWS)
        shape = {"hidden_size": 96, "num_hidden_layers": 2, "head_dim": 16}
        tiny.write_plain_model(teacher, 2, family=family, vocab_size=TEACHER_ROWS, **shape)
        tiny.write_data(tmp_path / "train.jsonl")
        optim = OptimConfig(learning_rate=1e-3, warmup_steps=1, schedule="constant")
        tiny.write_config(
            tmp_path, workdir=str(tmp_path / "run"), dtype="float32", trainable=trainable,
            optim=optim, mesh=MeshConfig(data=2, fsdp=2, tensor=2), steps=3,
        )  # fmt: skip
        return student, teacher

    return write


def values_of(model, teacher, data, capsys):
    capsys.readouterr()
    argv = ("--model", model, "--teacher", teacher, "--data", data, "--dtype", "float32")
    run(evaluate.main, *argv, "--seq-len", 128, "--json")
    found = json.loads(capsys.readouterr().out)
    return {name: value for name, value in found.items() if not isinstance(value, list | dict)}


@pytest.mark.parametrize(
    "family, trainable",
    [("phi3", "lora"), ("gemma3_text", "full")],
)
def test_a_run_of_each_family_learns_and_is_exported(family, trainable, pair, tmp_path, capsys):
    student, teacher = pair(family, trainable)
    run(train.main, "--config", tmp_path / "config.py")
    run(to_hf.main, "--workdir", tmp_path / "run", "--out", tmp_path / "out")
    data = tmp_path / "train.jsonl"
    before = values_of(student, teacher, data, capsys)
    after = values_of(tmp_path / "run", teacher, data, capsys)
    exported = values_of(tmp_path / "out", teacher, data, capsys)
    assert after["kl_forward"] < before["kl_forward"] and after["ce"] < before["ce"]
    for name, value in after.items():
        # A merged adapter has one more rounding than an unmerged one.
        assert exported[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name
    if trainable == "full":
        was, now = open_folder(student), open_folder(tmp_path / "out")
        assert was.keys() == now.keys()
        unmoved = [name for name in was if np.array_equal(was[name].read(), now[name].read())]
        assert not unmoved


def test_what_lies_in_the_padding_of_a_vocabulary_changes_nothing(pair, tmp_path, capsys):
    student, teacher = pair("qwen2", "lora")
    data = tmp_path / "train.jsonl"
    want = values_of(student, teacher, data, capsys)
    true_size = max(load_tokenizer(student).get_vocab().values()) + 1
    assert true_size < STUDENT_ROWS
    for rows, fill in ((332, 0.0), (TEACHER_ROWS, 100.0), (true_size, None)):
        other = shutil.copytree(teacher, tmp_path / f"teacher_{rows}")
        config = json.loads((other / "config.json").read_text())
        (other / "config.json").write_text(json.dumps(config | {"vocab_size": rows}))
        tensors = load_file(other / "model.safetensors")
        table = tensors["model.embed_tokens.weight"][:rows].copy()
        table[true_size:] = fill
        tensors["model.embed_tokens.weight"] = table
        save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
        got = values_of(student, other, data, capsys)
        assert got == pytest.approx(want, rel=1e-6, abs=1e-7), rows
