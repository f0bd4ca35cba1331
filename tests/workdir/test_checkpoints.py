"""Checkpoints that cannot be written, and weights that must not be."""

import os
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from paths import ROOT
from safetensors.numpy import load_file, save_file

from kd_jax import train
from kd_jax.config import OptimConfig, UserError
from kd_jax.config.command import run_command
from kd_jax.training.step import TrainState
from kd_jax.workdir import checkpoints

pytestmark = pytest.mark.fast


def state(value=1.0, step=1):
    return TrainState({"a": jnp.ones(8), "b": jnp.full(8, value)}, {}, jnp.int32(step))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_never_saved(value, tmp_path):
    with checkpoints.open_checkpointer(tmp_path, 2) as checkpointer:
        checkpoints.save(checkpointer, state(), 1, None)
        with pytest.raises(UserError, match=r"finite weights.*Last good checkpoint: step 1 in"):
            checkpoints.save(checkpointer, state(value), 2, None)
    assert sorted(x.name for x in (tmp_path / "checkpoints").iterdir()) == ["1"]


# Saves once, breaks the folder or fills the disk, and saves again.
BROKEN = """
import sys
from pathlib import Path
import jax.numpy as jnp
from etils.epath import abstract_path
from kd_jax.config.command import run_command
from kd_jax.training.step import TrainState
from kd_jax.workdir import checkpoints

def full(*_, **__):
    raise OSError(28, "No space left on device")

def main(argv):
    workdir, kind = Path(argv[0]), argv[1]
    state = TrainState({"a": jnp.ones(8)}, {}, jnp.int32(1))
    with checkpoints.open_checkpointer(workdir, 2) as checkpointer:
        checkpoints.save(checkpointer, state, 1, None)
        checkpointer.wait()
        if kind == "full":
            abstract_path.Path.write_text = full
        else:
            (workdir / "checkpoints").rename(workdir / "away")
            (workdir / "checkpoints").write_text("")
        checkpoints.save(checkpointer, state, 2, None)

sys.exit(run_command(main))
"""


@pytest.mark.parametrize(
    "kind, words", [("unwritable", "checkpoints/2"), ("full", "No space left")]
)
def test_a_checkpoint_that_cannot_be_written_is_one_line_and_an_end(kind, words, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", BROKEN, str(tmp_path), kind],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 1 and done.stdout == ""
    lines = done.stderr.splitlines()
    (error,) = (line for line in lines if line.startswith("error: "))
    assert words in error
    assert len(lines) < 21  # a thread of Orbax may still print what ended it


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder with a config, tiny models, and a student with a NaN."""
    root = tmp_path_factory.mktemp("models")
    for name in ("teacher", "student", "nan"):
        file = tiny.write_plain_model(root / name, num_hidden_layers=1) / "model.safetensors"
        if name == "nan":
            tensors = load_file(file)
            tensors["model.layers.0.mlp.down_proj.weight"][3, 5] = np.nan
            save_file(tensors, file, metadata={"format": "pt"})
    tiny.write_data(root / "train.jsonl")
    tiny.write_config(root, rows={"batch_size": 4}, optim=OptimConfig(warmup_steps=0), steps=1)
    return root


@pytest.mark.parametrize(
    "flags, words",
    [
        (("--student.path", "{root}/nan"), "step 1: expected finite values"),
        (
            ("--trainable", "full", "--optim.learning-rate", "3.4e38", "--steps", "1"),
            "step 1: expected finite weights after the update",
        ),
    ],
    ids=["nan", "update"],
)
def test_a_run_that_is_not_finite_stops_and_saves_nothing(flags, words, root, tmp_path, capsys):
    workdir = tmp_path / "run"
    argv = ["--config", str(root / "config.py"), "--workdir", str(workdir)]
    argv += [flag.format(root=root) for flag in flags]
    assert run_command(train.main, argv) == 2
    message = capsys.readouterr().err
    assert words in message and "Traceback" not in message
    assert not list((workdir / "checkpoints").iterdir())
