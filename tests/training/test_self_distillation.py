"""A student that is its own teacher: its base without the adapter, or its average."""

import itertools
import shutil
from dataclasses import replace

import jax
import numpy as np
import pytest
import tiny
from tiny_run import Run, flat

from kd_jax import train
from kd_jax.config import CheckpointConfig, EvalConfig, MeshConfig, OptimConfig, TeacherConfig
from kd_jax.config.command import run_command
from kd_jax.data.prompts import read_prompt
from kd_jax.inference.arguments import EvaluateArgs
from kd_jax.inference.comparison import _prompted
from kd_jax.inference.load import open_model
from kd_jax.training.step import jit_train_step, teacher_weights, train_step
from kd_jax.workdir.checkpoints import open_trained

ONE = {"mesh": {"data": 1}, "batch_size": 2}


def steps(run, count):
    """Yields the state and the metrics after each step."""
    step = jit_train_step(run.mesh, jax.tree.map(lambda x: x.sharding, run.state))
    for _ in range(count):
        run.state, metrics = step(run.program, *run.arguments(run.batch()))
        yield run.state, jax.device_get(metrics)


def with_teacher(config, **fields):
    return replace(config, teacher=TeacherConfig(**fields))


def test_the_base_is_the_student_of_disk_and_held_once(make_config):
    """Bit for bit: the same metrics and weights as with the student's folder as the teacher."""
    config = make_config(trainable="lora", **ONE)
    same = {"system": "Meow."}
    base = Run(with_teacher(config, kind="base", **same), jax.devices()[:1])
    folder = with_teacher(config, path=config.student.path, dtype="float32", **same)
    folder = Run(folder, jax.devices()[:1])
    assert not base.models.teacher_arrays and len(folder.models.teacher_arrays) > 5
    for (ours, some), (theirs, others) in zip(steps(base, 2), steps(folder, 2), strict=True):
        assert some == others and some["kd_loss"] > 1e-3
        jax.tree.map(np.testing.assert_array_equal, ours.trainable, theirs.trainable)


def test_the_average_follows_the_weights(make_config):
    """Twin: the weights themselves are no such average."""
    config = make_config(mesh={"data": 1, "fsdp": 2})
    run = Run(with_teacher(config, kind="ema", ema_decay=0.75))
    average = {name: np.array(x, np.float64) for name, x in flat(run.state.trainable).items()}
    distances, taken = [], steps(run, 4)
    for state, metrics in itertools.islice(taken, 3):
        weights = {name: np.array(x, np.float64) for name, x in flat(state.trainable).items()}
        distances.append(metrics["kd_loss"])
        found = teacher_weights(run.program, state, {}, {})
        for name, weight in weights.items():
            average[name] = 0.75 * average[name] + 0.25 * weight
            scale = np.abs(weight).max()
            np.testing.assert_allclose(found[name], average[name], rtol=0, atol=1e-6 * scale)
            assert found[name].sharding == state.trainable["student"][name].sharding
    moved = "layers.self_attn.q_proj.weight"
    assert np.abs(average[moved] - weights[moved]).max() > 1e-3 * np.abs(weights[moved]).max()
    # The first step's teacher is the student.
    assert distances[0] == pytest.approx(0, abs=1e-6) and distances[-1] > 1e-5
    assert_measured_to(run, taken, average)


def assert_measured_to(run, taken, average):
    """Compares the next step with that of a run whose teacher is a model with these weights."""
    given = {n: x.astype(np.float32) for n, x in average.items()}
    program = replace(run.program, teacher_kind="model")
    state, frozen, _, batch = run.arguments(run.batch())
    step = jax.jit(lambda s, g: train_step(program, s, frozen, g, batch))
    plain = state._replace(opt_state=state.opt_state[0])
    metrics = step(plain, given)[1]
    _, want = next(taken)
    assert float(metrics["kd_loss"]) == pytest.approx(float(want["kd_loss"]), rel=1e-4)


def test_a_run_goes_on_bit_for_bit_with_its_average_and_prompt(
    tiny_student, tiny_data, tmp_path, capsys
):
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("Meow.\n")
    teacher = TeacherConfig(kind="ema", ema_decay=0.5, system=f"@{prompt}")
    tiny.write_config(
        tmp_path, teacher=teacher, student=tiny_student, data=tiny_data, dtype="float32",
        eval=EvalConfig(fraction=0.2, every_steps=2), checkpoint=CheckpointConfig(every_steps=2),
        optim=OptimConfig(warmup_steps=0, learning_rate=1e-2), mesh=MeshConfig(data=2),
    )  # fmt: skip
    flags = ["--config", str(tmp_path / "config.py")]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert run_command(train.main, [*flags, "--workdir", str(whole)]) == 0
    assert "its teacher is itself, as an exponential average" in capsys.readouterr().out
    shutil.copytree(whole, broken)
    shutil.rmtree(broken / "checkpoints" / "4")
    lines = (broken / "metrics.jsonl").read_text().splitlines(keepends=True)
    (broken / "metrics.jsonl").write_text("".join(lines[:3]))
    assert run_command(train.main, [*flags, "--workdir", str(broken)]) == 0
    assert "resumed at step 2" in capsys.readouterr().out
    assert tiny.trace(broken) == tiny.trace(whole)
    assert tiny.trace(whole)[-1]["eval/kl_forward"] > 0
    assert not any("average" in name for name in open_trained(whole).shapes)
    prompt.unlink()  # an evaluation gives the teacher what it was
    args = EvaluateArgs(model=str(whole), teacher=str(tiny_student), data="d")
    assert read_prompt(_prompted(args, open_model(str(whole), "float32"))).system == "Meow."
