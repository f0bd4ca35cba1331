"""Costs of an on-policy step, and of its parts.

python -m benchmarks.on_policy --config FILE [any flag of kd_jax.train] [--rounds 6] [--json FILE]

--on-policy.fraction must be above 0. Models, data and rows are loaded as by kd_jax.train, but
nothing is written to the workdir. Each round times, in turn: a whole on-policy step, as the
training loop takes it; a drawing of samples alone; the step on them alone; the same on rows of the
data; and that without a teacher. Prints medians, and for a shared machine the ratio of the fastest
rounds. The teacher's cost is what a step takes longer with it: its forward pass, its logits and
the divergence.
"""

import json
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax

from kd_jax.config import Config, UserError
from kd_jax.config.command import parse_args, parse_config, run_command
from kd_jax.config.flags import split_flags
from kd_jax.data.batches import count_steps
from kd_jax.onpolicy.sampler import make_sampler
from kd_jax.onpolicy.source import OnPolicySource
from kd_jax.setup.inputs import choose, open_inputs, open_rows, row_source
from kd_jax.setup.models import load_models
from kd_jax.setup.program import make_program
from kd_jax.setup.runtime import start_jax
from kd_jax.training.step import init_state, jit_train_step


@dataclass(frozen=True, kw_only=True, slots=True)
class Args:
    rounds: int = 6
    """Timed rounds, after two that warm up."""
    json: str | None = None
    """JSON file for all results."""


def main(argv: Sequence[str]) -> None:
    own, flags = split_flags(Args, Config, argv)
    args = parse_args(Args, own, __doc__)
    config = parse_config(flags)
    if not config.samples:
        raise UserError("on-policy.fraction: expected above 0, got 0")
    start_jax(config.compilation_cache)
    times, facts = measure(config, args.rounds)
    medians = {name: statistics.median(x[2:]) for name, x in times.items()}
    least = {name: min(x[2:]) for name, x in times.items()}
    whole, parts = medians["whole"], medians["sampling"] + medians["step"]
    out = {
        **{f"{name}_seconds": value for name, value in medians.items()},
        "whole_over_parts": whole / parts,
        "fastest_whole_over_parts": least["whole"] / (least["sampling"] + least["step"]),
        "sampling_share": medians["sampling"] / whole,
        "teacher_share": (medians["data"] - medians["alone"]) / whole,
        "sampled_tokens_per_second": facts["tokens"] / medians["sampling"],
        **facts,
        "device": jax.devices()[0].device_kind,
        "dtype": config.student.dtype,
    }
    for name, value in out.items():
        print(f"{name:28}{value:,.3f}" if isinstance(value, float) else f"{name:28}{value}")
    if args.json:
        Path(args.json).write_text(json.dumps(out | {"times": times}))


def measure(config: Any, rounds: int) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Returns the seconds of each round by part, and medians of what was sampled."""
    student, teacher, mesh = open_inputs(config)
    assert teacher is not None
    opened = open_rows(config, student, teacher)
    rows, vocab_size = opened.train, opened.vocab_size
    config = choose(config, student.arch, teacher.arch, mesh)
    sampler = make_sampler(config, student, teacher, opened.template, rows)
    models = load_models(config, student, teacher, mesh)
    num_steps = count_steps(rows, config)
    program = make_program(config, models, vocab_size, mesh, num_steps)
    frozen = (models.frozen, models.teacher_arrays)
    data = row_source(config, rows, mesh, 0)
    source = OnPolicySource(
        config=config, sampler=sampler, batches=row_source(config, rows, mesh, 0).batches,
        mesh=mesh, student=program.student, frozen=models.frozen, vocab_size=vocab_size,
        num_steps=num_steps, write=lambda step, records: None, columns={},
    )  # fmt: skip
    state = init_state(program, models.trainable)
    run = jit_train_step(mesh, jax.tree.map(lambda x: x.sharding, state))
    times: dict[str, list[float]] = defaultdict(list)
    lengths = []

    def timed(name: str, call: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        out = jax.block_until_ready(call())
        times[name].append(time.perf_counter() - start)
        return out

    every = config.on_policy.every_steps
    for step in range(0, every * (rounds + 2), every):
        state, _ = timed("whole", lambda: run(program, state, *frozen, source(step, state)))  # noqa: B023
        lengths.append(source.metrics()["samples/length"] * source.metrics()["samples/count"])
        batch = timed("sampling", lambda: source(step, state))  # noqa: B023
        state, _ = timed("step", lambda: run(program, state, *frozen, batch))  # noqa: B023
        batch = data(step, state)
        state, _ = timed("data", lambda: run(program, state, *frozen, batch))  # noqa: B023
        lone = replace(program, teacher=None)
        state, _ = timed("alone", lambda: run(lone, state, frozen[0], {}, batch))  # noqa: B023
    return dict(times), {"tokens": statistics.median(lengths)}


if __name__ == "__main__":
    sys.exit(run_command(main))
