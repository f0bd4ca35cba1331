"""Every configuration file is checked and lowered with the published shapes of its models."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from num_weights import NUM_WEIGHTS
from paths import CONFIGS

from kd_jax.config.command import load_config
from kd_jax.models.architecture import read_architecture
from kd_jax.models.known import KNOWN_MODELS
from kd_jax.models.weight_table import is_adapter
from kd_jax.parallel.mesh import make_mesh
from kd_jax.training.abstract import abstract_run

TEACHER = "HuggingFaceTB/SmolLM2-135M-Instruct"
HALVED = "runs/smollm2_80m"  # every second layer of it, which benchmarks/quality.py writes
MODELS = {**KNOWN_MODELS, HALVED: {**KNOWN_MODELS[TEACHER], "num_hidden_layers": 15}}
COUNTS = {**NUM_WEIGHTS, HALVED: 81_413_568}
ALL_CONFIGS = sorted(CONFIGS.glob("*.py"))


def open_config(path):
    """Returns a configuration with a mesh for the tests' eight devices, and its architectures."""
    config = load_config(path)
    rows = max(8, config.data.batch_size)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, batch_size=rows))
    parts = [config.student] + ([config.teacher] if config.teacher else [])
    return config, [read_architecture(MODELS[part.path], part.path) for part in parts]


def num_weights(arrays):
    return sum(x.size for name, x in arrays.items() if not is_adapter(name))


def make_abstract_run(path):
    """Returns the configuration, and its run as shapes on the tests' eight devices."""
    config, architectures = open_config(path)
    mesh = make_mesh(config.mesh, config.data.batch_size)
    return config, abstract_run(config, *(*architectures, None)[:2], mesh)


@pytest.mark.parametrize("path", ALL_CONFIGS, ids=lambda path: path.stem)
def test_every_configuration_has_models_of_their_true_size(path):
    config, run = make_abstract_run(path)
    student_arrays = run.models.frozen | run.models.trainable["student"]
    assert num_weights(student_arrays) == COUNTS[config.student.path]
    if config.teacher is not None:
        assert num_weights(run.models.teacher_arrays) == COUNTS[config.teacher.path]


@pytest.mark.parametrize(
    "name",
    [
        "8b_to_1b",
        "1b_sft",
        *(pytest.param(x, marks=pytest.mark.slow) for x in ("qwen3_14b_to_8b", "8b_teacher_sft")),
    ],
)
def test_a_documented_run_lowers_at_its_true_size(name):
    config, run = make_abstract_run(CONFIGS / f"{name}.py")
    lowered, state = run.trace().lower(), run.state
    after, metrics = lowered.out_info
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(
        lambda x: (x.shape, x.dtype), state
    )
    assert metrics["loss"].dtype == jnp.float32
    assert ("kd_loss" in metrics) == config.distils


def test_the_control_arm_differs_by_its_teacher_alone():
    distil, control = (load_config(CONFIGS / f"{n}.py") for n in ("8b_to_1b", "1b_sft"))
    assert dataclasses.replace(distil, teacher=None, workdir=control.workdir) == control
