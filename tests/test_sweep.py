"""Sweeps through the real command, and the errors before any run starts."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
from children import environment
from paths import ROOT

from kd_jax import report, sweep, train
from kd_jax.config import CheckpointConfig, EvalConfig
from kd_jax.config.command import run_command


@pytest.fixture(scope="module", autouse=True)
def one_device():
    """Starts runs on one device, which is faster than eight."""
    alone = partial(subprocess.Popen, env=environment(1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subprocess, "Popen", alone)
        yield


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A configuration of tiny models with four steps."""
    root = tmp_path_factory.mktemp("models")
    tiny.write_plain_model(root / "student", seed=1)
    tiny.write_plain_model(root / "teacher", seed=2, hidden_size=96, num_hidden_layers=2)
    tiny.write_data(root / "train.jsonl")
    return tiny.write_config(
        root, workdir=str(root / "one"), checkpoint=CheckpointConfig(every_steps=2),
        eval=EvalConfig(path=str(root / "train.jsonl"), every_steps=2),
    )  # fmt: skip


def run(*argv):
    return run_command(sweep.main, [str(word) for word in argv])


def planned(capsys):
    """Returns the flags of each printed command."""
    lines = capsys.readouterr().out.splitlines()
    return [line.split(" ", 4)[4].split() for line in lines if line.startswith("[")]


def test_the_runs_are_all_combinations_seed_by_seed(file, tmp_path, capsys):
    grid = ("--set", "loss.kd-ratio", 0, 0.5, "--set", "optim.learning-rate", "1e-4", "3e-4")
    out = tmp_path / "sweep"
    more = ("--seeds", 2, "--lora.rank", 8, "--dry-run", "--workdir", out)
    assert run("--config", file, *grid, *more) == 0
    commands = planned(capsys)
    names = [Path(command[-1]).name for command in commands]
    assert names == [
        f"kd-ratio={ratio},learning-rate={rate},seed={seed}"
        for seed in (0, 1)
        for ratio in ("0", "0.5")
        for rate in ("1e-4", "3e-4")
    ]
    words = f"--config {file} --lora.rank 8 --seed 0 --loss.kd-ratio 0 --optim.learning-rate 3e-4"
    assert commands[1] == [*words.split(), "--workdir", str(out / names[1])]
    assert not out.exists()


def test_switches_lists_and_paths_are_values_too(file, tmp_path, capsys):
    grid = ("--set", "data.pack", "true", "false", "--set", "data.path", "a/x.json", "b/x.json")
    modules = ("--set", "lora.target-modules", "q_proj", "q_proj v_proj")
    argv = ("--config", file, *grid, *modules, "--dry-run", "--workdir", tmp_path)
    assert run(*argv) == 0
    commands = planned(capsys)
    assert [command[2] for command in commands] == ["--data.pack"] * 4 + ["--data.no-pack"] * 4
    assert commands[1][5:8] == ["--lora.target-modules", "q_proj", "v_proj"]
    folders = [command[-1] for command in commands]
    assert len(set(folders)) == 8 and all("/" not in Path(f).name for f in folders)
    assert run(*argv) == 0
    assert [command[-1] for command in planned(capsys)] == folders


def test_the_default_folder_is_beside_the_files_own(file, capsys):
    assert run("--config", file, "--seeds", 1, "--dry-run") == 0
    assert planned(capsys)[0][-1] == str(file.parent / "one-sweep" / "seed=0")


