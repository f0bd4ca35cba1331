"""What is known of accelerators, and their topologies by name. Data; needs no jax."""

import difflib
import math
import re
from dataclasses import dataclass, field
from typing import Literal

from kd_jax.config import UserError

GIB = 2**30


# Of a GPU's memory, what jax takes: the commands say so, unless the environment does.
GPU_MEMORY_SHARE = 0.92


@dataclass(frozen=True, kw_only=True, slots=True)
class Chip:
    """One device: a GPU, or a TPU chip, whose cores run as one."""

    platform: Literal["gpu", "tpu"]
    flops: float
    """Dense bfloat16 FLOP/s."""
    memory_bytes: int
    """That a program can have, as XLA counts it."""
    bandwidth: float
    """Bytes/s of its memory."""
    link_bandwidth: float
    """Bytes/s that it sends to devices of its host (GPU) or slice (TPU), in one direction."""
    network_bandwidth: float
    """Bytes/s that it sends to other hosts (GPU) or slices (TPU)."""
    device_kind: str
    """A part of the name that jax gives it."""
    target: dict[str, float] = field(default_factory=dict)
    """Of a GPU, for XLA's description of it."""


_HOPPER = {
    "core_count": 132,
    "fpus_per_core": 128,
    "shared_memory_per_core": 233472,
    "shared_memory_per_block_optin": 232448,
    "l2_cache_size": 52428800,
    "clock_rate_ghz": 1.98,
    "major": 9,
}


# FLOP/s and bandwidths: NVIDIA's data sheets of the A100 80GB SXM, H100 SXM, H200 and B200 (NVLink
# in one direction; one 400 Gb/s network adapter for each GPU, 200 for an A100) and Google Cloud's
# pages of TPU v4, v5e, v5p and v6e (links in one direction). Memory: what the drivers report, and
# for TPUs what XLA's message says where a program is too large.
CHIPS = {
    "a100": Chip(
        platform="gpu",
        flops=312e12,
        memory_bytes=85_100_068_864,
        bandwidth=2.039e12,
        link_bandwidth=300e9,
        network_bandwidth=25e9,
        device_kind="A100",
        target={
            **_HOPPER,
            "core_count": 108,
            "fpus_per_core": 64,
            "shared_memory_per_core": 167936,
            "shared_memory_per_block_optin": 166912,
            "l2_cache_size": 41943040,
            "clock_rate_ghz": 1.41,
            "major": 8,
        },
    ),
    "h100": Chip(
        platform="gpu",
        flops=989e12,
        memory_bytes=84_942_979_072,
        bandwidth=3.352e12,
        link_bandwidth=450e9,
        network_bandwidth=50e9,
        device_kind="H100",
        target=_HOPPER,
    ),
    "h200": Chip(
        platform="gpu",
        flops=989e12,
        memory_bytes=151_397_597_184,
        bandwidth=4.8e12,
        link_bandwidth=450e9,
        network_bandwidth=50e9,
        device_kind="H200",
        target=_HOPPER,
    ),
    "b200": Chip(
        platform="gpu",
        flops=2250e12,
        memory_bytes=191_514_411_008,
        bandwidth=7.672e12,
        link_bandwidth=900e9,
        network_bandwidth=50e9,
        device_kind="B200",
        target={
            **_HOPPER,
            "core_count": 148,
            "l2_cache_size": 132644864,
            "clock_rate_ghz": 1.965,
            "major": 10,
        },
    ),
    "v4": Chip(
        platform="tpu",
        flops=275e12,
        memory_bytes=int(30.75 * GIB),
        bandwidth=1.2e12,
        link_bandwidth=150e9,
        network_bandwidth=6.25e9,
        device_kind="TPU v4",
    ),
    "v5e": Chip(
        platform="tpu",
        flops=197e12,
        memory_bytes=int(15.75 * GIB),
        bandwidth=8.19e11,
        link_bandwidth=100e9,
        network_bandwidth=6.25e9,
        device_kind="TPU v5 lite",
    ),
    "v5p": Chip(
        platform="tpu",
        flops=459e12,
        memory_bytes=int(95.74 * GIB),
        bandwidth=2.765e12,
        link_bandwidth=300e9,
        network_bandwidth=6.25e9,
        device_kind="TPU v5",
    ),
    "v6e": Chip(
        platform="tpu",
        flops=918e12,
        memory_bytes=int(31.25 * GIB),
        bandwidth=1.64e12,
        link_bandwidth=224e9,
        network_bandwidth=12.5e9,
        device_kind="TPU v6 lite",
    ),
}


# Shapes of slices that Google Cloud has, in chips, and how a name such as v5p-16 counts them.
_SQUARES = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")


_CUBES = (
    "2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16",
)  # fmt: skip


SLICES = {"v4": _CUBES, "v5e": _SQUARES, "v5p": _CUBES, "v6e": _SQUARES}


_CORES_PER_CHIP = {"v4": 2, "v5e": 1, "v5p": 2, "v6e": 1}


