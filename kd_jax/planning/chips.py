"""Accelerators by name: speed, memory and links, and the topologies they form. Needs no jax."""

import math
import os
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from kd_jax.config import UserError
from kd_jax.config.errors import did_you_mean
from kd_jax.parallel.platforms import PLATFORMS

GIB = 2**30


class Target(NamedTuple):
    """Description of a GPU for XLA's compiler."""

    core_count: int
    fpus_per_core: int
    shared_memory_per_core: int
    threads_per_core_limit: int
    l2_cache_size: int
    clock_rate_ghz: float
    capability: tuple[int, int]


@dataclass(frozen=True, kw_only=True, slots=True)
class Chip:
    """One device: a GPU, or a TPU chip with its cores as one. A speed of 0 is unknown."""

    platform: Literal["gpu", "tpu"]
    memory_bytes: int
    """Bytes of memory; on a TPU, the compiler's limit for a program."""
    flops: float = 0.0
    """Dense bfloat16 FLOP/s."""
    bandwidth: float = 0.0
    """Bytes/s of its memory."""
    link_bandwidth: float = 0.0
    """Bytes/s to devices of its host (GPU) or slice (TPU), in one direction."""
    network_bandwidth: float = 0.0
    """Bytes/s to other hosts (GPU) or slices (TPU)."""
    device_kind: str = ""
    """Pattern of jax's device_kind."""
    target: Target | None = None


# TFLOP/s; bytes of memory; GB/s of memory, links and network; device_kind.
# Sources. Speeds: NVIDIA's data sheets and architecture white papers (dense, float32 accumulation;
# NVLink or PCIe in one direction) and Google Cloud's pages of TPUs. Network: one adapter of 400
# Gb/s for each GPU, 200 for an A100, 100 for a PCIe card. Memory: what drivers report, the least
# seen for PCIe cards, and the limit in the message of the TPU's compiler.
_ROWS: dict[str, tuple[float, int, float, float, float, str]] = {
    "a100": (312, 85_100_068_864, 2039, 300, 25, "A100"),
    "h100": (989, 84_942_979_072, 3352, 450, 50, "H100"),
    "h200": (989, 151_397_597_184, 4800, 450, 50, "H200"),
    "b200": (2250, 191_514_411_008, 7672, 900, 50, "B200"),
    "a10": (125, int(22.06 * GIB), 600, 32, 12.5, "A10"),
    "a6000": (154.8, int(44.4 * GIB), 768, 32, 12.5, "RTX A6000"),
    "l4": (121, int(22.03 * GIB), 300, 32, 12.5, "L4"),
    "l40s": (362, int(44.4 * GIB), 864, 32, 12.5, "L40S"),
    "rtx4090": (165.2, int(23.5 * GIB), 1008, 32, 12.5, "RTX 4090(?! D| Laptop)"),
    "rtx6000ada": (364.2, int(44.4 * GIB), 960, 32, 12.5, "RTX 6000 Ada"),
    "v4": (275, int(30.75 * GIB), 1200, 150, 6.25, "TPU v4"),
    "v5e": (197, int(15.75 * GIB), 819, 100, 6.25, "TPU v5 ?(lite|e)"),
    "v5p": (459, int(95.74 * GIB), 2765, 300, 6.25, "TPU v5p?"),
    "v6e": (918, int(31.25 * GIB), 1640, 224, 12.5, "TPU v6 ?(lite|e)"),
}

_TARGETS = {
    "a100": Target(108, 64, 167936, 2048, 41943040, 1.41, (8, 0)),
    "h100": Target(132, 128, 233472, 2048, 52428800, 1.98, (9, 0)),
    "h200": Target(132, 128, 233472, 2048, 52428800, 1.98, (9, 0)),
    "b200": Target(148, 128, 233472, 2048, 132644864, 1.965, (10, 0)),
    "a10": Target(72, 128, 102400, 1536, 6291456, 1.695, (8, 6)),
    "a6000": Target(84, 128, 102400, 1536, 6291456, 1.8, (8, 6)),
    "l4": Target(58, 128, 102400, 1536, 50331648, 2.04, (8, 9)),
    "l40s": Target(142, 128, 102400, 1536, 100663296, 2.52, (8, 9)),
    "rtx4090": Target(128, 128, 102400, 1536, 75497472, 2.52, (8, 9)),
    "rtx6000ada": Target(142, 128, 102400, 1536, 100663296, 2.505, (8, 9)),
}

CHIPS = {
    name: Chip(
        platform="gpu" if name in _TARGETS else "tpu",
        flops=flops * 1e12,
        memory_bytes=memory_bytes,
        bandwidth=bandwidth * 1e9,
        link_bandwidth=link * 1e9,
        network_bandwidth=network * 1e9,
        device_kind=kind,
        target=_TARGETS.get(name),
    )
    for name, (flops, memory_bytes, bandwidth, link, network, kind) in _ROWS.items()
}

# Slices that Google Cloud offers, in chips, and the cores that a name such as v5p-16 counts.
_SQUARES = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")

_CUBES = (
    "2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16",
)  # fmt: skip

SLICES = {"v4": _CUBES, "v5e": _SQUARES, "v5p": _CUBES, "v6e": _SQUARES}

_CORES_PER_CHIP = {"v4": 2, "v5e": 1, "v5p": 2, "v6e": 1}


# Files of Linux's control groups, versions 2 and 1.
_CONTAINER_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def chip_of(device_kind: str) -> Chip | None:
    """Returns the chip with the name that jax gives a device; None for an unknown one."""
    for chip in CHIPS.values():
        if re.search(rf"(?<!\w){chip.device_kind}(?!\w)", device_kind, re.IGNORECASE):
            return chip
    return None


