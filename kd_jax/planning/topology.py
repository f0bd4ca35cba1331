"""A topology's devices: those of this machine, or absent ones that a compiler targets."""

import dataclasses
import importlib.util
import math
import os
from collections.abc import Sequence
from typing import Any

from kd_jax.config import UserError
from kd_jax.parallel.experimental import experimental
from kd_jax.parallel.platforms import PLATFORMS
from kd_jax.planning.chips import Chip, Topology, chip_of, xla_target

# Without these, libtpu looks for a TPU on this machine and logs at length that there is none.
_TPU_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
}


def prepare(topology: Topology) -> None:
    """Sets the environment for compiling for the topology. Call it before jax is imported.

    Raises:
      UserError: the compiler is not installed.
    """
    if topology.name == "local":
        return
    platform = topology.platform
    compilers = {"gpu": ("jax_plugins.xla_cuda13", "cuda13"), "tpu": ("libtpu", "tpu")}
    module, extra = compilers.get(platform, ("jax", ""))
    if not _is_installed(module):
        raise UserError(
            f"--topology: expected the compiler of {topology.name}, which is not installed. "
            f"pip install 'kd-jax[{extra}]' needs no such device; --analytic needs no compiler"
        )
    settings = {"JAX_PLATFORMS": "cpu"}
    flags = os.environ.get("XLA_FLAGS", "")
    if platform == "cpu":
        flags += f" --xla_force_host_platform_device_count={topology.num_devices}"
    elif platform == "gpu":
        settings |= {"JAX_PLATFORMS": "cpu,cuda", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1"}
        flags += " --xla_gpu_autotune_level=0"  # there is nothing to time
    else:
        settings |= _TPU_ENVIRONMENT
    os.environ.update(settings | {"XLA_FLAGS": flags})


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def devices_of(topology: Topology) -> list[Any]:
    """Returns devices to compile for; those of absent chips cannot run a program."""
    if topology.chip is None:
        import jax

        return jax.devices()
    get_topology_desc = experimental("jax.experimental.topologies", "get_topology_desc")
    kind = topology.name.split(":")[0]
    if topology.chip.platform == "gpu":
        shape, target = topology.name.split(":")[1], xla_target(topology.chip)
        return get_topology_desc(kind, "cuda", target_config=target, topology=shape).devices
    cube = len(topology.shape) == 3
    bounds = (2, 2, 1) if math.prod(topology.shape) >= 4 else (1, 1, 1)
    return get_topology_desc(
        topology.name,
        "tpu",
        chip_config_name="megacore" if cube else "default",
        chips_per_host_bounds=bounds,
        num_slices=1,
    ).devices


def local_topology(devices: Sequence[Any]) -> Topology:
    """Returns the topology of the devices that jax found, with the memory that they report.

    An unknown GPU or TPU has only its memory, and no speeds.
    """
    import jax

    hosts = len({device.process_index for device in devices})
    first = jax.local_devices()[0]
    chip, stats = chip_of(first.device_kind), first.memory_stats() or {}
    if first.platform in ("gpu", "tpu") and "bytes_limit" in stats:
        chip = chip or Chip(platform=first.platform, memory_bytes=0)
        share = PLATFORMS[chip.platform].memory_share
        chip = dataclasses.replace(chip, memory_bytes=int(stats["bytes_limit"] / share))
    return Topology("local", (1, hosts, len(devices) // hosts), chip)
