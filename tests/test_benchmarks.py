"""The benchmarks run, at sizes too small to measure speed."""

import json
import subprocess
import sys

import pytest
import tiny
from children import environment
from paths import ROOT


def run(*arguments, name="kd_head"):
    command = [sys.executable, "-m", f"benchmarks.{name}", *map(str, arguments)]
    return subprocess.run(command, env=environment(1), cwd=ROOT, capture_output=True, text=True)


@pytest.mark.slow
def test_the_head_is_measured_beside_its_products(tmp_path):
    shape = ("--tokens", 40, "--widths", 8, 12, "--vocab", 300, "--chunk-tokens", 16)
    options = ("--divergences", "forward_kl", "jsd", "--masked", 0.5, "--rounds", 1)
    options += ("--dtypes", "float32")
    done = run(*shape, *options, "--json", tmp_path / "out.json")
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "out.json").read_text())["results"]
    sides = {x["side"]: x for x in results if x["dtype"] == "float32"}
    assert sides.keys() >= {"products", "kd_jax forward_kl", "kd_jax jsd", "dense forward_kl"}
    assert sides["kd_jax forward_kl"]["loss"] == pytest.approx(
        sides["dense forward_kl"]["loss"], rel=1e-5
    )
    assert "kd_jax masked 0.5" in sides and "/ products" in done.stdout


def test_a_wrong_shape_is_refused():
    done = run("--tokens", 0, "--masked", 1)
    assert done.returncode == 2
    assert "--tokens: expected at least 1" in done.stderr and "--masked" in done.stderr


@pytest.mark.slow
@pytest.mark.timeout(480)  # six starts
def test_a_run_that_is_killed_three_times_is_bit_equal_to_one_left_alone():
    done = run("--kills", 3, "--steps", 60, name="kills")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "losses of 60 steps, 6 evaluations and the last weights bit-equal" in done.stdout


@pytest.mark.slow
@pytest.mark.timeout(480)
def test_an_on_policy_run_that_is_killed_three_times_is_bit_equal_to_one_left_alone():
    done = run("--kills", 3, "--steps", 40, "--on-policy", name="kills")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 evaluations, 14 samples and the last weights bit-equal" in done.stdout


def write_config(tiny_data, tmp_path):
    student, teacher = (tiny.write_plain_model(tmp_path / name) for name in ("s", "t"))
    return tiny.write_config(tmp_path, teacher=teacher, student=student, data=tiny_data, steps=1)


@pytest.mark.slow
def test_the_step_is_measured(tiny_data, tmp_path):
    file = write_config(tiny_data, tmp_path)
    flags = ("--json", tmp_path / "out.json", "--workdir", tmp_path / "unused", "--rounds", 1)
    done = run("--config", file, *flags, name="train_step")
    assert done.returncode == 0, done.stderr
    measured = json.loads((tmp_path / "out.json").read_text())
    assert measured["tokens_per_second"] > measured["target_tokens_per_second"] > 0
    assert measured["flop_per_step"] > 0 and len(measured["seconds"]) == 3
    assert not (tmp_path / "unused").exists()


@pytest.mark.slow
def test_students_of_each_form_of_a_cache_are_compared(tiny_data, tmp_path):
    file, words = write_config(tiny_data, tmp_path), ("--out", tmp_path / "out", "--seeds", 1)
    flags = ("--config", file, "--eval.path", tiny_data, "--forms", "exact", "sampled 64")
    flags += ("--steps", 2, "--optim.warmup-steps", 0, "--optim.learning-rate", 0.01)
    done = run(*words, *flags, name="cache_students")
    assert done.returncode == 0, done.stderr
    rows = [line.split(" | ") for line in done.stdout.splitlines() if line.startswith("| ")][1:]
    assert [row[0] for row in rows] == ["| exact", "| sampled 64"]
    assert rows[0][4] == "–" and 0 < abs(float(rows[1][4])) < float(rows[0][3])


@pytest.mark.slow
@pytest.mark.timeout(480)  # seven commands
def test_a_prompt_is_distilled_and_the_table_printed(tmp_path):
    done = run(tmp_path / "out", "--seeds", 1, "--steps", 6, "--base-steps", 4, name="prompts")
    assert done.returncode == 0, done.stderr
    rows = [line.split(" | ") for line in done.stdout.splitlines() if line.startswith("| ")]
    names = [row[0].strip("| ") for row in rows[2:]]
    assert names == ["untouched", "fine-tuned", "distilled from itself", "base with the message"]
    untouched, _, distilled, _ = (float(row[2]) for row in rows[2:])
    assert 0 < distilled < untouched