@dataclass(frozen=True, slots=True)
class Topology:
    """Devices by name: chips, `cpu:N`, or `local`, those that jax finds."""

    name: str
    shape: tuple[int, ...] = ()
    """GPU: partitions, hosts in each, devices in each. TPU: chips along the torus."""
    chip: Chip | None = None
    """None for `cpu:N`, and for devices that report no memory."""

    @property
    def num_devices(self) -> int:
        """0 for `local` until its devices are known."""
        return math.prod(self.shape) if self.shape else 0

    @property
    def num_hosts(self) -> int:
        if self.chip is None or self.chip.platform == "tpu":
            return 1  # a TPU's links join all hosts of a slice
        return math.prod(self.shape[:-1])

    @property
    def platform(self) -> str:
        return "cpu" if self.chip is None else self.chip.platform

    @property
    def rated_chip(self) -> Chip | None:
        """The chip, if its speed is known."""
        return self.chip if self.chip is not None and self.chip.flops else None

    @property
    def memory_limit(self) -> int:
        """Bytes that a program can have on a device; CPU devices share this machine's."""
        if self.chip is None:
            return machine_memory() // self.num_devices
        return int(self.chip.memory_bytes * PLATFORMS[self.platform].memory_share)


def machine_memory() -> int:
    """Returns the bytes of this machine's memory, or of its container's limit if that is less."""
    found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for file in _CONTAINER_LIMITS:
        with suppress(OSError, ValueError):  # no container, or "max"
            found.append(int(Path(file).read_text()))
    return min(found)


def find_topology(name: str) -> Topology:
    """Returns the topology of a name such as `v5e:2x4`, `v5p-16`, `h200:1x1x8`, `cpu:8`, `local`.

    Raises:
      UserError: there is none; lists the known ones.
    """
    name = name.lower()
    if name == "local":
        return Topology(name)
    kind, shape = _split(name)
    if kind == "cpu" and len(shape) == 1:
        return Topology(name, shape)
    chip = CHIPS.get(kind)
    gpus = chip is not None and chip.platform == "gpu" and 1 <= len(shape) <= 3
    if gpus:
        shape = (1,) * (3 - len(shape)) + shape
    if gpus or _join(shape) in SLICES.get(kind, ()):
        return Topology(f"{kind}:{_join(shape)}", shape, chip)
    hint = did_you_mean(kind, CHIPS) if chip is None else ""
    raise UserError(
        f"--topology: expected one of the topologies below, got {name}.{hint}\n{known()}"
    )


def _join(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def _sizes(shape: str) -> tuple[int, ...]:
    return tuple(map(int, shape.split("x")))


def _split(name: str) -> tuple[str, tuple[int, ...]]:
    """Returns a name's chip and shape; () for an invalid shape."""
    if found := re.fullmatch(r"(\w+):([1-9]\d*(?:x[1-9]\d*)*)", name):
        return found[1], _sizes(found[2])
    if found := re.fullmatch(r"(v\d+[a-z]*)-(\d+)", name.replace("litepod", "e")):
        for shape in map(_sizes, SLICES.get(found[1], ())):
            if math.prod(shape) * _CORES_PER_CHIP[found[1]] == int(found[2]):
                return found[1], shape
    return name.split(":")[0].split("-")[0], ()


def known() -> str:
    """Returns a list of all topologies' names, as text."""
    gpus = ", ".join(name for name, chip in CHIPS.items() if chip.platform == "gpu")
    lines = [
        f"  {gpus}, then :HOSTSxDEVICES, such as h200:1x8 for one host of eight",
        *(
            f"  {name}, then :SHAPE of {', '.join(shapes)}, or -N such as {name}-"
            f"{math.prod(_sizes(shapes[1])) * _CORES_PER_CHIP[name]}"
            for name, shapes in SLICES.items()
        ),
        "  cpu:N for N CPU devices; local for the devices of this machine",
    ]
    return "\n".join(lines)


_KINDS = {(8, 0): "A100", (8, 6): "A10", (8, 9): "L4", (9, 0): "H100", (10, 0): "B200"}
"""Per compute capability a GPU that jax knows by name, as whose kind its kernels are lowered."""


def xla_target(chip: Chip) -> str:
    """Returns XLA's description of a GPU, a GpuTargetConfigProto as text."""
    assert chip.target is not None
    numbers: dict[str, Any] = chip.target._asdict()
    major, minor = numbers.pop("capability")
    numbers |= {
        "threads_per_block_limit": 1024,
        "threads_per_warp": 32,
        "shared_memory_per_block": 49152,
        "shared_memory_per_block_optin": chip.target.shared_memory_per_core - 1024,
        "block_dim_limit_x": 2**31 - 1,
        "block_dim_limit_y": 65535,
        "block_dim_limit_z": 65535,
        "registers_per_core_limit": 65536,
        "registers_per_block_limit": 65536,
        "memory_bandwidth": int(chip.bandwidth),
        "device_memory_size": chip.memory_bytes,
    }
    lines = [f"  {key}: {value}" for key, value in numbers.items()]
    features = "ACCELERATED_FEATURES" if major >= 9 else "NONE"
    lines.append(
        f"  cuda_compute_capability {{ major: {major} minor: {minor} "
        f"feature_extension: {features} }}"
    )
    info = "\n".join(lines)
    return (
        f"gpu_device_info {{\n{info}\n}}\n"
        'platform_name: "CUDA"\n'
        "dnn_version_info { major: 9 minor: 10 }\n"
        f'device_description_str: "NVIDIA {_KINDS[major, minor]}"\n'
    )
