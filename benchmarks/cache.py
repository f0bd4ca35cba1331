"""Training from a teacher's cache compared with the live teacher, and the writing of the cache.

python benchmarks/cache.py --out OUT --config FILE [--rounds 2] [--steps 8] [flags of kd_jax.train]

OUT/cache receives the cache. Prints the rate of writing it beside that of the forward pass alone,
and for each arm, in rounds by turns and in a process each: median target tokens per second without
the first two steps, the share of a step spent waiting for its batch, and peak memory. On a CPU that
others use too, the ratio by the process's CPU seconds is the steadier one. Losses and
gradient norms of the two arms must be equal bit for bit.
"""

import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import jax

from kd_jax.config import Config
from kd_jax.config.command import parse_args, parse_config, run_command
from kd_jax.config.flags import split_flags
from kd_jax.data.batches import count_steps, eval_batches
from kd_jax.inference.cached import make_cache, open_cached, open_data, with_live_teacher
from kd_jax.inference.teacher_pass import TeacherPass
from kd_jax.setup.cached import find_all
from kd_jax.setup.inputs import choose, open_inputs, open_rows, row_source
from kd_jax.setup.models import load_models
from kd_jax.setup.program import make_program
from kd_jax.setup.runtime import start_jax
from kd_jax.teachers.manifest import new_cache
from kd_jax.teachers.stored import hidden_fields
from kd_jax.teachers.writing import PartWriter
from kd_jax.training.step import init_state, jit_train_step
from kd_jax.workdir.metrics import peak_memory_bytes

WARM = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Args:
    out: str
    """Folder for the cache."""
    rounds: int = 2
    """Runs of each arm."""
    steps: int = 8
    """Optimizer steps of a run."""
    arm: Literal["all", "write", "live", "cached"] = "all"
    """Run one part in this process, and print its results as JSON."""


def main(argv: Sequence[str]) -> None:
    own, flags = split_flags(Args, Config, argv)
    args = parse_args(Args, own, __doc__)
    if args.arm == "all":
        compare(args, argv)
        return
    config = parse_config(flags)
    start_jax(None)
    out = write(args, config) if args.arm == "write" else train(args, config)
    print(json.dumps(out))


def write(args: Args, config: Config) -> dict[str, float]:
    """Returns target tokens per second of the forward pass alone, and with writing."""
    config = with_live_teacher(config)
    data = open_data(config)
    assert config.teacher is not None
    rows, _ = data.rows
    fields = hidden_fields(data.teacher.arch.hidden_size, config.teacher.dtype)
    shutil.rmtree(f"{args.out}/timed", ignore_errors=True)
    cache = new_cache(f"{args.out}/timed", "hidden", fields, data.identity)
    run = TeacherPass(config, cache, data.teacher, data.mesh, find_all(cache, rows, None))

    def forward() -> float:
        start = time.perf_counter()
        for first in range(0, len(rows), run.batch_rows):
            numbers = run.work[0].numbers[first : first + run.batch_rows]
            (batch,) = eval_batches(rows, run.batch_rows, numbers)
            out = jax.block_until_ready(run.forward(batch))
        del out
        return time.perf_counter() - start

    forward()
    alone = forward()
    folder = Path(args.out) / "cache"
    shutil.rmtree(folder, ignore_errors=True)
    start = time.perf_counter()
    make_cache(config, str(folder))
    total = time.perf_counter() - start
    tokens, start = int(run.counts.sum()), time.perf_counter()
    writer = PartWriter(cache, run.keys, run.counts)
    for values in run.values():
        writer.append(values)
    writer.flush()
    return {
        "forward_tokens_per_second": tokens / alone,
        "writing_tokens_per_second": tokens / (time.perf_counter() - start),
        "command_tokens_per_second": tokens / total,
        "tokens": tokens,
        "bytes": sum(x.stat().st_size for x in folder.rglob("*") if x.is_file()),
    }


def train(args: Args, config: Config) -> dict[str, Any]:
    """Returns the rate, the share of waiting, the peak memory and the trace of one run."""
    if args.arm == "cached":
        assert config.teacher is not None
        config = replace(config, teacher=replace(config.teacher, cache=f"{args.out}/cache"))
    student, teacher, mesh = open_inputs(config)
    assert teacher is not None
    config = choose(config, student.arch, teacher.arch, mesh)
    rows = open_rows(config, student, teacher)
    read_teacher = None
    if config.reads_cache:
        own = (teacher.hashes, rows.template, (rows.train, None))
        read_teacher = open_cached(config, teacher, mesh, *own).train
    models = load_models(config, student, teacher, mesh)
    num_steps = count_steps(rows.train, config)
    program = make_program(config, models, rows.vocab_size, mesh, num_steps)
    state = init_state(program, models.trainable)
    frozen = (models.frozen, models.teacher_arrays)
    source = row_source(config, rows.train, mesh, 0, read_teacher)
    run = jit_train_step(mesh, jax.tree.map(lambda x: x.sharding, state))
    seconds, busy, waits, trace = [], [], [], []
    for step in range(args.steps):
        start, cpu = time.perf_counter(), time.process_time()
        batch = source(step, state)
        waits.append(time.perf_counter() - start)
        state, metrics = run(program, state, *frozen, batch)
        values = {name: float(x) for name, x in jax.device_get(metrics).items()}
        seconds.append(time.perf_counter() - start)
        busy.append(time.process_time() - cpu)
        trace.append(values)
    rates, per_cpu = (
        [x["target_tokens"] / s for x, s in zip(trace, some, strict=True)]
        for some in (seconds, busy)
    )
    return {
        "rate": statistics.median(rates[WARM:]),
        "per_cpu": statistics.median(per_cpu[WARM:]),
        "waiting": sum(waits[WARM:]) / sum(seconds[WARM:]),
        "peak": peak_memory_bytes(),
        "trace": trace,
    }


def compare(args: Args, argv: Sequence[str]) -> None:
    def run(arm: str) -> dict[str, Any]:
        command = [sys.executable, __file__, *argv, "--arm", arm]
        text = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
        return json.loads(text.splitlines()[-1])

    written = run("write")
    print({name: round(x, 1) for name, x in written.items()})
    runs: dict[str, list[dict[str, Any]]] = {"live": [], "cached": []}
    for number in range(args.rounds):
        for arm in sorted(runs, reverse=number % 2 == 0):
            runs[arm].append(run(arm))
    for arm, some in runs.items():
        each = ", ".join(f"{x['rate']:.1f}" for x in some)
        rate, waiting = (statistics.median(x[n] for x in some) for n in ("rate", "waiting"))
        peak = max(x["peak"] for x in some)
        print(
            f"{arm:8}{rate:10.1f} target tokens/s ({each}), {peak / 1e9:.2f} GB, "
            f"{waiting:.2%} of a step waits for its batch"
        )
    (live, cached), (live_cpu, cached_cpu) = (
        [statistics.median(x[name] for x in runs[arm]) for arm in ("live", "cached")]
        for name in ("rate", "per_cpu")
    )
    equal = all(x["trace"] == runs["live"][0]["trace"] for some in runs.values() for x in some)
    print(
        f"cached over live: {cached / live:.2f} times the rate, {cached_cpu / live_cpu:.2f} times "
        f"by the process's CPU seconds; traces equal: {equal}"
    )


if __name__ == "__main__":
    sys.exit(run_command(main))
