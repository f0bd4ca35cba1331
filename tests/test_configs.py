"""Every configuration file, with the published shapes of its models: checked and lowered."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from hub_configs import HUB_CONFIGS, NUM_WEIGHTS

from kd_jax.architecture import read_architecture
from kd_jax.build import abstract_models, make_program
from kd_jax.command import load_config
from kd_jax.data import COLUMNS
from kd_jax.lora import is_adapter
from kd_jax.optim import make_optimizer
from kd_jax.sharding import batch_sharding, make_mesh
from kd_jax.step import init_state, train_step

pytestmark = pytest.mark.fast

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.py"))


def open_config(path):
    """Returns a configuration laid out for the tests' eight devices, and its architectures."""
    config = load_config(path)
    rows = max(8, config.data.batch_size)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, batch_size=rows))
    parts = [config.student] + ([config.teacher] if config.teacher else [])
    return config, [read_architecture(HUB_CONFIGS[part.path], part.path) for part in parts]


def num_weights(arrays):
    return sum(x.size for name, x in arrays.items() if not is_adapter(name))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_configuration_lowers_at_its_true_size(path):
    config, architectures = open_config(path)
    mesh = make_mesh(config.mesh, config.data.batch_size)
    student, teacher = (*architectures, None)[:2]
    models = abstract_models(config, student, teacher, mesh)
    assert num_weights(models.frozen) == NUM_WEIGHTS[config.student.path]
    if config.teacher is not None:
        assert num_weights(models.teacher_arrays) == NUM_WEIGHTS[config.teacher.path]
    vocab_size = min(arch.vocab_size for arch in architectures)
    program = make_program(config, models, vocab_size, mesh)
    optimizer = make_optimizer(config.optim, 1000)
    state = jax.eval_shape(lambda trainable: init_state(trainable, optimizer), models.trainable)
    shape = (1, config.data.batch_size, config.data.seq_len)
    batch = {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=batch_sharding(mesh))
        for name, dtype in COLUMNS.items()
    }
    run = jax.jit(train_step, static_argnums=(0, 1), donate_argnums=2)
    arguments = (models.frozen, models.teacher_arrays, batch)
    lowered = run.lower(program, optimizer, state, *arguments)
    after, metrics = lowered.out_info
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(
        lambda x: (x.shape, x.dtype), state
    )
    assert metrics["loss"].dtype == jnp.float32
    assert ("kd_loss" in metrics) == config.distils


def test_the_control_arm_differs_by_its_teacher_alone():
    distil, control = (load_config(CONFIGS[0].with_name(f"{n}.py")) for n in ("8b_to_1b", "1b_sft"))
    assert dataclasses.replace(distil, teacher=None, workdir=control.workdir) == control
