"""The hidden-state loss in the step and in whole runs, against torch's autograd."""

import re
import shutil
from dataclasses import replace

import jax
import numpy as np
import pytest
import tiny
import torch
from orbax.checkpoint import v1 as ocp
from safetensors.numpy import load_file
from tiny_run import Run, assert_near
from transformers import AutoModelForCausalLM

from convert import to_hf
from kd_jax import train
from kd_jax.config import CheckpointConfig, HiddenConfig
from kd_jax.config.command import run_command
from kd_jax.training.step import loss_gradients
from kd_jax.workdir import checkpoints

pytestmark = pytest.mark.devices(4)

# The student has three layers of width 64, the teacher two of width 96, or three of 64.
ON = HiddenConfig(weight=0.7, student_layers=(0, -1), teacher_layers=(0, 1))


@pytest.fixture(scope="module")
def alike_teacher(tmp_path_factory):
    """A teacher of the student's shape."""
    return tiny.write_model(tmp_path_factory.mktemp("alike"), seed=5, tie_word_embeddings=False)


@pytest.fixture(scope="module")
def make_config(make_config, alike_teacher):
    def make(hidden=ON, *, alike=False, **changes):
        config = replace(make_config(**changes), hidden=hidden)
        if not alike:
            return config
        return replace(config, teacher=replace(config.teacher, path=str(alike_teacher)))

    return make


def with_outputs(model, tokens):
    """Returns logits, and each decoder layer's output by forward hooks of torch, [S, D]."""
    outputs = []
    hooks = [
        layer.register_forward_hook(
            lambda _, __, out: outputs.append((out[0] if isinstance(out, tuple) else out)[0])
        )
        for layer in model.model.layers
    ]
    logits = model(tokens, output_hidden_states=True)
    for hook in hooks:
        hook.remove()
    for i, state in enumerate(logits.hidden_states[1:-1]):  # the last of them is normed already
        assert torch.equal(state[0], outputs[i])
    return logits.logits[0], outputs


def torch_loss(run, student, teacher, projection, batch, *, shift=0, mask_all=False):
    """Returns the mean loss and hidden-state loss over target tokens, from torch's own functions.

    Args:
      shift, mask_all: plant a fault: other layers of the student, tokens without a loss.
    """
    hidden, kd_ratio = run.config.hidden, run.config.loss.kd_ratio
    total, compared, count = 0.0, 0.0, 0
    for r in range(batch["tokens"].shape[1]):
        for segment in range(1, batch["segment_ids"][0, r].max() + 1):
            here = batch["segment_ids"][0, r] == segment
            tokens = torch.tensor(batch["tokens"][0, r][here])[None].long()
            keep = torch.tensor(batch["loss_mask"][0, r][here])[1:]
            ours, outputs = with_outputs(student, tokens)
            with torch.no_grad():
                theirs, teacher_outputs = with_outputs(teacher, tokens)
            q, p = (x[:-1][keep].log_softmax(-1) for x in (ours, theirs))
            ce = torch.nn.functional.nll_loss(q, tokens[0, 1:][keep], reduction="sum")
            kl = torch.nn.functional.kl_div(q, p, reduction="sum", log_target=True)
            total = total + (1 - kd_ratio) * ce + kd_ratio * kl
            count += int(keep.sum())
            at = torch.ones_like(keep) if mask_all else keep
            for i, (a, b) in enumerate(
                zip(hidden.student_layers, hidden.teacher_layers, strict=True)
            ):
                s, u = outputs[(a + shift) % len(outputs)][:-1][at], teacher_outputs[b][:-1][at]
                z, u = (torch.nn.functional.rms_norm(x, x.shape[-1:], eps=0.0) for x in (s, u))
                if projection is not None:
                    z = z @ projection[i].T
                if hidden.kind == "mse":
                    value = torch.nn.functional.mse_loss(z, u, reduction="none").mean(-1)
                else:
                    value = 1 - torch.nn.functional.cosine_similarity(z, u, dim=-1)
                compared = compared + value.sum() / len(hidden.student_layers)
    return (total + hidden.weight * compared) / count, compared / count


def torch_models(run):
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(part.path, dtype=torch.float64)
        for part in (run.config.student, run.config.teacher)
    )
    projection = run.models.trainable.get("projection")
    if projection is not None:
        projection = torch.tensor(np.asarray(projection), dtype=torch.float64, requires_grad=True)
    return student, teacher, projection


