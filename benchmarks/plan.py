"""Memory of runs on absent GPUs and TPUs: compiled, and estimated from shapes.

python benchmarks/plan.py [--only NAME ...] [--json FILE]

Each case runs `python -m kd_jax.plan` in its own process. Cases whose compiler is not installed
are skipped: pip install 'kd-jax[cuda13]' for GPUs, 'kd-jax[tpu]' for TPUs.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from kd_jax.config.command import run_command
from kd_jax.planning.chips import GIB

CONFIGS = Path(__file__).parents[1] / "configs"
FSDP_8 = ["--mesh.fsdp", "8"]
CASES = {
    "8b-1b h200": ["8b_to_1b", "h200:1x1", "--data.batch-size", "8"],
    "8b-1b h200 full": ["8b_to_1b", "h200:1x1", "--data.batch-size", "8", "--trainable", "full"],
    "8b-1b h200 attention": [
        "8b_to_1b", "h200:1x1", "--data.batch-size", "8", "--remat", "attention",
    ],
    "8b-1b h200 dots": ["8b_to_1b", "h200:1x1", "--data.batch-size", "8", "--remat", "dots"],
    "8b-1b h200 none": ["8b_to_1b", "h200:1x1", "--data.batch-size", "8", "--remat", "none"],
    "8b-1b h100": ["8b_to_1b", "h100:1x1", "--data.batch-size", "8"],
    "8b-1b a100": ["8b_to_1b", "a100:1x1", "--data.batch-size", "8"],
    "8b-1b b200": ["8b_to_1b", "b200:1x1", "--data.batch-size", "8"],
    "8b-1b 8 h200": ["8b_to_1b", "h200:1x8", "--data.batch-size", "32", *FSDP_8],
    "8b-1b 8 h200 data": ["8b_to_1b", "h200:1x8", "--data.batch-size", "32"],
    "8b-1b 8 h200 tensor": ["8b_to_1b", "h200:1x8", "--data.batch-size", "8", "--mesh.tensor", "8"],
    "70b-8b 8 h200": ["70b_to_8b", "h200:1x8", "--data.batch-size", "8", *FSDP_8],
    "70b-8b 8 h100": ["70b_to_8b", "h100:1x8", "--data.batch-size", "8", *FSDP_8],
    "8b-1b v5e 2x4": ["8b_to_1b", "v5e:2x4", "--data.batch-size", "8", *FSDP_8],
    "8b-1b v5e 2x4 chosen": ["8b_to_1b", "v5e:2x4", "--data.batch-size", "8"],
    "70b-8b v5p-16": ["70b_to_8b", "v5p-16", "--data.batch-size", "8", *FSDP_8],
    "8b-1b v6e 2x4": ["8b_to_1b", "v6e:2x4", "--data.batch-size", "16", "--mesh.fsdp", "4"],
    "8b-1b v4-8": ["8b_to_1b", "v4-8", "--data.batch-size", "8"],
}  # fmt: skip


def plan(config: str, topology: str, *flags: str) -> tuple[dict | None, float, str]:
    """Returns the command's JSON object or None, its wall time in seconds, and stderr."""
    path = str(CONFIGS / f"{config}.py")
    command = [sys.executable, "-m", "kd_jax.plan", "--config", path, "--topology", topology]
    if "--remat" not in flags:
        command += ["--remat", "layer"]
    begin = time.perf_counter()
    done = subprocess.run([*command, *flags, "--json"], capture_output=True, text=True)
    seconds = time.perf_counter() - begin
    return (json.loads(done.stdout) if done.returncode == 0 else None), seconds, done.stderr


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", default=list(CASES), help="parts of case names")
    parser.add_argument("--json", help="JSON file for all results")
    args = parser.parse_args(argv)
    results = {}
    print("| case | GiB a device | estimate | ratio | seconds, compiled | estimated |")
    print("|---|---|---|---|---|---|")
    for name, flags in CASES.items():
        if not any(part in name for part in args.only):
            continue
        report, seconds, errors = plan(*flags)
        if report is None:
            print(f"| {name} | {(errors.splitlines() or ['failed'])[-1]} | | | | |", flush=True)
            continue
        _, quick, _ = plan(*flags, "--analytic")
        peak, guess = (report[f"{x}peak_bytes_per_device"] / GIB for x in ("", "analytic_"))
        print(
            f"| {name} | {peak:.2f} | {guess:.2f} | {guess / peak:.3f} | {seconds:.1f} | "
            f"{quick:.2f} |",
            flush=True,
        )
        results[name] = report | {"flags": flags, "seconds": seconds, "analytic_seconds": quick}
    if args.json:
        Path(args.json).write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    sys.exit(run_command(main))
