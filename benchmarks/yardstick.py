"""Training with kd_jax and with torchtune's distillation recipe: tokens per second and memory.

python benchmarks/yardstick.py OUT --yardstick DIR [--rounds 2] [--dtype bfloat16] [--arms ...]

DIR contains run_torchtune.sh; its README describes the run: 8 steps of 4 rows of GSM8K, LoRA rank
64, a Llama 3 vocabulary. Rounds alternate between the arms: torchtune, distillation (kd_jax) and
fine-tuning without a teacher (kd_jax_sft). Prints median target tokens per second, without the
first two steps, which compile, and the peak resident memory of the process. OUT receives the
models, the logs and yardstick.json.
"""

import argparse
import json
import platform
import re
import statistics
import subprocess
import sys
from pathlib import Path

import jax

ROOT = Path(__file__).parents[1]
STEPS = 8
CONFIG = """
from kd_jax.config import *

def get_config():
    return Config(
        workdir="unset",
        teacher=TeacherConfig(path="{models}/teacher", dtype="{dtype}"),
        student=StudentConfig(path="{models}/student", dtype="{dtype}"),
        lora=LoraConfig(target_modules=(
            "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")),
        data=DataConfig(path="{data}", seq_len=512, batch_size=4, max_conversations=400,
                        cache_dir="{out}/rows"),
        optim=OptimConfig(warmup_steps=10, clip_norm=None),
        compilation_cache=None,
        steps={steps},
    )
"""


def run_torchtune(out: Path, yardstick: Path) -> dict[str, float]:
    command = ["bash", str(yardstick / "run_torchtune.sh"), str(out), str(STEPS)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    rates = [float(x) for x in re.findall(r"tokens_per_second_per_gpu:([\d.]+)", text)]
    peak = re.search(r"peak_memory_bytes (\d+)", text)
    assert peak is not None and len(rates) == STEPS
    return {"rate": statistics.median(rates[2:]), "peak": int(peak[1])}


def run_ours(
    out: Path, yardstick: Path, dtype: str, number: int, kd_ratio: float
) -> dict[str, float]:
    data = (yardstick.parent / "data" / "gsm8k_alpaca.json").resolve()
    config = out / f"kd_jax_{dtype}.py"
    config.write_text(
        CONFIG.format(models=out / "models", data=data, out=out, steps=STEPS, dtype=dtype)
    )
    workdir = out / f"kd_jax_{dtype}_{kd_ratio}_{number}"
    command = [sys.executable, "-m", "kd_jax.train", "--config", config, "--workdir", workdir]
    command += ["--loss.kd-ratio", str(kd_ratio)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    rates = [line["target_tokens_per_second"] for line in lines]
    return {"rate": statistics.median(rates[2:]), "peak": lines[-1]["peak_memory_bytes"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="new folder for models, logs and results")
    parser.add_argument("--yardstick", type=Path, required=True, help="folder of run_torchtune.sh")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    arms = ("torchtune", "kd_jax", "kd_jax_sft")
    parser.add_argument("--arms", nargs="+", choices=arms, default=arms, help="arms to run")
    args = parser.parse_args()
    out, yardstick = args.out.resolve(), args.yardstick.resolve()
    run = {
        "torchtune": lambda number: run_torchtune(out, yardstick),
        "kd_jax": lambda number: run_ours(out, yardstick, args.dtype, number, kd_ratio=0.5),
        "kd_jax_sft": lambda number: run_ours(out, yardstick, args.dtype, number, kd_ratio=0.0),
    }
    runs: dict[str, list[dict[str, float]]] = {arm: [] for arm in args.arms}
    for number in range(args.rounds):
        for arm in args.arms:
            runs[arm].append(run[arm](number))
    rates = {name: statistics.median(run["rate"] for run in some) for name, some in runs.items()}
    peaks = {name: max(run["peak"] for run in some) for name, some in runs.items()}
    print(f"{platform.processor() or platform.machine()}, jax {jax.__version__}, {args.dtype}")
    for name, some in runs.items():
        each = ", ".join(f"{run['rate']:.1f}" for run in some)
        print(f"{name:12}{rates[name]:8.1f} target tokens/s ({each}), {peaks[name] / 1e9:.2f} GB")
    first, *others = args.arms
    for arm in others:
        speed, memory = (x[arm] / x[first] for x in (rates, peaks))
        print(f"{arm}: {speed:.2f} times the speed of {first} in {memory:.0%} of its memory")
    (out / "yardstick.json").write_text(json.dumps({"runs": runs, "rates": rates, "peaks": peaks}))


if __name__ == "__main__":
    main()
