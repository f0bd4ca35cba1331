"""Compile time, step time, throughput and memory of a configuration's train step.

python benchmarks/train_step.py --config FILE [any flag of kd_jax.train] [--rounds 8] [--json FILE]

Models, data and rows are loaded as by kd_jax.train, but nothing is written to the workdir. The
first two steps warm up; prints medians of the others. MFU is the step's FLOP/s
(kd_jax.planning.cost.step_flops) over the devices' bfloat16 peak.
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

from kd_jax.config.command import parse_args, parse_config, run_command
from kd_jax.config.flags import split_flags
from kd_jax.data.batches import count_steps, train_batches
from kd_jax.parallel.placement import put_batch
from kd_jax.planning.chips import chip_of
from kd_jax.planning.cost import step_flops
from kd_jax.setup.inputs import load_rows, open_inputs
from kd_jax.setup.models import load_models
from kd_jax.setup.program import make_program, targets
from kd_jax.setup.runtime import start_jax
from kd_jax.setup.sources import shared_vocab
from kd_jax.training.step import init_state, jit_train_step
from kd_jax.workdir.metrics import peak_memory_bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class Args:
    rounds: int = 8
    """Timed steps."""
    json: str | None = None
    """JSON file for all results."""


def main(argv: Sequence[str]) -> None:
    own, flags = split_flags(Args, argv)
    args = parse_args(Args, own, __doc__)
    config = parse_config(flags)
    start_jax(None)
    student, teacher, mesh = open_inputs(config)
    rows, _ = load_rows(config, *(model.tokenizer for model in (student, teacher) if model))
    models = load_models(config, student, teacher, mesh)
    vocab_size, num_steps = shared_vocab(student, teacher).size, count_steps(rows, config)
    program = make_program(config, models, vocab_size, mesh, num_steps)
    state = init_state(program, models.trainable)
    some = train_batches(
        rows,
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
    seconds = []
    for batch in batches:
        state, metrics = compiled(state, *frozen, put_batch(batch, mesh))
        jax.block_until_ready(metrics)
        seconds.append(lap())
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
        "step_seconds": step,
        "tokens_per_second": num_tokens / step,
        "target_tokens_per_second": num_targets / step,
        "flop_per_step": flops,
        "mfu": chip and flops / step / chip.flops / jax.device_count(),
        "peak_memory_bytes": peak_memory_bytes(),
    }
    for name, value in out.items():
        print(f"{name:26}{value:,.3f}" if isinstance(value, float) else f"{name:26}{value}")
    if args.json:
        Path(args.json).write_text(json.dumps(out | {"seconds": seconds}))


if __name__ == "__main__":
    sys.exit(run_command(main))
