"""On-policy runs through the real command."""

import dataclasses
import json
import shutil

import pytest
import tiny
from samples import write_lines

from kd_jax import train
from kd_jax.config import CheckpointConfig, LogConfig, LossConfig, OnPolicyConfig
from kd_jax.config.command import load_config, run_command
from kd_jax.data.chat import load_tokenizer
from kd_jax.inference.load import open_model
from kd_jax.parallel.mesh import make_mesh
from kd_jax.training.abstract import abstract_run
from kd_jax.weights.folder import load_architecture

STEPS = 6
ON = ("--on-policy.fraction", "0.5", "--on-policy.max-new-tokens", "12")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with tiny models, data and a configuration. Read only but for its row store."""
    folder = tmp_path_factory.mktemp("on_policy")
    tiny.write_plain_model(folder / "student", seed=1, num_hidden_layers=2)
    tiny.write_plain_model(folder / "teacher", seed=2, num_hidden_layers=2)
    tiny.write_data(folder / "data.jsonl")
    tiny.write_config(
        folder, data="data.jsonl", dtype="float32", loss=LossConfig(divergence="reverse_kl"),
        checkpoint=CheckpointConfig(every_steps=2, keep=9), log=LogConfig(tensorboard=False),
        remat="none", steps=STEPS,
    )  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def run_train(folder):
    def run(workdir, *flags):
        argv = ["--config", str(folder / "config.py"), "--workdir", str(workdir), *flags]
        return run_command(train.main, argv)

    return run


REUSED = (*ON, "--on-policy.every-steps", "3", "--on-policy.log-samples", "2")


@pytest.fixture(scope="module")
def reused(run_train, tmp_path_factory):
    """A finished run that draws samples at steps 0 and 3. Read only."""
    workdir = tmp_path_factory.mktemp("reused") / "run"
    assert run_train(workdir, *REUSED) == 0
    return workdir


def test_samples_are_reported_and_drawn_every_so_many_steps(reused, folder):
    lines = tiny.trace(reused)
    assert [line["samples/age"] for line in lines] == [0, 1, 2, 0, 1, 2]
    names = {
        "count", "tokens", "length", "ended", "empty", "repetition", "student_log_prob",
        "teacher_log_prob", "drawn_log_prob", "entropy", "kl_forward", "kl_reverse",
        "kl_forward_from_0", "kl_reverse_from_4",
    }  # fmt: skip
    for line in lines:
        assert {f"samples/{name}" for name in names} <= line.keys()
        assert not any("from_16" in name for name in line)  # no sample is as long
        assert line["samples/tokens"] == line["samples/count"] * line["samples/length"]
        assert 0 < line["samples/length"] <= 12
        by_place = {x: line[f"samples/kl_forward_from_{x}"] for x in (0, 4)}
        assert min(by_place.values()) <= line["samples/kl_forward"] <= max(by_place.values())
    assert [line["samples/drawn_log_prob"] for line in lines[:3]] == [
        lines[0]["samples/drawn_log_prob"]
    ] * 3
    for line in lines:
        if line["samples/age"] == 0:  # the sampler's probabilities are the trainer's
            gap = line["samples/drawn_log_prob"] - line["samples/student_log_prob"]
            assert abs(gap) < 1e-5
    written = tiny.trace(reused, "samples.jsonl")
    assert [line["step"] for line in written] == [1] * 4 + [4] * 4
    end = "<|start|>assistant<|end|>\n\n"
    assert all(line["prompt"].endswith(end) and line["answer"] for line in written)
    assert load_tokenizer(folder / "student").bos_token == written[0]["prompt"][:9]


@pytest.mark.parametrize("step", [2, 4])
def test_a_run_resumed_between_drawings_has_the_same_samples_and_losses(
    step, reused, run_train, tmp_path
):
    copy = shutil.copytree(reused, tmp_path / "run")
    for later in (x for x in range(step + 1, STEPS + 1) if (copy / f"checkpoints/{x}").exists()):
        shutil.rmtree(copy / "checkpoints" / str(later))
    with (copy / "samples.jsonl").open("a") as file:
        file.write('{"step": 5, "prompt": "torn')
    assert run_train(copy, *REUSED) == 0
    assert tiny.trace(copy) == tiny.trace(reused)
    assert tiny.trace(copy, "samples.jsonl") == tiny.trace(reused, "samples.jsonl")


@pytest.mark.parametrize("kind", ["model", "base"])
def test_a_run_is_opened_for_other_rows_and_another_dtype(kind, reused, tmp_path):
    copy = shutil.copytree(reused, tmp_path / "run")
    if kind == "base":  # as training records it on a device that prefers float32
        record = json.loads((copy / "config.json").read_text())
        record["config"]["teacher"] |= {"kind": "base", "path": None, "dtype": "float32"}
        (copy / "config.json").write_text(json.dumps(record))
    config = open_model(str(copy), "bfloat16").config
    rows = dataclasses.replace(config.data, batch_size=1, seq_len=8)
    opened = dataclasses.replace(config, data=rows)
    assert (opened.samples, opened.teacher.kind) == (False, kind)


@pytest.mark.slow  # it compiles programs of its own
def test_the_share_of_samples_may_fall_to_none(run_train, tmp_path):
    flags = ("--on-policy.fraction", "1", "--on-policy.fraction-end", "0")
    flags += ("--on-policy.schedule", "linear", "--on-policy.log-samples", "0")
    flags += ("--on-policy.max-new-tokens", "12", "--on-policy.every-steps", "5")
    assert run_train(tmp_path / "run", *flags) == 0
    first, *_, last = tiny.trace(tmp_path / "run")
    assert first["target_tokens"] == first["samples/tokens"]  # samples alone
    assert first["loss"] == pytest.approx(first["kd_loss"], rel=1e-6)
    assert last["samples/count"] == last["samples/tokens"] == 0
    lines = tiny.read_lines(tmp_path / "run" / "metrics.jsonl")
    without = [line for line in lines if not line["samples/count"]]
    assert {line.get("samples/sampling_seconds", 0) for line in without} == {0}
    assert not any("samples/entropy" in line for line in without)
    assert last["loss"] == pytest.approx((last["ce_loss"] + last["kd_loss"]) / 2, rel=1e-6)
    assert not (tmp_path / "run" / "samples.jsonl").exists()


@pytest.mark.filterwarnings("error::DeprecationWarning")  # of libraries too
def test_without_samples_the_program_is_as_before(folder):
    config = load_config(folder / "config.py")
    arch = load_architecture(folder / "student")

    def jaxpr(on_policy):
        one = dataclasses.replace(config, on_policy=on_policy)
        return str(abstract_run(one, arch, arch, make_mesh(config.mesh, 8)).trace().jaxpr)

    options = {"max_new_tokens": 7, "every_steps": 2, "temperature": 0.5}
    before, sampling = jaxpr(OnPolicyConfig()), OnPolicyConfig(fraction=0.5, **options)
    assert jaxpr(OnPolicyConfig(**options)) == before != jaxpr(sampling)


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--teacher.cache", "/nowhere"], ["on-policy.fraction", "cannot score new text"]),
        (["--loss.kd-ratio", "0"], ["on-policy.fraction: expected 0 without a teacher"]),
        (["--data.train-on", "all"], ["on-policy.fraction", "prompts are what has no loss"]),
        (["--on-policy.max-new-tokens", "127"], ["on-policy.max-new-tokens: expected at most 126"]),
        (["--on-policy.max-new-tokens", "120"], ["on-policy.max-new-tokens", "24 longer ones"]),
        (["--data.path", "TEXT"], ["data.path: expected conversations", "plain text"]),
        (["--data.path", "FOLDER"], ["workdir: expected a place that data.path does not read"]),
    ],
    ids=lambda value: " ".join(value)[:40],
)
def test_a_mistake_gets_one_message_before_weights_load(
    run_train, tmp_path, capsys, monkeypatch, flags, words
):
    monkeypatch.setattr("kd_jax.training.loop.load_models", None)
    text = write_lines(tmp_path / "text.jsonl", [{"text": "The sky is blue. " * 9}])
    flags = [{"TEXT": str(text), "FOLDER": str(tmp_path)}.get(flag, flag) for flag in flags]
    assert run_train(tmp_path / "run", *ON, *flags) == 2
    message = capsys.readouterr().err
    assert all(word in message for word in words), message
    assert "Traceback" not in message and not (tmp_path / "run").exists()
