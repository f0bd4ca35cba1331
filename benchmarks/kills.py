"""Kills tiny runs by SIGKILL at random instants, and compares them with one that was left alone.

python -m benchmarks.kills [--kills 50] [--seed 0] [--steps 400] [--on-policy]

With --on-policy, half of the rows are samples, drawn every third step. A third of the kills falls
anywhere in a start, a third between two steps, a third into a save. Every line of metrics.jsonl
must be the same but for its times, all of samples.jsonl, and every bit of the last weights.
Starts are forks of a process that has imported the modules, which saves most of their time.
"""

import argparse
import json
import multiprocessing
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

os.environ |= {
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}

import numpy as np

from kd_jax.config.command import exit_now, run_command
from kd_jax.toy import grammar
from kd_jax.toy.models import make_tokenizer, write_llama

SHAPE = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
CONFIG = """
from kd_jax.config import *

def get_config():
    return Config(
        workdir="unset", teacher=TeacherConfig(path="{root}/teacher", dtype="float32"),
        student=StudentConfig(path="{root}/student", dtype="float32"), trainable="full",
        data=DataConfig(path="{root}/data.jsonl", seq_len=64, batch_size=2,
                        cache_dir="{root}/rows"),
        eval=EvalConfig(path="{root}/held_out.jsonl", every_steps=10), steps={steps},
        checkpoint=CheckpointConfig(every_steps=7), log=LogConfig(tensorboard=False),
        optim=OptimConfig(warmup_steps=5), compilation_cache="{root}/xla")
"""
ON_POLICY = (
    "--on-policy.fraction", "0.5", "--on-policy.max-new-tokens", "16",
    "--on-policy.every-steps", "3", "--on-policy.log-samples", "1",
)  # fmt: skip
KINDS = ("start", "step", "save")
CLOCKS = ("_seconds", "_per_second", "_bytes")


def make_inputs(root: Path, steps: int) -> None:
    tokenizer = make_tokenizer([(q.instruction, a) for q, a in grammar.draw(300, "words")], 300)
    write_llama(root / "student", tokenizer, 1, hidden_size=16, intermediate_size=32, **SHAPE)
    write_llama(root / "teacher", tokenizer, 2, hidden_size=32, intermediate_size=48, **SHAPE)
    (root / "data.jsonl").write_text(grammar.to_lines(grammar.draw(60, "train")))
    (root / "held_out.jsonl").write_text(grammar.to_lines(grammar.draw(10, "held out")))
    (root / "config.py").write_text(CONFIG.format(root=root, steps=steps))


