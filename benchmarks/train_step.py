"""One configuration's train step: how long it compiles, how fast it runs, what it takes.

python benchmarks/train_step.py --config FILE [any flag of kd_jax.train] [--rounds 8] [--json FILE]

Real folders, data and rows, as kd_jax.train takes them, but nothing is written to the workdir. The
first two steps warm up; printed are medians of the others. MFU is what the step's products need
over what the device can do, both in bfloat16: 2 FLOP for each weight of the layers and each token
forward, as many again for the student's backward pass (twice as many where weights are trained),
attention's two products over half of a row, and both heads and the student's gradient for tokens
with a loss. What remat computes again does not count.
"""

import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from kd_jax import data
from kd_jax.build import load_models, make_program, put_batch, shared_vocab_size, start_jax
from kd_jax.command import parse_config, run_command
from kd_jax.loop import load_rows, open_inputs
from kd_jax.metrics import peak_memory_bytes
from kd_jax.optim import make_optimizer
from kd_jax.sharding import compiler_options, make_mesh
from kd_jax.step import init_state, targets, train_step

# Dense bfloat16 FLOP/s of one device by a part of its name, from the vendors' data sheets.
PEAK_FLOPS = {
    "H200": 989e12, "H100": 989e12, "A100": 312e12, "B200": 2250e12,
    "TPU v4": 275e12, "TPU v5 lite": 197e12, "TPU v5": 459e12, "TPU v6": 918e12,
}  # fmt: skip
OWN_FLAGS = {"--rounds": "8", "--json": None}


def layer_flops(arch, arrays: dict, num_tokens: int, seq_len: int) -> float:
    """Returns the forward FLOP of a model's layers."""
    weights = sum(x.size for name, x in arrays.items() if name.startswith("layers.") and x.ndim > 2)
    pairs = arch.num_hidden_layers * arch.num_attention_heads * arch.head_dim * seq_len / 2
    return num_tokens * (2 * weights + 4 * pairs)


def step_flops(config, student, teacher, models, num_tokens: int, num_targets: int) -> float:
    """Returns the FLOP that one optimizer step needs."""
    passes = 2 if config.trainable == "lora" else 3  # forward, gradient of inputs, of weights
    arrays = models.trainable | models.frozen
    own = layer_flops(student.arch, arrays, num_tokens, config.data.seq_len)
    head = 2 * student.arch.vocab_size * student.arch.hidden_size * num_targets
    total = passes * (own + head)
    if teacher is not None:
        total += layer_flops(teacher.arch, models.teacher_arrays, num_tokens, config.data.seq_len)
        total += 2 * teacher.arch.vocab_size * teacher.arch.hidden_size * num_targets
    return total


def split_flags(argv: Sequence[str]) -> tuple[list[str], dict[str, str | None]]:
    """Returns the flags of kd_jax.train, and this command's own by name."""
    own, rest, words = dict(OWN_FLAGS), [], iter(argv)
    for word in words:
        if word in own:
            own[word] = next(words)
        else:
            rest.append(word)
    return rest, own


def main(argv: Sequence[str]) -> None:
    argv, own = split_flags(argv)
    config = parse_config(argv, prog="python benchmarks/train_step.py", description=__doc__)
    rounds = int(own["--rounds"] or 8)
    start_jax(None)
    mesh = make_mesh(config.mesh, config.data.batch_size // config.optim.accumulation_steps)
    student, teacher = open_inputs(config)
    rows, _ = load_rows(config, *(model.tokenizer for model in (student, teacher) if model))
    models = load_models(config, student, teacher, mesh)
    vocab_size, num_steps = shared_vocab_size(student, teacher), data.num_steps(rows, config)
    program = make_program(config, models, vocab_size, mesh, num_steps)
    optimizer = make_optimizer(config.optim, num_steps)
    state = init_state(models.trainable, optimizer)
    some = data.batches(
        rows,
        seed=config.seed,
        start_step=0,
        batch_size=config.data.batch_size,
        accumulation_steps=config.optim.accumulation_steps,
    )
    batches = [next(some) for _ in range(rounds + 2)]
    frozen = (models.frozen, models.teacher_arrays)
    run = jax.jit(
        train_step,
        static_argnums=(0, 1),
        donate_argnums=2,
        compiler_options=compiler_options(mesh),
    )
    clock = [time.perf_counter()]

    def lap() -> float:
        clock.append(time.perf_counter())
        return clock[-1] - clock[-2]

    traced = run.trace(program, optimizer, state, *frozen, put_batch(batches[0], mesh))
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
    flops = step_flops(config, student, teacher, models, batches[0]["tokens"].size, num_targets)
    device = jax.devices()[0].device_kind
    peak = next((x for name, x in PEAK_FLOPS.items() if name.lower() in device.lower()), None)
    out |= {
        "device": device,
        "devices": jax.device_count(),
        "jax": jax.__version__,
        "step_seconds": step,
        "tokens_per_second": num_tokens / step,
        "target_tokens_per_second": num_targets / step,
        "flop_per_step": flops,
        "mfu": None if peak is None else flops / step / peak / jax.device_count(),
        "peak_memory_bytes": peak_memory_bytes(),
    }
    for name, value in out.items():
        print(f"{name:26}{value:,.3f}" if isinstance(value, float) else f"{name:26}{value}")
    if own["--json"]:
        Path(own["--json"]).write_text(json.dumps(out | {"seconds": seconds}))


if __name__ == "__main__":
    sys.exit(run_command(main))
