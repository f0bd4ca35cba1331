"""Full runs through the real commands."""

import json
import math
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch
from children import environment
from paths import ROOT
from transformers import AutoModelForCausalLM, AutoTokenizer

from convert import to_hf
from kd_jax import evaluate, train
from kd_jax.config import CheckpointConfig, EvalConfig, MeshConfig
from kd_jax.config.command import run_command
from kd_jax.data import chat
from kd_jax.data import rows as data_rows
from kd_jax.inference import scores
from kd_jax.inference.load import load_model, open_model
from kd_jax.parallel.mesh import make_mesh
from kd_jax.setup import models as setup_models
from kd_jax.training import step, step_log
from kd_jax.training.step import TrainState, train_step
from kd_jax.workdir import checkpoints, history

STEPS = 14  # enough to stop a run before its end
EVALUATED = STEPS // 2


@pytest.fixture(scope="module")
def config_file(tiny_student, tiny_teacher, tiny_data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("config")
    held_out = tiny.write_data(folder / "held_out.jsonl", count=7)
    return tiny.write_config(
        folder, teacher=tiny_teacher, student=tiny_student, data=tiny_data, dtype="float32",
        eval=EvalConfig(path=str(held_out), every_steps=EVALUATED),
        checkpoint=CheckpointConfig(every_steps=STEPS // 2 - 1), steps=STEPS,
    )  # fmt: skip


@pytest.fixture(scope="module")
def run_train(config_file):
    def run(workdir, *flags):
        argv = ["--config", str(config_file), "--workdir", str(workdir), *flags]
        return run_command(train.main, argv)

    return run


@pytest.fixture(scope="module")
def lora_run(run_train, tmp_path_factory):
    """A finished run. Read only."""
    workdir = tmp_path_factory.mktemp("lora") / "run"
    assert run_train(workdir) == 0
    return workdir


@pytest.fixture(scope="module")
def full_run(run_train, tmp_path_factory):
    """A finished run with trainable="full". Read only."""
    workdir = tmp_path_factory.mktemp("full") / "run"
    assert run_train(workdir, "--trainable", "full", "--optim.learning-rate", "1e-3") == 0
    return workdir


def read_metrics(workdir):
    return tiny.read_lines(workdir / "metrics.jsonl")


def test_the_contract_of_metrics_is_kept(lora_run):
    steps = [line for line in read_metrics(lora_run) if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, STEPS + 1))
    wanted = {
        "step", "loss", "ce_loss", "kd_loss", "teacher_entropy", "teacher_ce", "top1_agreement",
        "target_tokens", "tokens_per_second", "target_tokens_per_second", "step_seconds",
        "learning_rate", "grad_norm", "peak_memory_bytes",
    }  # fmt: skip
    for line in steps:
        assert wanted <= line.keys()
        assert line["loss"] == pytest.approx((line["ce_loss"] + line["kd_loss"]) / 2, rel=1e-6)
    evaluated = [line for line in read_metrics(lora_run) if "eval/ce" in line]
    assert [line["step"] for line in evaluated] == [EVALUATED, STEPS]
    assert any((lora_run / "tensorboard").iterdir())


def test_config_json_says_what_ran(lora_run):
    record = json.loads((lora_run / "config.json").read_text())
    assert record["config"]["optim"]["learning_rate"] == 1e-2
    assert record["num_steps"] == STEPS
    assert record["versions"]["jax"] and {"student.path", "teacher.path"} <= record["inputs"].keys()


def test_training_brings_the_student_nearer(lora_run, full_run):
    for workdir in (lora_run, full_run):
        first, last = (line for line in read_metrics(workdir) if "eval/ce" in line)
        assert last["eval/ce"] < first["eval/ce"]
        assert last["eval/kl_forward"] < first["eval/kl_forward"]


def test_checkpoints_hold_what_is_trained_and_nothing_else(lora_run, tiny_student):
    trained = checkpoints.open_trained(lora_run)
    assert trained.step == STEPS
    assert all(name.endswith(("lora_A", "lora_B")) for name in trained.shapes)
    folder = lora_run / "checkpoints" / str(STEPS)
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    moments_and_values = 3 * sum(4 * math.prod(shape) for shape in trained.shapes.values())
    assert size < moments_and_values + 200_000


@pytest.mark.parametrize(
    "losses, kept",
    [
        ([None] * 6, [5, 6]),
        ([3, 1, 2, 4, 5, 6], [2, 5, 6]),
        ([None, 1, None, 2, None, None], [2, 5, 6]),
    ],
)
def test_the_latest_checkpoints_are_kept_and_the_best_evaluated_one(losses, kept, tmp_path):
    with checkpoints.open_checkpointer(tmp_path, keep=2) as checkpointer:
        for step, loss in enumerate(losses, start=1):
            state = TrainState({"x": jnp.ones(3)}, {}, jnp.int32(step))
            checkpoints.save(checkpointer, state, step, loss)
    assert sorted(int(folder.name) for folder in (tmp_path / "checkpoints").iterdir()) == kept


def test_all_that_is_wrong_with_the_inputs_is_one_message(run_train, tmp_path, capsys):
    paths = {"student.path": "/no/s", "teacher.path": "/no/t", "data.path": "/no/d.json"}
    paths["eval.path"] = "/no/e.jsonl"
    flags = [word for name, path in paths.items() for word in (f"--{name}", path)]
    assert run_train(tmp_path / "run", *flags) == 2
    message = capsys.readouterr().err
    assert all(f"{name}: expected" in message and path in message for name, path in paths.items())


def test_a_finished_run_does_nothing_more(lora_run, run_train, tmp_path):
    copy = shutil.copytree(lora_run, tmp_path / "run")
    before = (copy / "metrics.jsonl").read_bytes()
    assert run_train(copy) == 0
    assert (copy / "metrics.jsonl").read_bytes() == before


def start_process(config_file, workdir, *flags):
    command = [sys.executable, "-m", "kd_jax.train", "--config", str(config_file)]
    return subprocess.Popen(
        [*command, "--workdir", str(workdir), *flags],
        env=environment(2),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for_step(workdir, step, process):
    """Waits until metrics.jsonl has a line for the step."""
    path = workdir / "metrics.jsonl"
    end = time.monotonic() + 120
    while time.monotonic() < end and process.poll() is None:
        if path.is_file() and f'"step": {step},' in path.read_text():
            return
        time.sleep(0.01)
    raise AssertionError(f"no step {step}: {process.communicate()[0]}")


def test_a_run_that_was_stopped_continues_bit_for_bit(config_file, run_train, lora_run, tmp_path):
    """By SIGTERM; tests/test_benchmarks.py kills runs by SIGKILL."""
    process = start_process(config_file, tmp_path / "stopped")
    wait_for_step(tmp_path / "stopped", 3, process)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 0, output
    reached = read_metrics(tmp_path / "stopped")[-1]["step"]
    assert 3 <= reached < STEPS
    # Saved at once, regardless of every_steps.
    assert checkpoints.open_trained(tmp_path / "stopped").step == reached
    assert run_train(tmp_path / "stopped") == 0
    record = history.read_record(tmp_path / "stopped" / "config.json")
    assert [start["step"] for start in history.list_starts(record)] == [0, reached]
    assert tiny.trace(tmp_path / "stopped") == tiny.trace(lora_run)
    ours, theirs = (checkpoints.open_trained(folder) for folder in (tmp_path / "stopped", lora_run))
    for name in theirs.shapes:
        np.testing.assert_array_equal(ours.read(name), theirs.read(name), err_msg=name)


@pytest.mark.slow
def test_a_run_that_was_stopped_continues_its_schedule(run_train, tmp_path, capsys):
    flags = ("--loss.kd-ratio", "1", "--loss.kd-ratio-end", "0", "--loss.schedule", "linear")
    flags += ("--loss.temperature-end", "3", "--loss.schedule-steps", "5")
    flags += ("--loss.divergence", "jsd", "--loss.jsd-beta", "0.97", "--steps", "6")
    assert run_train(tmp_path / "whole", *flags) == 0
    assert "warning: loss.jsd-beta 0.97 is near 1" in capsys.readouterr().err
    copy = shutil.copytree(tmp_path / "whole", tmp_path / "run")
    shutil.rmtree(copy / "checkpoints" / "6")
    assert run_train(copy, *flags) == 0
    assert tiny.trace(copy) == tiny.trace(tmp_path / "whole")
    steps = [line for line in read_metrics(copy) if "loss" in line]
    assert [line["kd_ratio"] for line in steps] == [1, 0.75, 0.5, 0.25, 0, 0]
    assert [line["temperature"] for line in steps] == [1, 1.5, 2, 2.5, 3, 3]


@pytest.fixture
def read(monkeypatch):
    """The number of arrays that each reading of a model's folder asks for."""
    counts, load_arrays = [], setup_models.load_arrays

    def watched(folder, arch, abstract, **options):
        counts.append(len(abstract))
        return load_arrays(folder, arch, abstract, **options)

    monkeypatch.setattr(setup_models, "load_arrays", watched)
    return counts


def test_a_resumed_full_run_reads_its_trained_weights_from_the_checkpoint_alone(
    full_run, run_train, tmp_path, read
):
    copy = shutil.copytree(full_run, tmp_path / "run")
    shutil.rmtree(copy / "checkpoints" / str(STEPS))
    flags = ("--trainable", "full", "--optim.learning-rate", "1e-3")
    assert run_train(copy, *flags) == 0
    assert read[0] == 0 and read[1] > 0  # nothing of the student, all of the teacher
    assert tiny.trace(copy) == tiny.trace(full_run)


def test_a_full_runs_model_is_loaded_without_its_base(full_run, read):
    opened = open_model(str(full_run), "bfloat16")
    models = load_model(opened, make_mesh(MeshConfig(), 2))
    assert read == [0]
    assert {x.dtype.name for x in models.frozen.values()} == {"bfloat16"}


def test_a_run_resumes_on_other_devices_with_one_program(
    lora_run, run_train, tmp_path, monkeypatch
):
    """Every step keeps the layout of the first."""
    traces = []

    def counted(*arguments):
        traces.append(1)
        return train_step(*arguments)

    monkeypatch.setattr(step, "train_step", counted)
    copy = shutil.copytree(lora_run, tmp_path / "run")
    shutil.rmtree(copy / "checkpoints" / str(STEPS))
    mesh = ("--mesh.data", "1", "--mesh.tensor", "2")
    assert run_train(copy, *mesh) == 0
    assert len(traces) == 1
    for ours, theirs in zip(tiny.trace(copy), tiny.trace(lora_run), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


def test_another_configuration_in_the_same_workdir_is_refused(lora_run, run_train, capsys):
    assert run_train(lora_run, "--loss.kd-ratio", "0.25", "--lora.rank", "8") == 2
    message = capsys.readouterr().err
    assert "loss.kd_ratio: 0.5 -> 0.25" in message and "lora.rank: 4 -> 8" in message
    assert "Traceback" not in message


def test_a_changed_student_in_the_same_workdir_is_refused(lora_run, run_train, tmp_path, capsys):
    other = tiny.write_model(tmp_path / "other", seed=9)
    assert run_train(lora_run, "--student.path", str(other)) == 2
    assert "student.path" in capsys.readouterr().err


def test_a_moved_student_in_the_same_workdir_is_accepted(
    lora_run, run_train, tiny_student, tmp_path
):
    moved = shutil.copytree(tiny_student, tmp_path / "moved")
    copy = shutil.copytree(lora_run, tmp_path / "run")
    assert run_train(copy, "--student.path", str(moved)) == 0


def test_a_finished_runs_student_is_found_where_it_has_moved(
    lora_run, tiny_student, tiny_data, tmp_path, capsys
):
    copy = shutil.copytree(lora_run, tmp_path / "run")
    text = (copy / "config.json").read_text()
    (copy / "config.json").write_text(text.replace(str(tiny_student), str(tmp_path / "gone")))
    export = ("--workdir", str(copy), "--out", str(tmp_path / "out"), "--format", "adapter")
    assert run_command(to_hf.main, export) == 2
    assert "--student-path" in capsys.readouterr().err
    other = tiny.write_model(tmp_path / "other", seed=9)
    assert run_command(to_hf.main, [*export, "--student-path", str(other)]) == 2
    assert "student.path: expected the content" in capsys.readouterr().err
    now = ("--student-path", str(tiny_student))
    assert run_command(to_hf.main, [*export, *now]) == 0
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tiny_student)
    assert evaluated(capsys, copy, None, tiny_data, *now) == evaluated(
        capsys, lora_run, None, tiny_data
    )
    argv = ["--model", str(tiny_student), "--data", str(tiny_data), *now]
    assert run_command(evaluate.main, argv) == 2
    assert "--student-path: expected a workdir as --model" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_stops_the_run(run_train, tmp_path, capsys):
    flags = ("--optim.learning-rate", "1e30", "--optim.clip-norm", "None")
    flags += ("--checkpoint.every-steps", "1")
    assert run_train(tmp_path / "run", *flags) == 2
    message = capsys.readouterr().err
    assert "expected finite values" in message and "Last good checkpoint" in message
    assert all(np.isfinite(line["loss"]) for line in read_metrics(tmp_path / "run"))


def test_the_profile_is_written(run_train, tmp_path, capsys):
    flags = ("--log.profile-start", "1", "--log.profile-steps", "2", "--eval.path", "None")
    assert run_train(tmp_path / "run", *flags, "--eval.split", "train[98%:]") == 0
    lines = capsys.readouterr().out.splitlines()
    told = next(i for i, line in enumerate(lines) if line.startswith("nothing is evaluated"))
    assert told < next(i for i, line in enumerate(lines) if "compiling" in line)
    assert list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))


