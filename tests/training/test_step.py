"""The step against torch's autograd, and what must never change it."""

import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from tiny import logits
from tiny_run import STEPS, Run, assert_near
from transformers import AutoModelForCausalLM

from kd_jax.data import rows
from kd_jax.inference.evaluation import eval_step
from kd_jax.models.decoder import Decoder
from kd_jax.setup.forward import loss_scalars, targets
from kd_jax.training.step import jit_train_step, train_step

pytestmark = pytest.mark.devices(8)


def torch_loss(student, teacher, batch, kd_ratio):
    """Returns the mean loss over target tokens, from torch's own functions."""
    total, count = 0.0, 0
    for r in range(batch["tokens"].shape[1]):
        for segment in range(1, batch["segment_ids"][0, r].max() + 1):
            here = batch["segment_ids"][0, r] == segment
            tokens = torch.tensor(batch["tokens"][0, r][here])[None].long()
            keep = torch.tensor(batch["loss_mask"][0, r][here])[1:]
            ours = student(tokens).logits[0, :-1][keep].log_softmax(-1)
            with torch.no_grad():
                theirs = teacher(tokens).logits[0, :-1][keep].log_softmax(-1)
            ce = torch.nn.functional.nll_loss(ours, tokens[0, 1:][keep], reduction="sum")
            kl = torch.nn.functional.kl_div(ours, theirs, reduction="sum", log_target=True)
            total = total + (1 - kd_ratio) * ce + kd_ratio * kl
            count += int(keep.sum())
    return total / count


def test_without_a_teacher_loss_and_gradients_are_those_of_cross_entropy(make_config):
    run = Run(replace(make_config(), teacher=None))
    batch = run.batch()
    student = AutoModelForCausalLM.from_pretrained(run.config.student.path, dtype=torch.float64)
    loss = torch_loss(student, student, batch, kd_ratio=0)
    loss.backward()
    gradients, metrics = run.gradients(batch)
    assert metrics["loss"] == metrics["ce_loss"] == pytest.approx(loss.item(), rel=1e-6)
    assert "kd_loss" not in metrics and not run.models.teacher_arrays
    # A teacher that weighs nothing is not loaded, and changes nothing.
    unweighed = Run(make_config(loss={"kd_ratio": 0.0}))
    assert not unweighed.models.teacher_arrays
    assert_near(unweighed.gradients(batch)[0], gradients, 0)
    named = dict(student.named_parameters())
    norm = named["model.norm.weight"].grad.numpy()
    assert_near({"norm": gradients["norm.weight"]}, {"norm": norm}, 1e-4)


def test_loss_and_every_gradient_equal_torch_on_unpacked_documents(make_config):
    run = Run(make_config(seq_len=192))
    batch = run.batch()
    assert batch["segment_ids"].max() > 1  # packed here, one by one there
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(part.path, dtype=torch.float64)
        for part in (run.config.student, run.config.teacher)
    )
    loss = torch_loss(student, teacher, batch, run.config.loss.kd_ratio)
    loss.backward()
    gradients, metrics = run.gradients(batch)
    assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-6)
    named = {name: p.grad.numpy() for name, p in student.named_parameters()}
    want = {}
    for name in gradients:
        layers = range(student.config.num_hidden_layers)
        if name.startswith("layers."):
            want[name] = np.stack([named[f"model.layers.{i}.{name[7:]}"] for i in layers])
        else:
            want[name] = named[f"model.{name}"]
    assert "embed_tokens.weight" in want  # tied: the head's gradient and the embedding's
    assert_near(gradients, want, 1e-4)


def test_how_it_is_computed_changes_nothing(make_config):
    """tests/parallel/test_layouts.py compares more layouts, with LoRA too."""
    run = Run(make_config())
    want, want_metrics = run.gradients(run.batch())
    changes = {"optim": {"accumulation_steps": 4}, "loss": {"chunk_tokens": 7}}
    changed = Run(make_config(mesh={"data": 2, "tensor": 4}, **changes))
    got, metrics = changed.gradients(changed.batch())
    assert_near(got, want, 1e-5)
    for name, value in want_metrics.items():
        assert metrics[name] == pytest.approx(value, rel=1e-6 if name != "grad_norm" else 1e-5)


