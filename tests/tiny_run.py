"""Runs of tiny models, built as in kd_jax.train, for tests of the step."""

import math
from pathlib import Path

import jax
import numpy as np
from tiny import ADAPTED

from kd_jax.config import (
    Config,
    DataConfig,
    LoraConfig,
    LossConfig,
    MeshConfig,
    OptimConfig,
    StudentConfig,
    TeacherConfig,
)
from kd_jax.data import batches
from kd_jax.data import rows as data_rows
from kd_jax.data.chat import chat_template_of
from kd_jax.parallel.placement import put_batch
from kd_jax.parallel.rules import AXES
from kd_jax.setup.inputs import open_inputs, prompt_of
from kd_jax.setup.model_files import shared_vocab
from kd_jax.setup.models import load_models
from kd_jax.setup.program import make_program
from kd_jax.training.step import init_state, loss_gradients, train_step

STEPS = 4


def make_run_config(
    student: Path,
    teacher: Path,
    train: Path,
    cache_dir: Path,
    *,
    trainable="full",
    mesh=None,
    loss=None,
    lora=None,
    optim=None,
    teacher_axes=("fsdp", "tensor"),
    student_axes=("fsdp", "tensor"),
    prompt=None,
    steps=STEPS,
    **rows,
) -> Config:
    """Returns the config of a float32 run; dicts override fields of its parts."""
    options = {"seq_len": 128, "batch_size": 8, "cache_dir": str(cache_dir), **rows}
    return Config(
        workdir="unused",
        teacher=TeacherConfig(
            path=str(teacher), dtype="float32", shard_over=teacher_axes, **(prompt or {})
        ),
        student=StudentConfig(path=str(student), dtype="float32", shard_over=student_axes),
        data=DataConfig(path=str(train), **options),
        trainable=trainable,
        lora=LoraConfig(**{"rank": 4, "alpha": 8.0, "target_modules": ADAPTED, **(lora or {})}),
        loss=LossConfig(**{"chunk_tokens": 32, **(loss or {})}),
        mesh=MeshConfig(**(mesh or {"data": 2})),
        optim=OptimConfig(**{"warmup_steps": 2, "learning_rate": 1e-2, **(optim or {})}),
        steps=steps,
    )


class Run:
    """The parts of a run, built as in kd_jax.train."""

    def __init__(self, config, devices=None):
        self.config = config
        sizes = (max(getattr(config.mesh, axis), 1) for axis in AXES)
        devices = devices or jax.devices()[: math.prod(sizes)]
        student, teacher, self.mesh = open_inputs(config, devices)
        template = chat_template_of(config.data, student.tokenizer)
        prompt = prompt_of(config)
        self.rows = data_rows.make_rows(config.data, student.tokenizer, template, prompt=prompt)
        self.models = load_models(config, student, teacher, self.mesh)
        vocab_size = shared_vocab(student, teacher).size
        self.program = make_program(config, self.models, vocab_size, self.mesh, config.steps)
        self.state = init_state(self.program, self.models.trainable)

    def batch(self, seed=0):
        count = self.config.optim.accumulation_steps
        size = self.config.data.batch_size
        return next(
            batches.train_batches(
                self.rows, seed=seed, start_step=0, batch_size=size, accumulation_steps=count
            )
        )

    def arguments(self, batch):
        models = self.models
        placed = put_batch(batch, self.mesh)
        return self.state, models.frozen, models.teacher_arrays, placed

    def step(self, batch):
        """Takes one step and returns its metrics as floats."""
        run = jax.jit(train_step, static_argnums=0)
        self.state, metrics = run(self.program, *self.arguments(batch))
        return {name: float(value) for name, value in metrics.items()}

    def gradients(self, batch):
        """Returns the gradients of the mean loss by path, and the metrics."""
        run = jax.jit(loss_gradients, static_argnums=0)
        gradients, metrics = run(self.program, *self.arguments(batch))
        gradients = {name: np.asarray(x) for name, x in flat(gradients).items()}
        return gradients, {name: float(value) for name, value in metrics.items()}


def flat(trainable):
    """Returns the student's arrays by path, and `projection` if trained."""
    rest = {name: x for name, x in trainable.items() if name != "student"}
    return trainable["student"] | rest


def assert_near(got, want, tolerance):
    assert got.keys() == want.keys()
    for name, value in want.items():
        scale = np.abs(value).max()
        assert np.abs(got[name] - value).max() <= tolerance * max(scale, 1e-6), name
