"""Time and memory of loading a Hugging Face folder, in one or several processes.

python benchmarks/load.py FOLDER
python benchmarks/load.py FOLDER --write meta-llama/Llama-3.1-8B-Instruct
python benchmarks/load.py FOLDER --processes 2 --devices 8

The first command alternates loading with reading the same cached files into a reused buffer, and
prints medians of three rounds. --write creates FOLDER with a known model's shapes and random
bfloat16 weights. --processes splits --devices fake CPU devices over processes (Linux): weights are
sharded over all devices (fsdp), and each process prints the bytes that it read and held.
JAX_PLATFORMS=cpu measures one CPU device.
"""

import argparse
import json
import os
import resource
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import ml_dtypes
import numpy as np

from kd_jax.config import DistributedConfig, MeshConfig
from kd_jax.config.command import run_command
from kd_jax.models.architecture import read_architecture
from kd_jax.models.known import KNOWN_MODELS
from kd_jax.models.weight_table import abstract_weights, hf_names, weights
from kd_jax.parallel import processes as parallel_processes
from kd_jax.parallel.mesh import Layout, make_mesh
from kd_jax.weights.folder import load_architecture, resolve
from kd_jax.weights.load import load_arrays
from kd_jax.weights.safetensors import INDEX

ROUNDS = 3
SHARD_BYTES = 4 * 10**9


def load_seconds(folder: Path, layout: Layout) -> tuple[float, int]:
    """Returns the seconds of a bfloat16 load, and the bytes of its arrays in this process."""
    start = time.perf_counter()
    arch = load_architecture(folder)
    arrays = load_arrays(folder, arch, abstract_weights(weights(arch), layout, "bfloat16"))
    jax.block_until_ready(arrays)
    seconds = time.perf_counter() - start
    return seconds, sum(s.data.nbytes for x in arrays.values() for s in x.addressable_shards)


def read_seconds(folder: Path) -> float:
    """Returns the seconds of reading the weight files in plain Python."""
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


def read_bytes() -> int:
    """Returns the bytes read by this process so far, from disk or page cache."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["rchar"])


def write_model(folder: Path, model: str) -> None:
    """Writes a known model's config.json and random weights."""
    from safetensors.numpy import save_file

    config = KNOWN_MODELS[model]
    arch = read_architecture(config, model)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    rng = np.random.default_rng(0)
    noise = (0.02 * rng.normal(size=2**24)).astype(ml_dtypes.bfloat16)
    shard: dict[str, np.ndarray] = {}
    index: dict[str, str] = {}

    def flush() -> None:
        name = f"model-{len(set(index.values())):05}.safetensors"
        index.update(dict.fromkeys(shard, name))
        save_file(shard, folder / name, metadata={"format": "pt"})
        shard.clear()

    for path, weight in weights(arch).items():
        shape = weight.layer_shape
        for name in hf_names(path, arch):
            if len(shape) == 1:
                shard[name] = np.ones(shape, ml_dtypes.bfloat16)
            else:
                shard[name] = np.resize(np.roll(noise, int(rng.integers(2**24))), shape)
            if sum(x.nbytes for x in shard.values()) > SHARD_BYTES:
                flush()
    flush()
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": index}))


def measure_alone(folder: Path) -> None:
    layout = Layout(make_mesh(MeshConfig(), jax.device_count()))
    read_seconds(folder)  # fills the page cache
    _, num_bytes = load_seconds(folder, layout)
    peak = peak_resident_bytes()  # before the buffered reads
    rounds = [(load_seconds(folder, layout)[0], read_seconds(folder)) for _ in range(ROUNDS)]
    load, read = (statistics.median(times) for times in zip(*rounds, strict=True))
    device = jax.devices()[0]
    print(f"devices                     {jax.device_count()} x {device.device_kind}")
    print(f"weights                     {num_bytes / 1e9:.3f} GB")
    print(f"load                        {load:.3f} s")
    print(f"read of the warm files      {read:.3f} s")
    print(f"load / read                 {load / read:.2f}")
    print(f"peak resident               {peak / 1e9:.3f} GB")
    print(f"peak resident less weights  {(peak - num_bytes) / 1e9:.3f} GB")


def measure_together(folder: Path, num_processes: int, num_devices: int) -> None:
    """Starts the processes and prints seconds, bytes read and memory of each."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{one.getsockname()[1]}"
    flag = f" --xla_force_host_platform_device_count={num_devices // num_processes}"
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    environment["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + flag
    command = [sys.executable, __file__, str(folder), "--processes", str(num_processes)]
    command += ["--coordinator", coordinator, "--process-id"]
    processes = [
        subprocess.Popen([*command, str(i)], env=environment, stdout=subprocess.PIPE, text=True)
        for i in range(num_processes)
    ]
    outputs = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        raise RuntimeError("a process failed; its output is above")
    total = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    print(f"files                    {total / 1e9:.3f} GB")
    for i, output in enumerate(outputs):
        found = json.loads(output.splitlines()[-1])
        print(f"process {i}: load           {found['seconds']:.1f} s")
        print(f"process {i}: read           {found['read'] / total:.1%} of the files")
        print(f"process {i}: weights        {found['weights'] / 1e9:.3f} GB")
        print(f"process {i}: peak - weights {(found['peak'] - found['weights']) / 1e9:.3f} GB")


def measure_one_of_many(folder: Path, config: DistributedConfig) -> None:
    parallel_processes.start(config)
    layout = Layout(make_mesh(MeshConfig(data=1, fsdp=-1), jax.device_count()))
    before = read_bytes()
    seconds, num_bytes = load_seconds(folder, layout)
    found = {"seconds": seconds, "read": read_bytes() - before, "weights": num_bytes}
    print(json.dumps(found | {"peak": peak_resident_bytes()}), flush=True)


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", help="Hugging Face folder or hub id")
    parser.add_argument(
        "--write", metavar="MODEL", choices=sorted(KNOWN_MODELS), help="create FOLDER"
    )
    parser.add_argument("--processes", type=int, default=1, help="more than 1: load in parallel")
    parser.add_argument("--devices", type=int, default=8, help="fake CPU devices of all processes")
    parser.add_argument("--coordinator", help="address of process 0; set by --processes")
    parser.add_argument("--process-id", type=int, help="set by --processes")
    args = parser.parse_args(argv)
    if args.write:
        write_model(Path(args.folder), args.write)
        return
    folder = resolve(args.folder, "FOLDER")
    if args.process_id is not None:
        config = DistributedConfig(
            coordinator=args.coordinator,
            num_processes=args.processes,
            process_id=args.process_id,
        )
        measure_one_of_many(folder, config)
    elif args.processes > 1:
        measure_together(folder, args.processes, args.devices)
    else:
        measure_alone(folder)


if __name__ == "__main__":
    sys.exit(run_command(main))
