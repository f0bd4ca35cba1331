"""What a run will take on devices that need not be here: estimated from shapes, or compiled."""

import dataclasses
import os
from collections.abc import Iterable
from typing import Any

from kd_jax.config import Config
from kd_jax.models.architecture import Architecture
from kd_jax.parallel.rules import Sizes
from kd_jax.planning import cost
from kd_jax.planning.chips import GPU_MEMORY_SHARE, Chip, Topology

Report = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """A run and the devices that it is to run on."""

    config: Config
    student: Architecture
    teacher: Architecture | None
    sizes: Sizes
    topology: Topology
    target_share: float = 1.0
    """Of the tokens, those with a loss."""

    @property
    def models(self) -> tuple[Config, Architecture, Architecture | None, Sizes]:
        return self.config, self.student, self.teacher, self.sizes


def memory_limit(chip: Chip | None, num_devices: int) -> int:
    """Returns the bytes that a program can have on a device; CPU devices share this machine's."""
    if chip is None:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // num_devices
    return int(chip.memory_bytes * (GPU_MEMORY_SHARE if chip.platform == "gpu" else 1))


def estimate(case: Case) -> Report:
    """Returns what shapes alone say of a run.

    Returns:
      The fields that `python -m kd_jax.plan --json` prints; bytes are those of one device, FLOP
      those of all. bound_* are None where nothing is known of the device's speed.
    """
    config, topology = case.config, case.topology
    memory = cost.memory(*case.models, topology)
    needs = cost.work(*case.models, case.target_share)
    temporaries = max(memory.temporaries.values())
    kinds = ("teacher", "student", "trainable", "optimizer", "batch")
    return {
        "method": "analytic",
        "topology": topology.name,
        "devices": topology.num_devices,
        "mesh": dict(case.sizes),
        "batch_size": config.data.batch_size,
        "accumulation_steps": config.optim.accumulation_steps,
        "seq_len": config.data.seq_len,
        "remat": config.remat,
        "bytes_by_kind": {name: getattr(memory, name) for name in kinds},
        "analytic_peak_bytes_per_device": memory.peak,
        **_memory_fields(topology, memory.arguments, temporaries),
        "flops_per_step": needs.flops,
        "recomputed_flops_per_step": needs.recomputed_flops,
        **_time_fields(case, needs, cost.transfers(*case.models)),
    }


def _memory_fields(topology: Topology, arguments: int, temporaries: int) -> Report:
    limit, peak = memory_limit(topology.chip, topology.num_devices), arguments + temporaries
    return {
        "fits": peak <= limit,
        "peak_bytes_per_device": peak,
        "limit_bytes_per_device": limit,
        "argument_bytes_per_device": arguments,
        "temporary_bytes_per_device": temporaries,
    }


def _time_fields(case: Case, needs: cost.Work, transfers: Iterable[cost.Transfer]) -> Report:
    """Returns the collectives by kind, and the least time that a step can take."""
    transfers, topology = list(transfers), case.topology
    kinds: dict[str, Report] = {}
    for x in transfers:
        sums = kinds.setdefault(x.kind, {"count": 0, "bytes": 0})
        sums["count"] += x.times
        sums["bytes"] += x.times * x.num_bytes
    bounds: Report = dict.fromkeys(("step_seconds", "tokens_per_second", "by", "seconds"))
    if topology.chip is not None:
        seconds = cost.network_seconds(transfers, topology)
        bound = cost.bound(needs, topology.chip, topology.num_devices, seconds)
        num_tokens = case.config.data.batch_size * case.config.data.seq_len
        bounds = {
            "step_seconds": bound.seconds,
            "tokens_per_second": num_tokens / bound.seconds,
            "by": bound.limited_by,
            "seconds": {
                "compute": bound.compute_seconds,
                "memory": bound.memory_seconds,
                "network": bound.network_seconds,
            },
        }
    return {"collectives": kinds} | {f"bound_{name}": value for name, value in bounds.items()}
