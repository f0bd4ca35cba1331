"""Seconds of the parts of a train step, each compiled alone, and of its matrix products alone.

Used by benchmarks/train_step.py --parts.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax

from kd_jax.config import Config
from kd_jax.losses.fused_head import kd_head
from kd_jax.models.decoder import Decoder, DecoderSpec
from kd_jax.models.matmul import project
from kd_jax.models.weight_table import adapter_weights, layer_weights
from kd_jax.parallel.mesh import compiler_options
from kd_jax.planning.cost import count, layer_flops
from kd_jax.setup.forward import loss_scalars, run_models
from kd_jax.setup.models import Models
from kd_jax.setup.program import Program
from kd_jax.training.optim import make_optimizer

Part = tuple[Callable[..., Any], tuple[Any, ...], float]
"""A function, its arguments, and the FLOPs of its matrix products and attention."""


def time_parts(
    config: Config, program: Program, models: Models, state: Any, batch: Any, rounds: int
) -> dict[str, tuple[float, float]]:
    """Returns (seconds, FLOPs) of each part of a step with one micro-batch, by name."""
    found = {}
    for name, (run, arguments, flops) in parts(config, program, models, state, batch).items():
        found[name] = (time_call(program, run, arguments, rounds), flops)
    return found


def time_call(program: Program, run: Any, arguments: tuple[Any, ...], rounds: int) -> float:
    """Returns the median seconds of a function under jit."""
    run = jax.jit(run, compiler_options=compiler_options(program.mesh))
    jax.block_until_ready(run(*arguments))
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        jax.block_until_ready(run(*arguments))
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def parts(
    config: Config, program: Program, models: Models, state: Any, batch: Any
) -> dict[str, Part]:
    """Returns the parts of a step: models, head and optimizer."""
    micro = {name: x[0] for name, x in batch.items()}
    ids = (micro["tokens"], micro["positions"], micro["segment_ids"])
    trainable, seq_len = state.trainable, config.data.seq_len
    tokens = micro["tokens"].size

    # All arrays are arguments: XLA would multiply constants while it compiles.
    def hidden(frozen, trainable):
        return Decoder(program.student, frozen | trainable["student"])(*ids)

    def backward(frozen, trainable, d_hidden):
        return jax.vjp(lambda trainable: hidden(frozen, trainable), trainable)[1](d_hidden)

    def sides(frozen, teacher_arrays, trainable):
        student = Decoder(program.student, frozen | trainable["student"])
        return run_models(program, student, teacher_arrays, micro)[0]

    side, teacher, targets = jax.jit(sides)(models.frozen, models.teacher_arrays, trainable)
    scalars, num_targets = loss_scalars(program, None), float(jnp.sum(targets.mask))

    def head(side, teacher, targets):
        return jax.grad(lambda side: kd_head(program.head, scalars, side, teacher, targets)[0])(
            side
        )

    assert program.optim is not None and program.num_steps is not None
    optimizer = make_optimizer(program.optim, program.num_steps)

    def update(gradients, opt_state, trainable):
        updates, opt_state = optimizer.update(gradients, opt_state, trainable)
        return optax.apply_updates(trainable, updates), opt_state

    products, attention = layer_flops(program.student.arch, seq_len)
    full = config.trainable == "full"
    low = 0.0 if full else 2.0 * count(adapter_weights(config.lora, program.student.arch))
    passes = 3 if full else 2
    once = tokens * (products + low + attention)
    arch = program.student.arch
    head_flops = passes * 2.0 * arch.vocab_size * arch.hidden_size * num_targets
    found: dict[str, Part] = {}
    if program.teacher is not None:
        theirs = program.teacher.spec.arch
        run = lambda arrays: program.teacher(arrays, micro)[0].hidden  # noqa: E731
        flops = tokens * sum(layer_flops(theirs, seq_len))
        found["teacher"] = (run, (models.teacher_arrays,), flops)
        head_flops += 2.0 * theirs.vocab_size * theirs.hidden_size * num_targets
    found["student forward"] = (hidden, (models.frozen, trainable), once)
    both = tokens * (passes * products + 3 * low + 3 * attention)
    arguments = (models.frozen, trainable, side.hidden)
    found["student forward and backward"] = (backward, arguments, both)
    found["head"] = (head, (side, teacher, targets), head_flops)
    zeros = jax.tree.map(jnp.zeros_like, trainable)
    found["optimizer"] = (update, (zeros, state.opt_state, trainable), 0.0)
    return found


def product_peak(program: Program, spec: DecoderSpec, tokens: int, rounds: int) -> float:
    """Returns the FLOP/s of a layer's forward products alone, one after another."""
    seconds = flops = 0.0
    for shape in product_shapes(spec):
        x = jnp.ones((1, tokens, shape[1]), spec.dtype)
        weight = jnp.ones(shape, spec.dtype)
        run = lambda x, weight: project(x, weight, spec.dtype)  # noqa: E731
        seconds += time_call(program, run, (x, weight), rounds)
        flops += 2.0 * tokens * weight.size
    return flops / seconds


def product_shapes(spec: DecoderSpec) -> Iterator[tuple[int, ...]]:
    """Yields the shapes [out, in] of a layer's weights."""
    for weight in layer_weights(spec.arch).values():
        if len(weight.shape) == 2:
            yield weight.shape