@pytest.mark.parametrize(
    "argv, words",
    [
        ("--set loss.kd-rato 0 1", ["--loss.kd-rato", "Did you mean --loss.kd-ratio?"]),
        (
            "--set loss.kd_ratio 0 2 7",
            ["loss.kd-ratio: expected at least 0 and at most 1, got 2.0", "7.0"],
        ),
        (
            "--set loss.kd-ratio 3 0 --set optim.learning-rate -1 1",
            ["loss.kd-ratio: expected", "optim.learning-rate: expected at least 0, got -1.0"],
        ),
        ("--set optim.learning-rate 1e-3 fast", ["--optim.learning-rate", "'fast'"]),
        ("--set data.pack maybe true", ["--set data.pack: expected true or false, got maybe"]),
        ("--set loss.kd-ratio 0.5 .5", ["kd-ratio=0.5", "kd-ratio=.5"]),
        ("--set data.path a.json ./b/../a.json", ["expected different runs"]),
        ("--set loss.kd-ratio 0.5 0.5", ["--set loss.kd-ratio: 0.5 is given twice"]),
        ("--set loss.kd-ratio 0 --set loss.kd-ratio 1", ["--set loss.kd-ratio: given twice"]),
        ("--set loss.kd-ratio 0 --loss.kd-ratio 1", ["--set loss.kd-ratio", "all runs"]),
        ("--set loss.kd-ratio", ["--set: expected FIELD VALUE"]),
        ("--set", ["--set: expected FIELD VALUE"]),
        ("--set workdir a b", ["--set workdir"]),
        ("--set seed 1 2 --seeds 2", ["--seeds: expected either"]),
        ("--seeds 0", ["--seeds: expected at least 1, got 0"]),
        ("--seeds 2 --lora.rnk 4", ["--lora.rnk", "Did you mean --lora.rank?"]),
        ("", ["--set: expected a field"]),
    ],
)
def test_mistakes_are_told_before_anything_starts(file, tmp_path, capsys, argv, words):
    assert run("--config", file, *argv.split(), "--workdir", tmp_path / "sweep") == 2
    streams = capsys.readouterr()
    assert streams.err.startswith("error: ") and "Traceback" not in streams.err
    assert all(word in streams.err for word in words), streams.err
    lines = streams.err.splitlines()
    assert len(set(lines)) == len(lines)
    assert streams.out == "" and not (tmp_path / "sweep").exists()


@pytest.mark.parametrize("name", ["config.json", "notes.txt", "data/train.jsonl"])
def test_a_folder_with_other_files_is_no_place_for_a_sweep(name, file, tmp_path, capsys):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("{}")
    argv = ("--set", "loss.kd-ratio", 0, 1, "--workdir", tmp_path, "--dry-run")
    assert run("--config", file, *argv) == 2
    assert "which holds other files and no run" in capsys.readouterr().err
    assert [str(x.relative_to(tmp_path)) for x in tmp_path.rglob("*") if x.is_file()] == [name]


def test_a_sweep_without_a_file_says_so(capsys):
    assert run("--set", "loss.kd-ratio", 0, 1) == 2
    assert "--config" in capsys.readouterr().err


@pytest.fixture(scope="module")
def done(file, tmp_path_factory):
    """A finished sweep over two arms."""
    out = tmp_path_factory.mktemp("sweep") / "out"
    assert run("--config", file, "--set", "loss.kd-ratio", 0, 1, "--workdir", out) == 0
    return out


@pytest.mark.slow
def test_finished_runs_are_skipped_and_others_resumed(file, done, tmp_path, capfd):
    out = shutil.copytree(done, tmp_path / "out")
    argv = ("--config", file, "--set", "loss.kd-ratio", 0, 1, "--workdir", out)
    cut = out / "kd-ratio=1"
    whole = tiny.trace(cut)
    shutil.rmtree(cut / "checkpoints" / "4")
    written = (out / "kd-ratio=0" / "metrics.jsonl").stat().st_mtime_ns
    assert run(*argv) == 0
    streams = capfd.readouterr()
    assert streams.out.count("finished before: skipped") == 1
    assert "resumed at step 2" in streams.out
    assert streams.out.endswith(f"report: python -m kd_jax.report {out}/*\n")
    assert tiny.trace(cut) == whole
    assert (out / "kd-ratio=0" / "metrics.jsonl").stat().st_mtime_ns == written


@pytest.mark.slow
def test_a_finished_sweep_makes_a_report(done, tmp_path):
    folders = [str(folder) for folder in sorted(done.iterdir())]
    assert run_command(report.main, [*folders, "--out", str(tmp_path / "report")]) == 0
    page = (tmp_path / "report" / "index.html").read_text()
    assert "The control is kd-ratio=0, the one arm without a teacher." in page
    assert "cpu (on" in page


@pytest.mark.slow
def test_a_folder_of_another_configuration_is_refused_at_once(file, done, capsys):
    argv = ("--config", file, "--set", "loss.kd-ratio", 0, 1, 0.5, "--workdir", done)
    assert run(*argv, "--optim.learning-rate", "2e-2") == 2
    error = capsys.readouterr().err
    assert error.count("belongs to a run with another configuration") == 2
    assert "optim.learning_rate: 0.01 -> 0.02" in error
    assert not (done / "kd-ratio=0.5").exists()
    assert run("--config", file, "--seeds", 1, "--workdir", done / "kd-ratio=0") == 2
    assert "which is one run" in capsys.readouterr().err