@pytest.mark.parametrize(
    "kind, layers, alike",
    [
        ("mse", ((0, -1), (0, 1)), False),
        ("cosine", ((1, 2, 1), (0, -1, 0)), True),
    ],
    ids=str,
)
def test_loss_and_every_gradient_equal_torch(make_config, kind, layers, alike):
    hidden = replace(ON, kind=kind, student_layers=layers[0], teacher_layers=layers[1])
    run = Run(make_config(hidden, alike=alike))
    batch = run.batch()
    models = torch_models(run)
    student, _, projection = models
    assert (projection is None) == alike
    loss, compared = torch_loss(run, *models, batch)
    loss.backward()
    gradients, metrics = run.gradients(batch)
    assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-6)
    assert metrics["hidden_loss"] == pytest.approx(compared.item(), rel=1e-6)
    main = (metrics["ce_loss"] + metrics["kd_loss"]) / 2
    assert metrics["loss"] == pytest.approx(main + hidden.weight * metrics["hidden_loss"])
    named = {name: p.grad.numpy() for name, p in student.named_parameters()}
    want = {}
    for name in gradients.keys() - {"projection"}:
        if name.startswith("layers."):
            want[name] = np.stack([named[f"model.layers.{i}.{name[7:]}"] for i in range(3)])
        else:
            want[name] = named[f"model.{name}"]
    if projection is not None:
        want["projection"] = projection.grad.numpy()
    assert_near(gradients, want, 1e-4)


@pytest.mark.parametrize("fault", [{"shift": 1}, {"mask_all": True}], ids=str)
def test_a_planted_fault_is_seen(make_config, fault):
    run = Run(make_config())
    batch = run.batch()
    models = torch_models(run)
    wrong, compared = torch_loss(run, *models, batch, **fault)
    wrong.backward()
    gradients, metrics = run.gradients(batch)
    assert abs(metrics["hidden_loss"] - compared.item()) > 1e-3
    far = np.abs(gradients["projection"] - models[2].grad.numpy()).max()
    assert far > 1e-2 * np.abs(gradients["projection"]).max()


@pytest.fixture(scope="module")
def plain(make_config):
    """Gradients and metrics of a batch on two devices at once."""
    run = Run(make_config())
    return run.gradients(run.batch())


def test_how_it_is_computed_changes_nothing(make_config, plain):
    want, want_metrics = plain
    mesh = {"data": 1, "fsdp": 2, "tensor": 2}
    run = Run(make_config(optim={"accumulation_steps": 4}, mesh=mesh))
    shard = run.models.trainable["projection"].addressable_shards[0].data
    assert shard.shape == (2, 96 // 2, 64)
    got, metrics = run.gradients(run.batch())
    assert_near(got, want, 1e-5)
    for name, value in want_metrics.items():
        assert metrics[name] == pytest.approx(value, rel=1e-6 if name != "grad_norm" else 1e-5)


def test_padding_contributes_nothing(make_config, plain):
    run = Run(make_config())
    noisy = {name: x.copy() for name, x in run.batch().items()}
    noisy["tokens"][noisy["segment_ids"] == 0] = 17
    for name, value in run.gradients(noisy)[0].items():
        np.testing.assert_array_equal(value, plain[0][name], err_msg=name)


def test_without_weight_nothing_changes(make_config):
    off, none = (
        Run(make_config(hidden, trainable="lora"))
        for hidden in (replace(ON, weight=0.0), HiddenConfig())
    )
    batch = off.batch()
    got, want = off.step(batch), none.step(batch)
    assert got == want and "hidden_loss" not in got
    # With it, adapters and dropout begin as they did.
    on = Run(make_config(ON, trainable="lora"))
    assert on.models.trainable.keys() - {"projection"} == none.models.trainable.keys()
    for name, value in none.models.trainable["student"].items():
        np.testing.assert_array_equal(on.models.trainable["student"][name], value)


def test_the_projection_is_trained_in_float32_with_the_student(make_config):
    run = Run(make_config(trainable="lora"))
    before = np.asarray(run.state.trainable["projection"])
    losses = [run.step(run.batch())["hidden_loss"] for _ in range(4)]
    after = run.state.trainable["projection"]
    assert after.dtype == np.float32 and (np.asarray(after) != before).all()
    assert losses == sorted(losses, reverse=True)
    moments = [
        leaf
        for path, leaf in jax.tree.flatten_with_path(run.state.opt_state)[0]
        if "projection" in jax.tree_util.keystr(path)
    ]
    assert len(moments) == 2 and all(np.asarray(x).any() for x in moments)


def compiled(run):
    step = jax.jit(loss_gradients, static_argnums=0)
    return step.lower(run.program, *run.arguments(run.batch())).compile()


def test_the_compiled_gradient_keeps_the_chosen_layers_of_its_own_rows_alone(make_config):
    shape = {"batch_size": 4, "trainable": "lora", "mesh": {"data": 2}}
    hidden = HiddenConfig(weight=1.0, student_layers=(2, 0), teacher_layers=(1, 1))
    texts = [compiled(Run(make_config(x, **shape))).as_text() for x in (HiddenConfig(), hidden)]
    plain, on = (
        {tuple(map(int, x.split(","))) for x in re.findall(r"f32\[([\d,]+)\]", text)}
        for text in texts
    )
    states = {x for x in on - plain if x[-2:] in ((128, 64), (128, 96))}
    assert states  # two layers of a device's two rows, and no more
    assert all(np.prod(x[:-2]) <= 2 * 2 for x in states), states


@pytest.fixture(scope="module")
def run_train(tiny_student, tiny_teacher, tiny_data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("config")
    file = tiny.write_config(
        folder, teacher=tiny_teacher, student=tiny_student, data=tiny_data, dtype="float32",
        hidden=HiddenConfig(weight=0.5, student_layers=(0, -1), teacher_layers=(0, -1)),
        checkpoint=CheckpointConfig(every_steps=2),
    )  # fmt: skip

    def run(workdir, *flags):
        argv = ["--config", str(file), "--workdir", str(workdir), *flags]
        return run_command(train.main, argv)

    return run


@pytest.fixture(scope="module")
def finished(run_train, tmp_path_factory):
    """The workdir of a finished run. Read only."""
    workdir = tmp_path_factory.mktemp("lora") / "run"
    assert run_train(workdir) == 0
    return workdir


def read_state(workdir, step):
    """Returns all that a checkpoint holds, as NumPy arrays by path."""
    with ocp.training.Checkpointer(workdir.absolute() / "checkpoints") as checkpointer:
        saved = checkpointer.metadata(step).metadata
        abstract = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), saved)
        leaves = jax.tree.flatten_with_path(checkpointer.load(step, abstract))[0]
        return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