def test_epochs_are_passes_over_the_rows(run_train, tmp_path, config_file):
    """On a mesh that splits rows, which changes nothing here."""
    flags = ("--steps", "None", "--epochs", "2", "--eval.path", "None")
    mesh = ("--mesh.data", "1", "--mesh.context", "2")
    assert run_train(tmp_path / "run", *flags, *mesh) == 0
    config = history.read_config(tmp_path / "run")
    tokenizer = chat.load_tokenizer(Path(config.student.path))
    template = chat.chat_template_of(config.data, tokenizer)
    rows = data_rows.make_rows(config.data, tokenizer, template)
    assert read_metrics(tmp_path / "run")[-1]["step"] == -(-2 * len(rows) // 8)


@pytest.mark.slow
def test_split_rows_give_the_losses_of_whole_ones(run_train, lora_run, tmp_path):
    """And those of an evaluation; the other run's devices have whole rows."""
    mesh = ("--mesh.data", "1", "--mesh.context", "2")
    assert run_train(tmp_path / "run", *mesh, "--checkpoint.every-steps", str(STEPS)) == 0
    for got, want in zip(tiny.trace(tmp_path / "run"), tiny.trace(lora_run), strict=True):
        for name in {"loss", "eval/loss", "eval/kl_forward"} & want.keys():
            assert got[name] == pytest.approx(want[name], rel=1e-5), name


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--data.batch-size", "7"], ["data.batch-size", "2 devices"]),
        (["--mesh.context", "2", "--data.seq-len", "127"], ["mesh.context", "data.seq-len"]),
        (["--mesh.fsdp", "3"], ["mesh", "product of 2"]),
        (["--student.path", "/nowhere/model"], ["student.path", "/nowhere/model"]),
        (["--data.path", "/nowhere.json"], ["/nowhere.json"]),
        (["--data.seq-len", "20"], ["no token with a loss"]),
        (["--data.overlong", "error", "--data.seq-len", "100"], ["longer than data.seq-len"]),
        (["--lora.target-modules", "qproj"], ["lora.target-modules", "q_proj"]),
        (["--loss.kd-ration", "0.5"], ["--loss.kd-ratio"]),
        (
            ["--epochs", "1", "--loss.schedule", "linear", "--loss.schedule-steps", "4",
             "--loss.kd-ratio-end", "1"],
            ["loss.schedule-steps: expected at most", "got 4"],
        ),
        (
            ["--epochs", "1", "--on-policy.schedule", "linear", "--on-policy.schedule-steps", "9",
             "--on-policy.fraction-end", "0.5", "--on-policy.max-new-tokens", "4"],
            ["on-policy.schedule-steps: expected at most", "got 9"],
        ),
        (["--attention", "cudnn"], ["attention"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)  # fmt: skip
def test_a_mistake_gets_one_message_and_leaves_nothing(run_train, tmp_path, capsys, flags, words):
    assert run_train(tmp_path / "run", *flags) == 2
    message = capsys.readouterr().err
    assert all(word in message for word in words), message
    assert "Traceback" not in message
    assert not (tmp_path / "run").exists()


def test_an_unwritable_workdir_is_refused(run_train, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert run_train(tmp_path / "file" / "run") == 2
    assert "cannot be written" in capsys.readouterr().err


def test_another_tokenizer_is_refused(run_train, tiny_teacher, tmp_path, capsys):
    other = shutil.copytree(tiny_teacher, tmp_path / "teacher")
    tiny.write_tokenizer(other, words=["completely different words", "and others besides"])
    assert run_train(tmp_path / "run", "--teacher.path", str(other)) == 2
    assert "expected one tokenizer" in capsys.readouterr().err


def evaluated(capsys, model, teacher, rows, *flags):
    argv = ["--model", str(model), "--data", str(rows), "--dtype", "float32", "--seq-len", "128"]
    argv += ["--teacher", str(teacher)] if teacher else []
    capsys.readouterr()
    assert run_command(evaluate.main, [*argv, "--json", *flags]) == 0
    result = json.loads(capsys.readouterr().out)
    return {name: value for name, value in result.items() if name in scores.NAMES}


def torch_evaluation(model, teacher, folder, rows):
    """Returns means over target tokens, with torch and transformers' chat template."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    sums = {}
    for line in rows.read_text().splitlines():
        record = json.loads(line)
        turns = [{"role": "user", "content": record["instruction"]}]
        options = {"date_string": "26 Jul 2024", "return_dict": False}
        start = len(tokenizer.apply_chat_template(turns, add_generation_prompt=True, **options))
        turns.append({"role": "assistant", "content": record["output"]})
        ids = torch.tensor(tokenizer.apply_chat_template(turns, **options))
        with torch.no_grad():
            q, p = (
                m(ids[None]).logits[0, start - 1 : -1].double().log_softmax(-1)
                for m in (model, teacher)
            )
        labels = ids[start:, None]
        values = {
            "ce": -q.gather(1, labels),
            "teacher_ce": -p.gather(1, labels),
            "entropy": -(q.exp() * q).sum(-1),
            "teacher_entropy": -(p.exp() * p).sum(-1),
            "kl_forward": (p.exp() * (p - q)).sum(-1),
            "kl_reverse": (q.exp() * (q - p)).sum(-1),
            "top1_agreement": (p.argmax(-1) == q.argmax(-1)).double(),
            "acceptance": torch.minimum(p, q).exp().sum(-1),
            "target_tokens": torch.ones(len(labels)),
        }
        for name, value in values.items():
            sums[name] = sums.get(name, 0.0) + value.sum().item()
    count = sums.pop("target_tokens")
    means = {name: value / count for name, value in sums.items()}
    return {**means, "perplexity": np.exp(means["ce"]), "target_tokens": count}


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_the_exported_student_is_the_one_that_was_trained(
    kind, lora_run, full_run, tiny_student, tiny_teacher, tiny_data, tmp_path, capsys
):
    workdir = {"lora": lora_run, "full": full_run}[kind]
    argv = ["--workdir", str(workdir), "--out", str(tmp_path / "out")]
    assert run_command(to_hf.main, argv) == 0
    ours = evaluated(capsys, workdir, tiny_teacher, tiny_data)
    teacher = AutoModelForCausalLM.from_pretrained(tiny_teacher)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    theirs = torch_evaluation(model, teacher, tmp_path / "out", tiny_data)
    assert {name: ours[name] for name in theirs} == pytest.approx(theirs, rel=1e-4)
    assert evaluated(capsys, tmp_path / "out", tiny_teacher, tiny_data) == pytest.approx(
        ours, rel=1e-4
    )
    before = evaluated(capsys, tiny_student, tiny_teacher, tiny_data)
    assert ours["ce"] < before["ce"] and ours["kl_forward"] < before["kl_forward"]


def test_the_exported_adapter_is_the_one_that_was_trained(
    lora_run, tiny_student, tiny_teacher, tiny_data, tmp_path, capsys
):
    argv = ["--workdir", str(lora_run), "--out", str(tmp_path / "out"), "--format", "adapter"]
    assert run_command(to_hf.main, argv) == 0
    from peft import PeftModel  # two seconds, of one worker alone

    base = AutoModelForCausalLM.from_pretrained(tiny_student)
    model = PeftModel.from_pretrained(base, tmp_path / "out").eval()
    teacher = AutoModelForCausalLM.from_pretrained(tiny_teacher)
    theirs = torch_evaluation(model, teacher, tiny_student, tiny_data)
    ours = evaluated(capsys, lora_run, tiny_teacher, tiny_data)
    assert {name: ours[name] for name in theirs} == pytest.approx(theirs, rel=1e-4)


def test_evaluation_in_training_is_that_of_the_command(lora_run, config_file, tiny_teacher, capsys):
    held_out = config_file.parent / "held_out.jsonl"
    values = evaluated(capsys, lora_run, tiny_teacher, held_out)
    logged = [line for line in read_metrics(lora_run) if "eval/ce" in line][-1]
    for name in (
        "ce",
        "kl_forward",
        "kl_reverse",
        "acceptance",
        "top1_agreement",
        "ece",
        "entropy",
    ):
        assert logged[f"eval/{name}"] == pytest.approx(values[name], rel=1e-5), name


def test_evaluation_without_a_teacher_gives_cross_entropy(tiny_student, tiny_data, capsys):
    values = evaluated(capsys, tiny_student, None, tiny_data)
    assert values.keys() == {"ce", "perplexity", "entropy", "ece", "target_tokens"}


@pytest.mark.parametrize("flag", ["--seq-len", "--batch-size"])
def test_an_evaluation_of_nothing_is_refused(flag, tiny_student, tiny_data, capsys):
    argv = ["--model", str(tiny_student), "--data", str(tiny_data), flag, "0"]
    assert run_command(evaluate.main, argv) == 2
    assert "expected at least" in capsys.readouterr().err


def test_an_earlier_step_can_be_evaluated_and_an_absent_one_is_refused(
    lora_run, tiny_teacher, tiny_data, capsys
):
    flags = ("--step", str(STEPS - 2))
    early = evaluated(capsys, lora_run, tiny_teacher, tiny_data, *flags)
    late = evaluated(capsys, lora_run, tiny_teacher, tiny_data)
    assert early["ce"] > late["ce"]
    argv = ["--model", str(lora_run), "--data", str(tiny_data), "--step", "99"]
    assert run_command(evaluate.main, argv) == 2
    assert "--step: expected one of" in capsys.readouterr().err


def test_an_adapter_of_another_rank_is_refused(lora_run, run_train, tmp_path, capsys):
    """tests/test_commands.py trains on an adapter."""
    argv = ["--workdir", str(lora_run), "--out", str(tmp_path / "out"), "--format", "adapter"]
    assert run_command(to_hf.main, argv) == 0
    flags = ("--student.adapter", str(tmp_path / "out"), "--lora.rank", "8")
    assert run_train(tmp_path / "wrong", *flags) == 2
    assert "lora.rank: expected 4 as in student.adapter, got 8" in capsys.readouterr().err


def test_the_loop_waits_for_no_device(run_train, tmp_path, monkeypatch):
    """Metrics are read after the next step starts; nothing is queued behind that step."""
    add, flush = step_log.StepLog.add, step_log.StepLog.flush
    started, read, compiled = [], [], []

    def watched_add(self, step, metrics, batch_metrics):
        started.append(step)
        add(self, step, metrics, batch_metrics)

    def watched_flush(self):
        before, pending = len(compiled), self.pending
        flush(self)
        if pending is not None:
            read.append((pending[0], started[-1], compiled[before:]))

    def listen(event, seconds, **_):
        if event.startswith("/jax/core/compile/"):
            compiled.append(event)

    monkeypatch.setattr(step_log.StepLog, "add", watched_add)
    monkeypatch.setattr(step_log.StepLog, "flush", watched_flush)
    jax.clear_caches()  # compiles everything that is dispatched
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        flags = ("--steps", "3", "--eval.path", "None", "--checkpoint.every-steps", "3")
        assert run_train(tmp_path / "run", *flags, "--log.every-steps", "10") == 0
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == [3]  # the last one, always
    assert compiled and read == [(1, 2, []), (2, 3, []), (3, 3, [])]
