"""What a run will take on devices that need not be here: estimated from shapes, or compiled."""

import dataclasses
import math
import os
import re
import time
from collections.abc import Iterable, Sequence
from typing import Any

from kd_jax.config import Config
from kd_jax.models.architecture import Architecture
from kd_jax.parallel.rules import BATCH_AXES, Sizes, axes_size
from kd_jax.planning import cost
from kd_jax.planning.chips import GIB, GPU_MEMORY_SHARE, Chip, Topology

LARGEST = 8  # temporaries that a report names


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


def compile_ahead(case: Case, devices: Sequence[Any]) -> Report:
    """Returns `estimate` with what the compiler makes of the train step in its place.

    The program is the one that kd_jax.train runs; weights are shapes alone. A TPU's compiler
    refuses what does not fit, and says how much it would have taken.
    """
    from kd_jax import hlo
    from kd_jax.abstract import abstract_run
    from kd_jax.build import start_jax
    from kd_jax.parallel.mesh import make_mesh

    start_jax(None)
    config, report = case.config, estimate(case)
    mesh_config = dataclasses.replace(config.mesh, **case.sizes)
    rows = config.data.batch_size // config.optim.accumulation_steps
    mesh = make_mesh(mesh_config, rows, devices)
    run = abstract_run(config, case.student, case.teacher, mesh)
    start = time.perf_counter()
    lowered = run.trace().lower()
    traced = time.perf_counter()
    report |= {"method": "compiled", "trace_seconds": traced - start}
    try:
        compiled = lowered.compile()
    except Exception as error:
        compiled, report = None, report | _too_large(case, error)
    report["compile_seconds"] = time.perf_counter() - traced
    if compiled is None:
        return report
    used = compiled.memory_analysis()
    temporaries = used.temp_size_in_bytes + used.output_size_in_bytes - used.alias_size_in_bytes
    report |= _memory_fields(case.topology, used.argument_size_in_bytes, temporaries)
    program = hlo.read_program(compiled.as_text())
    tokens = rows * config.data.seq_len / axes_size(case.sizes, BATCH_AXES) * case.target_share
    found = hlo.collectives(program, math.ceil(tokens / run.program.head.chunk_tokens))
    needs = cost.work(*case.models, case.target_share)
    report |= _time_fields(case, needs, [one.transfer for one in found])
    largest = hlo.largest_arrays(program, LARGEST)
    return report | {"largest_temporaries": [array._asdict() for array in largest]}


def _too_large(case: Case, error: Exception) -> Report:
    """Returns the memory fields of a program that a TPU's compiler refuses for its size.

    Raises:
      the error, where it is another.
    """
    if found := re.search(r"required for HLO temporaries \(([\d.]+)G\)", str(error)):
        arguments = cost.memory(*case.models, case.topology).arguments
        return _memory_fields(case.topology, arguments, int(float(found[1]) * GIB))
    raise error
