"""Every layout trains as one device does, and its program sends no more than it must."""

import math
import re
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from tiny_run import Run, assert_near, flat, make_run_config

from kd_jax.config import MeshConfig
from kd_jax.config.run import LINEAR_NAMES
from kd_jax.losses import fused_head
from kd_jax.parallel.mesh import make_mesh
from kd_jax.training import hlo
from kd_jax.training.step import jit_train_step

pytestmark = pytest.mark.devices(8)

STEPS = 5
CHUNK = 32  # tokens of the head's
LAYOUTS = {
    "data": {"mesh": {"data": 8}},
    "fsdp": {"mesh": {"data": 1, "fsdp": 8}},
    "tensor": {"mesh": {"data": 1, "tensor": 8}},  # two key/value heads on eight devices
    "all": {"mesh": {"data": 2, "fsdp": 2, "tensor": 2}},
    "context": {"mesh": {"data": 1, "fsdp": 2, "context": 2, "tensor": 2}},
    "teacher alone split": {
        "mesh": {"data": 2, "fsdp": 2, "tensor": 2},
        "student_axes": (),
    },
    "teacher otherwise split": {
        "mesh": {"data": 1, "fsdp": 4, "tensor": 2},
        "teacher_axes": ("tensor",),
        "student_axes": ("fsdp",),
    },
}
# Widths that eight devices share evenly.
SHAPE = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 8,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 328,
}  # fmt: skip
WIDTHS = (64, 96)  # of student and teacher


@pytest.fixture(scope="module")
def configs(tmp_path_factory, tiny_data):
    """Returns the config of a layout, in LoRA and in full training."""
    folder = tmp_path_factory.mktemp("layouts")
    student = tiny.write_plain_model(folder / "student", seed=1, **SHAPE)
    teacher = tiny.write_plain_model(
        folder / "teacher", seed=2, **SHAPE | {"hidden_size": WIDTHS[1], "num_key_value_heads": 8}
    )

    def make(trainable, **layout):
        optim = {"learning_rate": 1e-3}
        return make_run_config(
            student, teacher, tiny_data, folder, trainable=trainable, steps=STEPS, optim=optim,
            loss={"chunk_tokens": CHUNK}, lora={"target_modules": LINEAR_NAMES}, seq_len=96,
            **layout,
        )  # fmt: skip

    return make


def compile_step(run):
    step = jit_train_step(run.mesh, jax.tree.map(lambda x: x.sharding, run.state))
    traced = step.trace(run.program, *run.arguments(run.batch()))
    return traced.lower().compile()


def take_steps(run, compiled):
    """Returns the losses of STEPS steps, and the first step's gradients by path.

    Batches do not depend on the layout; the first moment after one step is a share of the gradient.
    """
    losses, gradients = [], {}
    for seed in range(STEPS):
        run.state, metrics = compiled(*run.arguments(run.batch(seed)))
        losses.append(float(metrics["loss"]))
        if seed == 0:
            moments = flat(optax.tree.get(run.state.opt_state, "mu"))
            gradients = {name: np.asarray(x) for name, x in moments.items()}
    return losses, gradients


@pytest.fixture(scope="module")
def alone(configs):
    """Returns the losses and gradients of a kind of training on one device."""

    @cache
    def train(trainable):
        run = Run(configs(trainable, mesh={"data": 1}), jax.devices()[:1])
        return take_steps(run, compile_step(run))

    return train


def _cases():
    """Layouts with the kind of training; those with axes of others alone are a campaign."""
    for name in LAYOUTS:
        marks = () if name == "teacher otherwise split" else pytest.mark.slow
        yield pytest.param((name, "full"), marks=marks, id=f"{name}-full")
    yield pytest.param(("all", "lora"), id="all-lora")


@pytest.fixture(scope="module", params=_cases())
def trained(request, configs):
    """A layout, the kind of training, take_steps' results, and the step's program."""
    layout, trainable = request.param
    run = Run(configs(trainable, **LAYOUTS[layout]))
    assert run.mesh.size == 8
    compiled = compile_step(run)
    text = compiled.as_text()
    return layout, trainable, take_steps(run, compiled), hlo.read_module(text)


def test_every_layout_trains_as_one_device_does(trained, alone):
    _, trainable, (losses, gradients), _ = trained
    want, want_gradients = alone(trainable)
    np.testing.assert_allclose(losses, want, rtol=1e-5)
    assert want[-1] < want[0]
    assert_near(gradients, want_gradients, 1e-4)


@pytest.mark.slow
def test_a_gradient_that_is_added_up_wrongly_is_noticed(configs, alone, monkeypatch):
    psum = fused_head._psum

    def leaves_out(share, sums, d_hidden, d_head, scatters):
        sums, _, d_head = psum(share, sums, d_hidden, d_head, scatters)
        return sums, d_hidden, d_head

    monkeypatch.setattr(fused_head, "_psum", leaves_out)
    jax.clear_caches()  # of programs with the right sum
    run = Run(configs("full", **LAYOUTS["tensor"]))
    with pytest.raises(AssertionError):
        assert_near(take_steps(run, compile_step(run))[1], alone("full")[1], 1e-4)


def excesses(program, vocab_size, chunk, widths):
    """Returns what a program sends beside weights, hidden states and sums over the vocabulary."""
    found, heads = [], dict.fromkeys(widths, 0)
    steps = [one for some in program.computations.values() for one in some]
    loops = {x.name for x in steps if x.opcode == "while" and hlo.trips(program, x) is None}
    for one in hlo.collectives(program):
        sizes = [tuple(map(int, re.findall(r"\d+", x.partition("[")[2]))) for x in one.shapes]
        for shape in sizes:
            of_vocab = [n for n in shape if n >= vocab_size // 8 and vocab_size % n == 0]
            rest = math.prod(shape) // max(of_vocab, default=1)
            if of_vocab and rest > 1 and rest not in widths:
                found.append(f"logits {one}")
            if loops & set(one.loops) and math.prod(shape) > chunk:
                found.append(f"inside the head's loop {one}")
        if one.transfer.kind == "all-gather" and one.source.startswith("losses/chunks.py"):
            for width in widths:
                heads[width] += one.transfer.times * any(width in shape for shape in sizes)
    return found + [f"heads of {width}: {n} times" for width, n in heads.items() if n > 1]


def test_a_program_sends_weights_hidden_states_and_sums_alone(trained):
    layout, _, _, program = trained
    assert hlo.collectives(program)
    # Where the vocabulary is whole, nothing is sent inside the head's loop.
    chunk = 0 if layout in ("data", "fsdp") else CHUNK
    assert not excesses(program, SHAPE["vocab_size"], chunk, WIDTHS)


def test_logits_that_are_gathered_are_seen_in_the_program():
    mesh = make_mesh(MeshConfig(data=1, tensor=8), 8)
    split, whole = NamedSharding(mesh, P(None, "tensor")), NamedSharding(mesh, P())

    def dense(hidden, head):
        z = jax.lax.with_sharding_constraint(hidden @ head.T, split)
        return jax.lax.with_sharding_constraint(jnp.exp(z), whole)

    head = jnp.ones((SHAPE["vocab_size"], 64))
    arrays = jnp.ones((16, 64)), jax.device_put(head, NamedSharding(mesh, P("tensor")))
    program = hlo.read_module(jax.jit(dense).lower(*arrays).compile().as_text())
    assert excesses(program, SHAPE["vocab_size"], 32, WIDTHS)
