"""python benchmarks/load.py FOLDER: time and memory of loading a model in Hugging Face form.

Compares with reading the same warm files into a reused buffer, the two in turn, median of three.
JAX_PLATFORMS=cpu measures one CPU device.
"""

import resource
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import jax

from kd_jax.command import run_command
from kd_jax.config import MeshConfig, UserError
from kd_jax.disk import resolve
from kd_jax.hf import load_architecture, load_arrays
from kd_jax.sharding import make_mesh

ROUNDS = 3


def load_seconds(folder: Path, mesh: jax.sharding.Mesh) -> tuple[float, int]:
    """Returns how long a bfloat16 load takes, and the bytes of its arrays."""
    start = time.perf_counter()
    arrays = load_arrays(folder, load_architecture(folder), mesh, "bfloat16")
    jax.block_until_ready(arrays)
    return time.perf_counter() - start, sum(x.nbytes for x in arrays.values())


def read_seconds(folder: Path) -> float:
    """Returns how long plain Python takes to read the weight files."""
    buffer = bytearray(16 * 2**20)
    start = time.perf_counter()
    for path in sorted(folder.glob("*.safetensors")):
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return time.perf_counter() - start


def peak_resident_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def main(argv: Sequence[str]) -> None:
    if len(argv) != 1:
        raise UserError(f"FOLDER: expected one argument, got {len(argv)}")
    folder = resolve(argv[0], "FOLDER")
    mesh = make_mesh(MeshConfig(), jax.device_count())
    read_seconds(folder)  # warms the files
    _, num_bytes = load_seconds(folder, mesh)
    peak = peak_resident_bytes()  # before anything else could raise it
    rounds = [(load_seconds(folder, mesh)[0], read_seconds(folder)) for _ in range(ROUNDS)]
    load, read = (statistics.median(times) for times in zip(*rounds, strict=True))
    device = jax.devices()[0]
    print(f"devices                     {jax.device_count()} x {device.device_kind}")
    print(f"weights                     {num_bytes / 1e9:.3f} GB")
    print(f"load                        {load:.3f} s")
    print(f"read of the warm files      {read:.3f} s")
    print(f"load / read                 {load / read:.2f}")
    print(f"peak resident               {peak / 1e9:.3f} GB")
    print(f"peak resident less weights  {(peak - num_bytes) / 1e9:.3f} GB")


if __name__ == "__main__":
    sys.exit(run_command(main))
