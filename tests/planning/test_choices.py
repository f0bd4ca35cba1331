"""What "auto" becomes: dtypes by the devices, remat by the estimate of memory."""

import dataclasses

import pytest
from paths import CONFIGS

from kd_jax import plan
from kd_jax.config.command import load_config
from kd_jax.planning import choices
from kd_jax.planning.chips import Topology, find_topology
from kd_jax.planning.cost import Case
from kd_jax.planning.estimate import estimate


def open_case(topology, **changes):
    config = dataclasses.replace(load_config(CONFIGS / "8b_to_1b.py"), **changes)
    archs = [plan.find_architecture(part.path, "x") for part in (config.student, config.teacher)]
    return Case(
        config=choices.choose_dtypes(config, topology.platform),
        student=archs[0],
        teacher=archs[1],
        sizes={"data": 1, "fsdp": 1, "tensor": 1},
        topology=topology,
    )


def peak(case, policy):
    return estimate(choices.with_remat(case, policy))["peak_bytes_per_device"]


@pytest.mark.parametrize("name", ["h200:1x1", "v5p-2", "cpu:1"])
def test_remat_is_the_first_policy_of_the_platform_that_fits(monkeypatch, name):
    case = open_case(find_topology(name.replace("v5p-2", "v6e-1")))
    row = choices.PLATFORMS[case.topology.platform]
    for policy in row.remat:
        room = peak(case, policy) / row.remat_memory
        monkeypatch.setattr(Topology, "memory_limit", int(room) + 2)
        assert choices.choose_remat(case) == policy
        monkeypatch.setattr(Topology, "memory_limit", int(room) - 2)
        assert choices.choose_remat(case) != policy or policy == row.remat[-1]
    assert choices.choose_remat(choices.with_remat(case, "attention")) == "attention"


@pytest.mark.parametrize("features, dtype", [({"avx512_bf16"}, "bfloat16"), (set(), "float32")])
def test_what_was_chosen_is_said_in_one_line(monkeypatch, features, dtype):
    monkeypatch.setattr("kd_jax.parallel.platforms.cpu_features", lambda: features)
    config = load_config(CONFIGS / "8b_to_1b.py")
    case = open_case(find_topology("cpu:1"))
    line = choices.describe_choices(config, choices.with_remat(case, "layer"))
    want = f"chosen for these devices: teacher.dtype {dtype}, student.dtype {dtype}, remat layer ("
    assert line.startswith(want) and line.count("\n") == 0
    assert choices.describe_choices(choices.with_remat(case, "layer").config, case) == ""