@pytest.mark.slow
def test_a_run_resumes_bit_for_bit_with_its_projection(finished, run_train, tmp_path):
    workdir = finished
    copy = shutil.copytree(workdir, tmp_path / "run")
    shutil.rmtree(copy / "checkpoints" / "4")
    assert run_train(copy) == 0
    whole, resumed = (read_state(folder, 4) for folder in (workdir, copy))
    assert sum("projection" in name for name in whole) == 3  # values and both moments
    assert whole.keys() == resumed.keys()
    for name, value in whole.items():
        assert value.tobytes() == resumed[name].tobytes(), name
    early = read_state(workdir, 2)
    assert all((early[n] != x).any() for n, x in whole.items() if "projection" in n)
    lines = [tiny.read_lines(folder / "metrics.jsonl") for folder in (workdir, copy)]
    for ours, theirs in zip(*lines, strict=True):
        assert ours.get("hidden_loss") == theirs.get("hidden_loss")
    assert sum("hidden_loss" in line for line in lines[0]) == 4


def test_the_projection_is_never_exported(finished, tmp_path, tiny_student, capsys):
    trained = checkpoints.open_trained(finished)
    assert trained.step == 4 and trained.shapes and "projection" not in trained.shapes
    out = tmp_path / "merged"
    argv = ["--workdir", str(finished), "--out", str(out)]
    assert run_command(to_hf.main, argv) == 0
    names = AutoModelForCausalLM.from_pretrained(tiny_student).state_dict().keys()
    model, report = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(report[x] for x in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.state_dict().keys() == names
    argv = ["--workdir", str(finished), "--out", str(tmp_path / "adapter")]
    assert run_command(to_hf.main, [*argv, "--format", "adapter"]) == 0
    factors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert all(name.endswith(("lora_A.weight", "lora_B.weight")) for name in factors)
    capsys.readouterr()


def test_layers_that_do_not_exist_are_refused_with_all_else_before_anything_is_loaded(
    run_train, tmp_path, capsys
):
    flags = ("--hidden.student-layers", "3", "-4", "--hidden.teacher-layers", "0", "2")
    assert run_train(tmp_path / "run", *flags, "--data.path", "/no/d.json") == 2
    message = capsys.readouterr().err
    assert "Traceback" not in message and not (tmp_path / "run").exists()
    for said in (
        "hidden.student-layers: expected -3 to 2 (the student has 3 layers), got 3",
        "hidden.student-layers: expected -3 to 2 (the student has 3 layers), got -4",
        "hidden.teacher-layers: expected -2 to 1 (the teacher has 2 layers), got 2",
        "data.path",
    ):
        assert said in message


def test_an_old_workdir_refuses_another_hidden_loss(finished, run_train, capsys):
    assert run_train(finished, "--hidden.kind", "cosine", "--hidden.weight", "1") == 2
    message = capsys.readouterr().err
    assert "hidden.kind: 'mse' -> 'cosine'" in message and "hidden.weight: 0.5 -> 1.0" in message
