"""Rows whose tokens are split over devices give what one device gives."""

from functools import cache

import numpy as np
import pytest
import tiny
from tiny_run import Run, assert_near, make_run_config

from kd_jax.config import MeshConfig
from kd_jax.parallel.mesh import make_mesh
from kd_jax.parallel.placement import put_batch

pytestmark = pytest.mark.devices(8)

MESHES = {
    "two": {"data": 1, "context": 2},
    "four": {"data": 1, "context": 4},
    "all": {"data": 1, "fsdp": 2, "context": 2, "tensor": 2},
}


@pytest.fixture(scope="module")
def gradients(tmp_path_factory, tiny_data):
    """Returns the gradients by path and the metrics of a step on a mesh; None: on one device."""
    folder = tmp_path_factory.mktemp("context")
    student = tiny.write_plain_model(folder / "student", seed=1)
    teacher = tiny.write_plain_model(folder / "teacher", seed=2, hidden_size=96)

    @cache
    def run(trainable, mesh):
        config = make_run_config(
            student, teacher, tiny_data, folder, trainable=trainable, batch_size=2, seq_len=192,
            mesh=MESHES.get(mesh, {"data": 1}), loss={"divergence": "jsd"},
        )  # fmt: skip
        run = Run(config)
        batch = run.batch()
        assert batch["segment_ids"].max() > 1  # documents are packed
        return run.gradients(batch)

    return run


@pytest.mark.slow  # one of each kind; a run of the command is in test_train.py
@pytest.mark.parametrize(
    "trainable, mesh", [("full", "all"), ("full", "four"), ("lora", "two"), ("lora", "all")]
)
def test_a_step_equals_that_of_one_device(gradients, trainable, mesh):
    got, metrics = gradients(trainable, mesh)
    want, want_metrics = gradients(trainable, None)
    assert_near(got, want, 1e-5)
    assert metrics.keys() == want_metrics.keys()
    for name, value in want_metrics.items():
        assert metrics[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name


def test_a_device_gets_its_part_of_a_cached_teachers_rows():
    mesh = make_mesh(MeshConfig(data=2, context=4), 4)
    batch = {"tokens": np.zeros((4, 32), np.int32), "hidden": np.zeros((4, 32, 8), np.float32)}
    placed = put_batch(batch, mesh)
    shapes = {name: x.addressable_shards[0].data.shape for name, x in placed.items()}
    assert shapes == {"tokens": (2, 32), "hidden": (2, 8, 8)}
    odd = put_batch({name: x[:, :30] for name, x in batch.items()}, mesh)
    assert odd["hidden"].addressable_shards[0].data.shape == (2, 30, 8)