SCHEDULED = {
    "kd_ratio": 0.2, "kd_ratio_end": 0.8, "temperature": 4.0, "temperature_end": 1.0,
    "schedule": "cosine", "schedule_steps": 3,
}  # fmt: skip


def test_a_schedule_gives_each_step_its_loss_however_it_is_accumulated(make_config):
    loss = {"kd_ratio": 0.5, "temperature": 2.5}  # half of the schedule
    run = Run(make_config(loss=loss))
    want = run.step(run.batch()) | loss
    run = Run(make_config(loss=SCHEDULED, optim={"accumulation_steps": 4}))
    run.state = run.state._replace(step=jnp.int32(1))
    got = run.step(run.batch())
    assert got.keys() == want.keys()
    for name in want.keys() - {"learning_rate"}:  # which has a schedule of its own
        rel = 1e-5 if name == "grad_norm" else 1e-6
        assert got[name] == pytest.approx(want[name], rel=rel), name


def test_an_evaluation_takes_the_schedules_end_at_any_step(make_config):
    scheduled = Run(make_config(loss=SCHEDULED))
    assert [float(x) for x in loss_scalars(scheduled.program, None)] == [np.float32(0.8), 1]
    run = Run(make_config(loss={"kd_ratio": 0.8}))
    arrays = run.models.frozen | run.state.trainable["student"]
    batch = {name: x[0] for name, x in run.arguments(run.batch())[-1].items()}
    evaluate = jax.jit(eval_step, static_argnums=0)
    (_, want), (_, got) = (
        evaluate(one.program, arrays, run.models.teacher_arrays, batch) for one in (run, scheduled)
    )
    for name, value in want.items():
        np.testing.assert_allclose(got[name], value, rtol=1e-5, atol=1e-6, err_msg=name)


def test_packing_changes_nothing(make_config):
    packed = Run(make_config(seq_len=192))
    alone = Run(make_config(pack=False, batch_size=24))
    every = {name: getattr(packed.rows, name) for name in rows.COLUMNS}
    missing = -len(packed.rows) % 8
    every = {name: np.pad(x, ((0, missing), (0, 0)))[None] for name, x in every.items()}
    got, metrics = packed.gradients(every)
    want, want_metrics = alone.gradients(alone.batch())
    assert packed.rows.tokens.shape[0] < alone.rows.tokens.shape[0]
    assert_near(got, want, 1e-5)
    assert metrics["loss"] == pytest.approx(want_metrics["loss"], rel=1e-6)


def test_padding_contributes_nothing(make_config):
    run = Run(make_config())
    batch = run.batch()
    noisy = {name: x.copy() for name, x in batch.items()}
    noisy["tokens"][noisy["segment_ids"] == 0] = 17
    want, _ = run.gradients(batch)
    got, _ = run.gradients(noisy)
    for name, value in want.items():
        np.testing.assert_array_equal(got[name], value, err_msg=name)


def test_frozen_weights_and_the_teacher_keep_their_bits(make_config):
    run = Run(make_config(trainable="lora"))
    before = {
        name: np.array(x) for name, x in (run.models.frozen | run.models.teacher_arrays).items()
    }
    trained = {name: np.array(x) for name, x in run.state.trainable["student"].items()}
    for seed in range(STEPS):
        run.step(run.batch(seed))
    for name, value in (run.models.frozen | run.models.teacher_arrays).items():
        assert np.asarray(value).tobytes() == before[name].tobytes(), name
    assert all(
        (np.asarray(run.state.trainable["student"][n]) != x).any() for n, x in trained.items()
    )


def test_the_optimizer_counts_the_steps_taken(make_config):
    run = Run(make_config(trainable="lora"))
    losses = [run.step(run.batch())["loss"] for _ in range(STEPS)]
    counts = [
        int(leaf)
        for path, leaf in jax.tree.flatten_with_path(run.state.opt_state)[0]
        if "count" in jax.tree_util.keystr(path)
    ]
    assert counts and set(counts) == {STEPS} and int(run.state.step) == STEPS
    assert losses[-1] < losses[0]


