"""Devices by name, and those that are here."""

from types import SimpleNamespace

import jax
import pytest
from paths import CONFIGS

from kd_jax import plan
from kd_jax.config import UserError
from kd_jax.config.command import load_config
from kd_jax.planning.chips import CHIPS, chip_of, find_topology, xla_target
from kd_jax.planning.cost import Case
from kd_jax.planning.estimate import estimate
from kd_jax.planning.mesh_choice import choose_sizes
from kd_jax.planning.topology import local_topology


@pytest.mark.parametrize(
    "device_kind, name",
    [
        ("NVIDIA A100-SXM4-80GB", "a100"), ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"), ("NVIDIA B200", "b200"), ("NVIDIA L40S", "l40s"),
        ("NVIDIA L4", "l4"), ("NVIDIA A10", "a10"), ("NVIDIA RTX A6000", "a6000"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("NVIDIA RTX 6000 Ada Generation", "rtx6000ada"), ("TPU v4", "v4"),
        ("TPU v5 lite", "v5e"), ("TPU v5e", "v5e"), ("TPU v5", "v5p"), ("TPU v5p", "v5p"),
        ("TPU v6 lite", "v6e"),
        # Of other speeds than those whose names they hold.
        ("NVIDIA L40", None), ("NVIDIA A10G", None), ("NVIDIA GH200 480GB", None),
        ("NVIDIA GeForce RTX 4090 D", None), ("Quadro RTX 6000", None), ("cpu", None),
    ],
)  # fmt: skip
def test_a_device_is_known_by_its_whole_name(device_kind, name):
    assert chip_of(device_kind) is CHIPS.get(name)


def test_the_devices_here_can_be_planned_for():
    here = local_topology(jax.devices())
    assert here.num_devices == len(jax.devices()) and here.num_hosts == 1 and here.chip is None


def gpus(monkeypatch, device_kind, num_bytes, count=8):
    """Returns the topology of GPUs that are here and report so much memory for programs."""
    device = SimpleNamespace(
        device_kind=device_kind,
        platform="gpu",
        process_index=0,
        memory_stats=lambda: {"bytes_limit": num_bytes},
    )
    monkeypatch.setattr(jax, "local_devices", lambda: [device] * count)
    return local_topology([device] * count)


@pytest.mark.parametrize("device_kind", ["NVIDIA of next year", "NVIDIA L40S"])
def test_a_gpus_layout_follows_from_the_memory_that_it_reports(monkeypatch, device_kind):
    config = load_config(CONFIGS / "8b_to_1b.py")
    archs = [plan.find_architecture(part.path, "x") for part in (config.student, config.teacher)]
    large, small, tiny = (gpus(monkeypatch, device_kind, gib * 2**30) for gib in (120, 20, 1))
    assert large.memory_limit == pytest.approx(120 * 2**30, abs=1)
    assert choose_sizes(config, *archs, large)["fsdp"] == 1
    sizes = choose_sizes(config, *archs, small)
    assert sizes["fsdp"] * sizes["tensor"] > 1
    case = Case(config=config, student=archs[0], teacher=archs[1], sizes=sizes, topology=small)
    report = estimate(case)
    assert report["fits"] and report["limit_bytes_per_device"] == small.memory_limit
    assert (report["bound_step_seconds"] is None) == (chip_of(device_kind) is None)
    assert "does not fit" in plan.describe(report | {"fits": False})
    with pytest.raises(UserError, match=r"8 devices of 1\.0 GiB"):
        choose_sizes(config, *archs, tiny)


def test_every_gpu_has_a_description_for_xla():
    for name, chip in CHIPS.items():
        if chip.platform == "gpu":
            major, minor = chip.target.capability
            text = xla_target(chip)
            assert f"major: {major} minor: {minor}" in text
            assert f"core_count: {chip.target.core_count}\n" in text
            assert find_topology(f"{name}:8").num_devices == 8