def chip_of(device_kind: str) -> Chip | None:
    """Returns what is known of a device by the name that jax gives it; None for nothing."""
    names = sorted(CHIPS.values(), key=lambda chip: -len(chip.device_kind))
    kind = device_kind.lower()
    return next((chip for chip in names if chip.device_kind.lower() in kind), None)


@dataclass(frozen=True, slots=True)
class Topology:
    """Devices by name: of a chip, of this machine's processor, or those that jax finds."""

    name: str
    shape: tuple[int, ...] = ()
    """Of a GPU: partitions, hosts in each, devices in each; of a TPU: chips along the torus."""
    chip: Chip | None = None
    """None for `cpu:N` and `local`."""

    @property
    def num_devices(self) -> int:
        """0 for `local`."""
        return math.prod(self.shape) if self.shape else 0

    @property
    def num_hosts(self) -> int:
        if self.chip is None or self.chip.platform == "tpu":
            return 1  # a TPU's links join all hosts of a slice
        return math.prod(self.shape[:-1])


def find_topology(name: str) -> Topology:
    """Returns the topology of a name such as `v5e:2x4`, `v5p-16`, `h200:1x1x8`, `cpu:8`, `local`.

    Raises:
      UserError: it does not exist; the known ones are listed.
    """
    name = name.lower()
    if name == "local":
        return Topology(name)
    kind, shape = _split(name)
    if kind == "cpu" and len(shape) == 1:
        return Topology(name, shape)
    chip = CHIPS.get(kind)
    if chip is not None and shape:
        if chip.platform == "gpu" and len(shape) <= 3:
            shape = (1,) * (3 - len(shape)) + shape
            return Topology(f"{kind}:{'x'.join(map(str, shape))}", shape, chip)
        if "x".join(map(str, shape)) in SLICES.get(kind, ()):
            return Topology(f"{kind}:{'x'.join(map(str, shape))}", shape, chip)
    near = difflib.get_close_matches(kind, CHIPS, 1)
    hint = f" Did you mean {near[0]}?" if near and chip is None else ""
    raise UserError(
        f"--topology: expected one of the topologies below, got {name}.{hint}\n{known()}"
    )


def _split(name: str) -> tuple[str, tuple[int, ...]]:
    """Returns a name's chip and shape; () for a shape that is none."""
    if found := re.fullmatch(r"(\w+):([1-9]\d*(?:x[1-9]\d*)*)", name):
        return found[1], tuple(map(int, found[2].split("x")))
    if found := re.fullmatch(r"(v\d+[a-z]*)-(\d+)", name.replace("litepod", "e")):
        chips, rest = divmod(int(found[2]), _CORES_PER_CHIP.get(found[1], 1))
        for shape in SLICES.get(found[1], ()):
            sizes = tuple(map(int, shape.split("x")))
            if math.prod(sizes) == chips and not rest:
                return found[1], sizes
    return name.split(":")[0].split("-")[0], ()


def known() -> str:
    """Returns the names of all topologies, for people."""
    gpus = ", ".join(name for name, chip in CHIPS.items() if chip.platform == "gpu")
    lines = [
        f"  {gpus}, then :HOSTSxDEVICES, such as h200:1x8 for one host of eight",
        *(
            f"  {name}, then :SHAPE of {', '.join(shapes)}, or -N such as {name}-"
            f"{math.prod(map(int, shapes[1].split('x'))) * _CORES_PER_CHIP[name]}"
            for name, shapes in SLICES.items()
        ),
        "  cpu:N for N devices of a processor; local for the devices that are here",
    ]
    return "\n".join(lines)


def xla_target(name: str, chip: Chip) -> str:
    """Returns XLA's description of a GPU that is not here, a GpuTargetConfigProto as text."""
    numbers = {
        "threads_per_block_limit": 1024,
        "threads_per_warp": 32,
        "threads_per_core_limit": 2048,
        "shared_memory_per_block": 49152,
        "block_dim_limit_x": 2**31 - 1,
        "block_dim_limit_y": 65535,
        "block_dim_limit_z": 65535,
        "registers_per_core_limit": 65536,
        "registers_per_block_limit": 65536,
        "memory_bandwidth": int(chip.bandwidth),
        "device_memory_size": chip.memory_bytes,
        **{key: value for key, value in chip.target.items() if key != "major"},
    }
    major = int(chip.target["major"])
    features = "ACCELERATED_FEATURES" if major >= 9 else "NONE"
    lines = [f"  {key}: {value}" for key, value in numbers.items()]
    lines.append(f"  cuda_compute_capability {{ major: {major} feature_extension: {features} }}")
    info = "\n".join(lines)
    return (
        f"gpu_device_info {{\n{info}\n}}\n"
        'platform_name: "CUDA"\n'
        "dnn_version_info { major: 9 minor: 10 }\n"
        f'device_description_str: "{name}"\n'
    )