def test_runs_of_one_shape_share_one_compiled_program(make_config):
    compiled = []

    def listen(event, seconds, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    def run_one(**changes):
        run = Run(make_config(trainable="lora", **changes))
        arguments = run.program, *run.arguments(run.batch())
        before = len(compiled)
        step = jit_train_step(run.mesh, jax.tree.map(lambda x: x.sharding, run.state))
        jax.block_until_ready(step(*arguments))
        return len(compiled) - before

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        assert run_one(optim={"learning_rate": 3e-3}) == 1
        assert run_one(optim={"learning_rate": 3e-3}) == 0
        assert run_one(optim={"learning_rate": 4e-3}) == 1  # a constant of the program
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def test_dropout_follows_seed_and_step(make_config):
    def first_losses(seed_of_run=0):
        lora = {"dropout": 0.5, "target_modules": ("q_proj", "down_proj")}
        config = make_config(trainable="lora", lora=lora)
        run = Run(config)
        # B is zero at the start, so that dropout would not show.
        run.state = run.state._replace(
            trainable=jax.tree.map(lambda x: x + 0.05, run.state.trainable)
        )
        frozen_state = run.state
        out = []
        for step in (0, 0, 1):
            run.state = frozen_state._replace(step=jnp.int32(step))
            out.append(run.step(run.batch())["loss"])
        return out

    again, same, later = first_losses()
    assert again == same and later != again


def big_arrays(text, vocab_size, heads):
    """Returns the sizes of arrays with a vocabulary dimension in a compiled program, but heads."""
    shapes = {
        tuple(int(n) for n in found.split(","))
        for found in re.findall(r"\b(?:f32|bf16|f16|s32|pred)\[([\d,]+)\]", text)
    }
    return {s: int(np.prod(s)) for s in shapes if vocab_size in s and s not in heads}


@pytest.mark.parametrize("trainable", ["lora", "full"])
def test_no_array_of_tokens_by_vocabulary_beyond_one_chunk(make_config, trainable):
    config = make_config(trainable=trainable, mesh={"data": 8}, batch_size=16)
    run = Run(config)
    chunk = config.loss.chunk_tokens  # per device; a device has 2 rows
    vocab_size = run.program.head.vocab_size
    widths = (64, 96)
    heads = {(vocab_size, D) for D in widths} | {(D, vocab_size) for D in widths}
    heads |= {(1, vocab_size, D) for D in widths}  # a shard's gradient
    arguments = run.arguments(run.batch())
    step = jax.jit(train_step, static_argnums=0)
    text = step.lower(run.program, *arguments).compile().as_text()
    sizes = big_arrays(text, vocab_size, heads)
    assert sizes and max(sizes.values()) <= chunk * vocab_size, sizes
    if trainable == "lora":
        return
    program = replace(run.program, head=replace(run.program.head, top_k=5))
    evaluate = jax.jit(eval_step, static_argnums=0)
    arrays = run.models.frozen | run.state.trainable["student"]
    one = {name: x[0] for name, x in arguments[-1].items()}
    lowered = evaluate.lower(program, arrays, run.models.teacher_arrays, one)
    sizes = big_arrays(lowered.compile().as_text(), vocab_size, heads)
    assert sizes and max(sizes.values()) <= chunk * vocab_size, sizes


def test_whole_logits_would_be_seen_in_the_compiled_program(make_config):
    run = Run(make_config(batch_size=16))
    arrays = run.models.frozen | run.state.trainable["student"]
    one = {name: x[0] for name, x in run.arguments(run.batch())[-1].items()}

    def dense(arrays, batch):
        student = Decoder(run.program.student, arrays)
        return logits(student, batch["tokens"], batch["positions"], batch["segment_ids"]).max()

    text = jax.jit(dense).lower(arrays, one).compile().as_text()
    vocab_size = run.program.head.vocab_size
    sizes = big_arrays(text, vocab_size, {(vocab_size, 64)})
    assert max(sizes.values()) > run.config.loss.chunk_tokens * vocab_size


def test_a_position_predicts_the_next_token_of_its_document():
    batch = {
        "tokens": jnp.array([[5, 6, 7, 8, 9, 0]]),
        "segment_ids": jnp.array([[1, 1, 1, 2, 2, 0]]),
        "loss_mask": jnp.array([[False, True, True, True, True, False]]),
    }
    labels, mask, _ = targets(batch)
    assert labels[0, :5].tolist() == [6, 7, 8, 9, 0]
    assert mask[0].tolist() == [True, True, False, True, False, False]