@pytest.mark.parametrize("keep_going", [False, True])
def test_a_failure_stops_the_sweep_unless_told_otherwise(
    file, tmp_path, capfd, monkeypatch, keep_going
):
    if keep_going:  # in this process; the other case starts one
        monkeypatch.setattr(sweep, "_run", lambda x: run_command(train.main, x[2:]))
    argv = ("--set", "student.path", tmp_path / "missing", tmp_path / "absent")
    argv += ("--loss.kd-ratio", 0, "--workdir", tmp_path / "out")
    argv += ("--keep-going",) if keep_going else ()
    assert run("--config", file, *argv) == 2
    streams = capfd.readouterr()
    assert streams.err.count("ended with status 2") == 1 + keep_going
    assert ("[2/2]" in streams.out) is keep_going


@pytest.mark.slow
def test_sigterm_lets_the_run_save_and_starts_no_other(file, tmp_path):
    out = tmp_path / "out"
    argv = ("--config", file, "--seeds", "2", "--steps", "100000", "--workdir", out, "--keep-going")
    often = ("--checkpoint.every-steps", "100000", "--eval.every-steps", "100000")
    child = subprocess.Popen(
        [sys.executable, "-m", "kd_jax.sweep", *map(str, argv), *often],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
    )
    try:
        lines = out / "seed=0" / "metrics.jsonl"
        for _ in range(600):
            if lines.exists() and lines.stat().st_size:
                break
            time.sleep(0.1)
        child.send_signal(signal.SIGTERM)
        assert child.wait(timeout=60) == 1
    finally:
        child.kill()
    assert [folder.name for folder in out.iterdir()] == ["seed=0"]
    assert len(list((out / "seed=0" / "checkpoints").iterdir())) == 1


def test_a_cache_is_planned_once_for_each_data_set_of_one_teacher(file, tmp_path, capsys):
    cache, out = tmp_path / "cache", tmp_path / "sweep"
    flags = ("--config", file, "--cache", cache, "--workdir", out, "--dry-run")
    read = ["--teacher.cache", str(cache)]
    assert run(*flags, "--set", "loss.kd-ratio", 0, 0.5, "--seeds", 2) == 0
    commands = planned(capsys)
    assert commands[0][-2:] == ["--out", str(cache)] and "0.5" in commands[0]
    assert len(commands) == 5 and all(command[-2:] == read for command in commands[1:])
    assert run(*flags, "--set", "data.seq-len", 64, 128) == 0
    assert [x[-2] for x in planned(capsys)] == ["--out"] * 2 + ["--teacher.cache"] * 2
    assert run(*flags, "--set", "teacher.dtype", "float32", "bfloat16") == 2
    assert "--cache: expected runs with one teacher, got 2" in capsys.readouterr().err
    sampled = ("--on-policy.max-new-tokens", 8, "--set", "on-policy.fraction", 0, 0.5)
    assert run(*flags, *sampled) == 2
    assert "a stored teacher cannot score new text" in capsys.readouterr().err


def test_a_cache_of_another_form_is_used_as_it_is(file, tmp_path, capsys, monkeypatch):
    there = SimpleNamespace(kind="topk", fields={"ids": None}, path="cache")
    monkeypatch.setattr("kd_jax.teachers.manifest.read_cache", lambda *_: there)
    flags = ("--config", file, "--cache", tmp_path / "cache", "--workdir", tmp_path / "sweep")
    rest = ("--set", "teacher.cache-rest", "bucket", "uniform")
    assert run(*flags, "--dry-run", *rest) == 0
    printed = capsys.readouterr().out
    assert "is used as it is: topk" in printed and "kd_jax.cache" not in printed
    assert printed.count("--teacher.cache ") == 2
    assert run(*flags, "--set", "loss.temperature", 1, 2, "--seeds", 2) == 2  # before any run
    said = capsys.readouterr()
    assert said.err.count("loss.temperature: expected 1") == 1 and "[1/" not in said.out


@pytest.mark.slow
def test_the_runs_of_a_sweep_read_the_cache_that_it_made(file, tmp_path, capsys):
    cache, out = tmp_path / "cache", tmp_path / "sweep"
    assert run("--config", file, "--cache", cache, "--workdir", out, "--seeds", 1) == 0
    record = json.loads((out / "seed=0" / "config.json").read_text())
    assert record["config"]["teacher"]["cache"] == str(cache)
    assert "teacher.cache" in record["inputs"]
    assert re.search(
        r"\[cache\] the teacher once [\d.]+ s, 1 run from its cache", capsys.readouterr().out
    )
