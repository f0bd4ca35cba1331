"""Compile time, step time, throughput and memory of a configuration's train step.

python -m benchmarks.train_step --config FILE [any flag of kd_jax.train] [--rounds 8] [--json FILE]

Models, data and rows are loaded as by kd_jax.train, but nothing is written to the workdir. The
first two steps warm up; prints medians of the others. MFU is the step's FLOP/s
(kd_jax.planning.cost.step_flops, each row one document) over the devices' bfloat16 peak.

--parts also times the parts of a step, each compiled alone, and the products of a student's layer
one by one: their FLOP/s at these shapes is the peak that each part is compared with. `rest` is what
the step takes beyond its parts.
"""

import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np

from kd_jax.config import Config
from kd_jax.config.command import parse_args, parse_config, run_command
from kd_jax.config.flags import split_flags
from kd_jax.data.batches import count_steps, train_batches
from kd_jax.parallel.placement import put_batch
from kd_jax.planning.chips import chip_of
from kd_jax.planning.cost import step_flops
from kd_jax.setup.forward import targets
from kd_jax.setup.inputs import choose, open_inputs, open_rows
from kd_jax.setup.models import load_models
from kd_jax.setup.program import make_program
from kd_jax.setup.runtime import start_jax
from kd_jax.training.step import init_state, jit_train_step
from kd_jax.workdir.metrics import peak_memory_bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class Args:
    rounds: int = 8
    """Timed steps."""
    parts: bool = False
    """Time the parts of a step as well."""
    json: str | None = None
    """JSON file for all results."""


def main(argv: Sequence[str]) -> None:
    own, flags = split_flags(Args, Config, argv)
    args = parse_args(Args, own, __doc__)
    config = parse_config(flags)
    start_jax(None)
    student, teacher, mesh = open_inputs(config)
    rows = open_rows(config, student, teacher)
    config = choose(config, student.arch, teacher.arch if teacher else None, mesh)
    models = load_models(config, student, teacher, mesh)
    num_steps = count_steps(rows.train, config)
    program = make_program(config, models, rows.vocab_size, mesh, num_steps)
    state = init_state(program, models.trainable)
    some = train_batches(
        rows.train,
        seed=config.seed,
        start_step=0,
        batch_size=config.data.batch_size,
        accumulation_steps=config.optim.accumulation_steps,
    )
    batches = [next(some) for _ in range(args.rounds + 2)]
    frozen = (models.frozen, models.teacher_arrays)
    run = jit_train_step(mesh, jax.tree.map(lambda x: x.sharding, state))
    clock = [time.perf_counter()]

    def lap() -> float:
        clock.append(time.perf_counter())
        return clock[-1] - clock[-2]

    traced = run.trace(program, state, *frozen, put_batch(batches[0], mesh))
    out = {"trace_seconds": lap()}
    lowered = traced.lower()
    out["lower_seconds"] = lap()
    compiled = lowered.compile()
    out["compile_seconds"] = lap()
    out["temporary_bytes"] = compiled.memory_analysis().temp_size_in_bytes
    seconds, cpu = [], []
    for batch in batches:
        start = time.process_time()
        state, metrics = compiled(state, *frozen, put_batch(batch, mesh))
        jax.block_until_ready(metrics)
        seconds.append(lap())
        cpu.append(time.process_time() - start)
    step = statistics.median(seconds[2:])
    num_tokens = float(np.median([np.count_nonzero(x["segment_ids"]) for x in batches[2:]]))
    num_targets = float(np.median([int(targets(x)[1].sum()) for x in batches[2:]]))
    archs = (student.arch, teacher and teacher.arch)
    flops, _ = step_flops(config, *archs, batches[0]["tokens"].size, num_targets)
    device = jax.devices()[0].device_kind
    chip = chip_of(device)
    out |= {
        "device": device,
        "devices": jax.device_count(),
        "jax": jax.__version__,
        "remat": config.remat,
        "dtype": config.student.dtype,
        "step_seconds": step,
        "cpu_seconds": statistics.median(cpu[2:]),
        "tokens_per_second": num_tokens / step,
        "target_tokens_per_second": num_targets / step,
        "flop_per_step": flops,
        "mfu": chip and flops / step / chip.flops / jax.device_count(),
        "peak_memory_bytes": peak_memory_bytes(),
    }
    for name, value in out.items():
        print(f"{name:26}{value:,.3f}" if isinstance(value, float) else f"{name:26}{value}")
    if args.parts:
        from benchmarks.step_parts import product_peak, time_parts  # as a module only

        placed = put_batch(batches[-1], mesh)
        times = time_parts(config, program, models, state, placed, args.rounds)
        peak = product_peak(program, program.student, placed["tokens"][0].size, args.rounds)
        out["parts"], out["products_flops"] = times, peak
        print(describe_parts(times, step, config.optim.accumulation_steps, peak))
    if args.json:
        Path(args.json).write_text(json.dumps(out | {"seconds": seconds}))


def describe_parts(
    times: dict[str, tuple[float, float]], step: float, accumulation: int, peak: float
) -> str:
    """Returns a table of parts: seconds in a step, their share of it and of the products' FLOP/s.

    Args:
      times: seconds and FLOPs of each part of one micro-batch.
      step: seconds.
    """
    lines = ["", f"{'part':32}{'seconds':>9}{'of step':>9}{'TFLOP/s':>9}{'of peak':>9}"]
    rest = step
    for name, (seconds, flops) in times.items():
        seconds *= 1 if name == "optimizer" else accumulation
        flops *= accumulation
        rest -= 0 if name == "student forward" else seconds  # that is in the backward part too
        rate = flops / seconds
        lines.append(
            f"{name:32}{seconds:9.3f}{seconds / step:9.1%}{rate / 1e12:9.3f}{rate / peak:9.1%}"
        )
    lines.append(f"{'rest':32}{rest:9.3f}{rest / step:9.1%}")
    lines.append(f"products of a layer alone: {peak / 1e12:.3f} TFLOP/s")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(run_command(main))
