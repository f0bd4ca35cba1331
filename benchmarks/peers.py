"""Training with kd_jax beside its peers: tokens per second, memory and seconds to the first step.

python -m benchmarks.peers TEACHER STUDENT DATA OUT [--rounds 3] [any flag of kd_jax.train]

Arms: kd_jax, `python -m kd_jax.train` with its defaults; kd_jax-float32 and kd_jax-bfloat16, with
this dtype; torch-float32 and torch-bfloat16, the
careful loop of benchmarks/torch_loop.py; and, with the Python of an environment in which TRL is
installed (--trl), trl-float32 and trl-bfloat16, TRL's GKD trainer off-policy
(benchmarks/trl_loop.py). All train the same rows, but TRL as many conversations as these have, for
all weights and for LoRA, each in a process of its own; rounds alternate between the arms. All but
TRL must have the same loss on the first step.

Prints medians over rounds of target tokens a second by the clock and by CPU time (without the
first two steps, which compile), the peak resident memory, and the seconds from the start of the
process to the end of its first step; the first round's start is cold. OUT receives logs and
peers.json. Needs Linux.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
KINDS = {"full": "all weights", "lora": "LoRA"}
WARM_UP = 2  # steps
LIMITS = {"float32": 1e-5, "bfloat16": 1e-2}
"""Largest relative difference of two arms' losses on the first step: float32 both, or not. torch
rounds bfloat16 logits, kd_jax does not."""
CONFIG = """
from kd_jax.config import *

def get_config():
    return Config(
        workdir="unset",
        teacher=TeacherConfig(path={teacher!r}),
        student=StudentConfig(path={student!r}),
        lora=LoraConfig(rank=16, alpha=32.0),
        data=DataConfig(path={data!r}, split="train", seq_len=512, batch_size=4,
                        cache_dir={cache!r}),
        compilation_cache={programs!r},
        steps={steps},
    )
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """Medians of one process."""

    rate: float
    """Target tokens a second."""
    cpu_rate: float
    """Target tokens a second of CPU time."""
    peak_bytes: int
    first_seconds: float
    """From the start of the process to the end of the first step."""
    first_loss: float | None


