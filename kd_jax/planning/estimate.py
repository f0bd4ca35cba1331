"""Estimates of a run from shapes, for local or absent devices. Needs no jax."""

from collections.abc import Iterable
from typing import Any

from kd_jax.config import Config
from kd_jax.parallel.platforms import choose_dtype
from kd_jax.planning.chips import Topology
from kd_jax.planning.cost import Case, cached_bytes, work
from kd_jax.planning.memory import estimate_memory
from kd_jax.planning.network import Transfer, bound_seconds, transfers

Report = dict[str, Any]


def estimate(case: Case) -> Report:
    """Returns the fields that `python -m kd_jax.plan --json` prints, estimated from shapes.

    Bytes are those of one device, FLOPs those of all. bound_* are None for devices of unknown
    speed.
    """
    config, topology = case.config, case.topology
    memory = estimate_memory(case)
    arguments = sum(memory.arguments.values())
    return {
        "method": "analytic",
        "topology": topology.name,
        "devices": topology.num_devices,
        "mesh": dict(case.sizes),
        "batch_size": config.data.batch_size,
        "accumulation_steps": config.optim.accumulation_steps,
        "seq_len": config.data.seq_len,
        "remat": config.remat_policy,
        "dtypes": _dtypes(config, topology.platform),
        "bytes_by_kind": memory.arguments,
        "analytic_peak_bytes_per_device": arguments + memory.temporaries,
        **memory_fields(topology, arguments, memory.temporaries),
        **time_fields(case, transfers(case)),
    }


def _dtypes(config: Config, platform: str) -> dict[str, str]:
    """Returns the dtype of each model on a platform."""
    parts = {"student": config.student, "teacher": config.teacher if config.distils else None}
    return {name: choose_dtype(x.dtype, platform) for name, x in parts.items() if x is not None}


def memory_fields(topology: Topology, arguments: int, temporaries: int) -> Report:
    """Returns the fields about the memory of one device, from the bytes of its arrays."""
    limit, peak = topology.memory_limit, arguments + temporaries
    return {
        "fits": peak <= limit,
        "peak_bytes_per_device": peak,
        "limit_bytes_per_device": limit,
        "argument_bytes_per_device": arguments,
        "temporary_bytes_per_device": temporaries,
    }


def time_fields(case: Case, transfers: Iterable[Transfer]) -> Report:
    """Returns FLOPs, collectives by kind, and the least time that a step can take."""
    transfers, needs = list(transfers), work(case)
    kinds: dict[str, Report] = {}
    for x in transfers:
        sums = kinds.setdefault(x.kind, {"count": 0, "bytes": 0})
        sums["count"] += x.times
        sums["bytes"] += x.times * x.num_bytes
    seconds = bound_seconds(needs, transfers, case.topology)
    longest = max(seconds.values(), default=None)
    return {
        "flops_per_step": needs.flops,
        "recomputed_flops_per_step": needs.recomputed_flops,
        "cache_bytes_per_step": cached_bytes(case) * case.num_targets,
        "collectives": kinds,
        "bound_step_seconds": longest,
        "bound_tokens_per_second": longest and case.num_tokens / longest,
        "bound_by": max(seconds, key=lambda name: seconds[name], default=None),
        "bound_seconds": seconds or None,
    }
