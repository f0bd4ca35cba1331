"""Devices that are not here: what the compilers for GPUs and TPUs take for a topology by name."""

import dataclasses
import importlib.util
import math
import os
from collections.abc import Sequence
from typing import Any

from kd_jax.config import UserError
from kd_jax.planning.chips import GPU_MEMORY_SHARE, Topology, chip_of, xla_target

# libtpu asks the machine about itself, and says much where there is no TPU, unless told these.
_TPU_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
}


def prepare(topology: Topology) -> None:
    """Sets the environment that compiling for the topology needs. Before jax is imported.

    Raises:
      UserError: the compiler is not installed.
    """
    if topology.name == "local":
        return
    platform = "cpu" if topology.chip is None else topology.chip.platform
    module, extra = {
        "cpu": ("jax", ""),
        "gpu": ("jax_plugins.xla_cuda13", "cuda13"),
        "tpu": ("libtpu", "tpu"),
    }[platform]
    if not _is_installed(module):
        raise UserError(
            f"--topology: {topology.name} needs its compiler. Install it with "
            f"pip install 'kd-jax[{extra}]', no such device is needed; --analytic needs neither"
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
    """Returns the topology's devices, which programs can be compiled for and not run on."""
    import jax
    from jax.experimental.topologies import get_topology_desc

    if topology.chip is None:
        return jax.devices()
    kind = topology.name.split(":")[0]
    if topology.chip.platform == "gpu":
        shape = "x".join(map(str, topology.shape))
        target = xla_target(kind, topology.chip)
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
    """Returns what is known of the devices that jax found here, with the memory that they say."""
    import jax

    hosts = len({device.process_index for device in devices})
    first = jax.local_devices()[0]
    chip, stats = chip_of(first.device_kind), first.memory_stats() or {}
    if chip is not None and "bytes_limit" in stats:
        share = GPU_MEMORY_SHARE if chip.platform == "gpu" else 1.0  # that jax was told to take
        chip = dataclasses.replace(chip, memory_bytes=int(stats["bytes_limit"] / share))
    return Topology("local", (1, hosts, len(devices) // hosts), chip)