def run(root: str, name: str, flags: Sequence[str]) -> None:
    """Trains in ROOT/NAME as the command does; its output goes to a file."""
    from kd_jax.train import main

    log = os.open(f"{root}/{name}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(log, stream)
    argv = ["--config", f"{root}/config.py", "--workdir", f"{root}/{name}", *flags]
    exit_now(run_command(main, argv))


def start(context: Any, root: Path, name: str, flags: Sequence[str]) -> Any:
    process = context.Process(target=run, args=(str(root), name, flags))
    process.start()
    return process


def last_step(workdir: Path) -> int:
    """Returns the last step in metrics.jsonl, 0 if there is none."""
    try:
        with (workdir / "metrics.jsonl").open("rb") as stream:
            stream.seek(-min(4096, stream.seek(0, os.SEEK_END)), os.SEEK_END)
            return json.loads(stream.read().split(b"\n")[-2])["step"]
    except (OSError, ValueError, IndexError):
        return 0


def is_saving(workdir: Path) -> bool:
    try:
        return any("tmp" in name for name in os.listdir(workdir / "checkpoints"))
    except FileNotFoundError:
        return False


def wait(process: Any, happened: Callable[[], bool]) -> None:
    while process.exitcode is None and not happened():
        time.sleep(0.0005)


def kill_at_random(
    begin: Callable[[str], Any],
    root: Path,
    kills: int,
    steps: int,
    start_seconds: float,
    rng: random.Random,
) -> tuple[Counter[str], list[str]]:
    """Starts and kills runs, the next one when one is done.

    Args:
      begin: starts the run of a name.

    Returns:
      the number of kills by kind, and the runs' names, of which the last is unfinished.
    """
    done, names = Counter[str](), ["killed0"]
    while done.total() < kills:
        workdir, kind = root / names[-1], rng.choice(KINDS)
        goal = last_step(workdir) + rng.randint(1, max(2, steps // kills))
        process = begin(names[-1])
        if kind == "start":
            process.join(rng.random() * start_seconds)
        else:
            wait(process, lambda goal=goal, workdir=workdir: last_step(workdir) >= goal)
            if kind == "save":
                wait(process, lambda workdir=workdir: is_saving(workdir))
            process.join(rng.random() * 0.02)
        process.kill()
        process.join()
        if process.exitcode == -9:
            done[kind] += 1
        else:
            finish(process, root, names[-1])
            names.append(f"killed{len(names)}")
    return done, names


def finish(process: Any, root: Path, name: str) -> None:
    """Waits for the end of a run that is not killed; raises SystemExit if it fails."""
    process.join()
    if process.exitcode != 0:
        raise SystemExit(f"status {process.exitcode}: {(root / f'{name}.log').read_text()[-2000:]}")


def trace(workdir: Path) -> list[dict[str, Any]]:
    """Returns the lines of metrics.jsonl without what depends on time and machine."""
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in line.items() if not k.endswith(CLOCKS)} for line in lines]


def samples(workdir: Path) -> str:
    """Returns samples.jsonl, "" without it."""
    file = workdir / "samples.jsonl"
    return file.read_text() if file.is_file() else ""


def differences(one: Path, other: Path) -> list[str]:
    """Returns the steps whose lines differ, and the last checkpoint's arrays that do."""
    from kd_jax.workdir.checkpoints import open_trained

    first, second = trace(one), trace(other)
    found = [f"step {x['step']}" for x, y in zip(first, second, strict=False) if x != y]
    if len(first) != len(second):
        found.append(f"{len(first)} and {len(second)} lines")
    found += ["samples.jsonl"] if samples(one) != samples(other) else []
    ours, theirs = open_trained(one), open_trained(other)
    return found + [
        name for name in theirs.shapes if not np.array_equal(ours.read(name), theirs.read(name))
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--on-policy", action="store_true")
    args = parser.parse_args()
    context = multiprocessing.get_context("forkserver")
    tokenizers = "transformers.tokenization_utils_tokenizers"
    context.set_forkserver_preload(["kd_jax.training.loop", "kd_jax.train", tokenizers])
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        begin = partial(start, context, root, flags=ON_POLICY if args.on_policy else ())
        make_inputs(root, args.steps)
        began = time.monotonic()
        process = begin("undisturbed")
        wait(process, lambda: last_step(root / "undisturbed") > 0)
        start_seconds = (time.monotonic() - began) / 2  # later starts find compiled programs
        finish(process, root, "undisturbed")
        rng = random.Random(args.seed)
        done, names = kill_at_random(begin, root, args.kills, args.steps, start_seconds, rng)
        finish(begin(names[-1]), root, names[-1])
        wrong = [x for name in names for x in differences(root / name, root / "undisturbed")]
        lines = trace(root / "undisturbed")
        drawn = samples(root / "undisturbed").count("\n")
    kinds = ", ".join(f"{done[kind]} in a {kind}" for kind in KINDS)
    evaluations = sum("loss" not in line for line in lines)
    verdict = f"differ: {', '.join(wrong[:5])}" if wrong else "bit-equal"
    print(
        f"{done.total()} SIGKILLs ({kinds}) of {len(names)} runs: losses of "
        f"{len(lines) - evaluations} steps, {evaluations} evaluations"
        f"{f', {drawn} samples' if args.on_policy else ''} and the last weights {verdict}"
    )
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