def main(argv: Sequence[str]) -> None:
    args, flags = parse(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    folders = {"cache": str(args.out / "rows"), "programs": str(args.out / "programs")}
    paths = {name: str(getattr(args, name).resolve()) for name in ("teacher", "student", "data")}
    (args.out / "config.py").write_text(CONFIG.format(**paths, **folders, steps=args.steps))
    jobs = write_jobs(args, flags)
    runs: dict[str, list[Run]] = {f"{kind} {arm}": [] for kind in args.kinds for arm in args.arms}
    for number in range(args.rounds):
        for name, some in runs.items():
            some.append(run_arm(args, flags, jobs, *name.split(), number))
            print(f"round {number + 1}, {name}: {describe(some[-1])}", flush=True)
    check_losses(runs)
    print(f"\n{table(args, runs)}")
    found = {name: [asdict(run) for run in some] for name, some in runs.items()}
    (args.out / "peers.json").write_text(json.dumps(found))


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Returns the benchmark's own arguments, and the flags for kd_jax.train."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    for name in ("teacher", "student", "data", "out"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--train-steps", dest="steps", type=int, default=6, help="of each process")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    dtyped = [f"{peer}-{dtype}" for peer in ("kd_jax", "torch", "trl") for dtype in LIMITS]
    default = ["kd_jax", "torch-float32", "torch-bfloat16"]
    parser.add_argument("--arms", nargs="+", choices=["kd_jax", *dtyped], default=default)
    parser.add_argument("--trl", type=Path, help="Python of an environment with TRL")
    parser.add_argument("--cores", type=int, nargs="+", help="cores of all processes; all if none")
    parser.add_argument("--torch-compile", action="store_true")
    parser.add_argument("--torch-attention", choices=["documents", "mask"], default="documents")
    parser.add_argument("--torch-chunk", type=int, default=128, help="tokens in a chunk of logits")
    return parser.parse_known_args(argv)


def write_jobs(args: argparse.Namespace, flags: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Writes the rows of all steps to OUT/batches.npz; returns the torch loop's job by kind."""
    import numpy as np

    from kd_jax.config.command import parse_config
    from kd_jax.config.record import dump
    from kd_jax.data.batches import train_batches
    from kd_jax.setup.forward import targets
    from kd_jax.setup.inputs import load_rows
    from kd_jax.setup.model_files import open_model_files

    config = parse_config(["--config", str(args.out / "config.py"), *flags])
    assert config.teacher is not None and config.optim.accumulation_steps == 1
    rows, _ = load_rows(config, open_model_files(config.student.path, None, "student").tokenizer)
    size = config.data.batch_size
    endless = train_batches(
        rows, seed=config.seed, start_step=0, batch_size=size, accumulation_steps=1
    )
    some = [next(endless) for _ in range(args.steps)]
    arrays = {name: np.stack([batch[name][0] for batch in some]) for name in some[0]}
    arrays["targets"] = np.stack([np.asarray(targets(batch)[1])[0] for batch in some])
    rows_so_far = np.arange(args.steps * size).reshape(args.steps, size, 1)
    numbers = rows_so_far * config.data.seq_len + arrays["segment_ids"]  # of documents
    np.savez(args.out / "batches.npz", **arrays)
    fields = dump(config)
    job = {
        "teacher": config.teacher.path,
        "student": config.student.path,
        "batches": str(args.out / "batches.npz"),
        "lora": fields["lora"],
        "optim": fields["optim"],
        "kd_ratio": config.loss.kd_ratio,
        "chunk": args.torch_chunk,
        "attention": "mask" if args.torch_compile else args.torch_attention,
        "compile": args.torch_compile,
        "threads": len(args.cores or os.sched_getaffinity(0)),
        "data": config.data.path,
        "seq_len": config.data.seq_len,
        "conversations": round(len(np.unique(numbers[arrays["segment_ids"] > 0])) / args.steps),
        "steps": args.steps,
    }
    return {kind: job | {"trainable": kind} for kind in args.kinds}


def run_arm(
    args: argparse.Namespace,
    flags: Sequence[str],
    jobs: dict[str, dict[str, Any]],
    kind: str,
    arm: str,
    number: int,
) -> Run:
    folder = args.out / f"{kind}-{arm}-{number}"
    if arm.startswith("kd_jax"):
        words = ["--config", str(args.out / "config.py"), *flags]
        if dtype := arm.partition("-")[2]:
            words += ["--teacher.dtype", dtype, "--student.dtype", dtype]
        words += ["--trainable", kind, "--workdir", str(folder / "run")]
        command = [sys.executable, "-m", "kd_jax.train", *words]
        return watch(args, command, folder, folder / "run" / "metrics.jsonl")
    folder.mkdir(parents=True)
    loop, _, dtype = arm.partition("-")
    python = args.trl if loop == "trl" else sys.executable
    job = jobs[kind] | {
        "dtype": dtype,
        "metrics": str(folder / "metrics.jsonl"),
    }
    (folder / "job.json").write_text(json.dumps(job))
    command = [str(python), str(ROOT / "benchmarks" / f"{loop}_loop.py"), str(folder / "job.json")]
    return watch(args, command, folder, folder / "metrics.jsonl")


def watch(args: argparse.Namespace, command: Sequence[str], folder: Path, metrics: Path) -> Run:
    """Runs a command; its steps are the lines that it writes to `metrics`."""
    folder.mkdir(parents=True, exist_ok=True)
    marks, peak, start = list[tuple[float, float]](), 0, time.perf_counter()
    with open(folder / "log.txt", "w") as log:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=log,
            stderr=log,
            preexec_fn=lambda: args.cores and os.sched_setaffinity(0, args.cores),
        )
        while process.poll() is None:
            seconds, resident = usage(process.pid)
            lines = metrics.read_bytes().count(b"\n") if metrics.exists() else 0
            peak = max(peak, resident)
            marks += [(time.perf_counter() - start, seconds)] * (lines - len(marks))
            time.sleep(0.02)
    if process.returncode or len(marks) <= WARM_UP + 1:
        raise SystemExit(f"{' '.join(command)}: failed; {folder / 'log.txt'} has its output")
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    rates, cpu_rates = [], []
    for i in range(WARM_UP, len(marks)):
        wall, cpu = (marks[i][j] - marks[i - 1][j] for j in (0, 1))
        rates.append(lines[i]["target_tokens"] / wall)
        cpu_rates.append(lines[i]["target_tokens"] / cpu)
    return Run(
        rate=statistics.median(rates),
        cpu_rate=statistics.median(cpu_rates),
        peak_bytes=peak,
        first_seconds=marks[0][0],
        first_loss=lines[0]["loss"],
    )


def usage(pid: int) -> tuple[float, int]:
    """Returns a process's CPU seconds and peak resident bytes so far; zeros once it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0.0, 0
    ticks = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    found = [line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")]
    return ticks, int(found[0]) * 1024 if found else 0


def check_losses(runs: dict[str, list[Run]]) -> None:
    """Raises SystemExit if two arms have different losses on the first step."""
    for kind in KINDS:
        first = {
            name.partition(" ")[2]: some[0].first_loss or 0.0
            for name, some in runs.items()
            if name.startswith(kind) and " trl-" not in name
        }
        for one, other in itertools.combinations(first, 2):
            both = one.endswith("float32") and other.endswith("float32")
            gap = abs(first[one] / first[other] - 1)
            print(
                f"{kind}, first loss: {one} {first[one]:.6f}, {other} {first[other]:.6f}: {gap:.1e}"
            )
            if gap > LIMITS["float32" if both else "bfloat16"]:
                raise SystemExit("these arms compute different losses")


def table(args: argparse.Namespace, runs: dict[str, list[Run]]) -> str:
    lines = [
        "| | target tokens/s | of CPU time | peak memory | first step, cold | warm |",
        "|---|---|---|---|---|---|",
    ]
    for name, some in runs.items():
        rate, cpu_rate = (
            statistics.median(getattr(x, n) for x in some) for n in ("rate", "cpu_rate")
        )
        each = ", ".join(f"{run.rate:.1f}" for run in some)
        peak = max(run.peak_bytes for run in some) / 1e9
        cold, *warm = (run.first_seconds for run in some)
        later = f"{statistics.median(warm):.1f} s" if warm else ""
        lines.append(
            f"| {name} | {rate:.1f} ({each}) | {cpu_rate:.1f} | {peak:.2f} GB | {cold:.1f} s "
            f"| {later} |"
        )
    for kind in args.kinds:
        others = [some for name, some in runs.items() if name.startswith(f"{kind} torch")]
        ours = runs.get(f"{kind} kd_jax")
        if not others or not ours:
            continue
        median = lambda some: statistics.median(run.rate for run in some)  # noqa: E731
        best = max(others, key=median)
        share = max(x.peak_bytes for x in ours) / max(x.peak_bytes for x in best)
        lines += [
            "",
            f"{KINDS[kind]}: kd_jax {median(ours) / median(best):.2f} times torch's best, "
            f"{share:.0%} of its memory",
        ]
    return "\n".join(lines)


def describe(run: Run) -> str:
    return (
        f"{run.rate:.1f} target tokens/s, {run.cpu_rate:.1f} of CPU time, "
        f"{run.peak_bytes / 1e9:.2f} GB, first step after {run.first_seconds:.1f} s"
    )


if __name__ == "__main__":
    main(sys.argv[1:])
