"""AdamW, clipping and schedules against torch."""

import dataclasses

import jax
import numpy as np
import optax
import pytest

from kd_jax.config import OptimConfig
from kd_jax.losses.schedules import interpolate
from kd_jax.training.optim import make_optimizer, make_schedule

STEPS = 12
PLAIN = OptimConfig(learning_rate=0.1, warmup_steps=3, weight_decay=0.2, clip_norm=None)


def run_torch(config, start, gradients):
    """Returns the arrays after torch's AdamW and clipping, with our learning rates."""
    import torch

    named = {name: torch.nn.Parameter(torch.tensor(x)) for name, x in start.items()}
    decayed = [x for name, x in named.items() if "norm" not in name and "bias" not in name]
    others = [x for name, x in named.items() if "norm" in name or "bias" in name]
    optimizer = torch.optim.AdamW(
        [
            {"params": decayed, "weight_decay": config.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ],
        betas=(config.beta1, config.beta2),
        eps=config.epsilon,
    )
    schedule = make_schedule(config, STEPS)
    for step, gradient in enumerate(gradients):
        for name, x in named.items():
            x.grad = torch.tensor(gradient[name])
        if config.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(named.values(), config.clip_norm)
        for group in optimizer.param_groups:
            group["lr"] = float(schedule(step))
        optimizer.step()
    return {name: x.detach().numpy() for name, x in named.items()}


@pytest.mark.parametrize("clip_norm", [None, 0.5])
@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_updates_equal_torchs_adamw(schedule, clip_norm):
    config = dataclasses.replace(PLAIN, schedule=schedule, clip_norm=clip_norm)
    rng = np.random.default_rng(0)
    shapes = {
        "layers.a.weight": (5, 4),
        "layers.a.bias": (5,),
        "layers.a_norm.weight": (2, 3),
        "norm.weight": (4,),
        "layers.b.lora_A": (2, 3),
    }

    def draw():
        return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}

    start, gradients = draw(), [draw() for _ in range(STEPS)]
    optimizer = make_optimizer(config, STEPS)
    params, state = start, optimizer.init(start)
    update = jax.jit(optimizer.update)
    for gradient in gradients:
        updates, state = update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    want = run_torch(config, start, gradients)
    for name, value in want.items():
        # optax takes 1 - 0.999**step in float32, which is off by 6e-5 of itself at the first step.
        atol = 1e-4 * config.learning_rate
        np.testing.assert_allclose(params[name], value, rtol=1e-6, atol=atol, err_msg=name)


@pytest.mark.parametrize("name", ["cosine", "linear", "constant"])
def test_the_learning_rate_rises_to_its_peak_and_ends_near_zero(name):
    config = dataclasses.replace(PLAIN, schedule=name)
    rates = [float(make_schedule(config, STEPS)(step)) for step in range(STEPS + 1)]
    np.testing.assert_allclose(rates[:4], [0.1 / 3, 0.2 / 3, 0.1, 0.1], rtol=1e-6)
    middle = {"cosine": 0.05 * (1 + np.cos(np.pi / 3)), "linear": 0.1 * 2 / 3, "constant": 0.1}
    assert rates[6] == pytest.approx(middle[name], rel=1e-6)
    assert rates[STEPS] == pytest.approx(0.1 if name == "constant" else 0.0, abs=1e-8)


@pytest.mark.parametrize("ends", [(0.2, 0.8), (4.0, 1.0)])
@pytest.mark.parametrize("shape", ["linear", "cosine"])
def test_a_scheduled_value_goes_from_its_start_to_its_end_and_stays(shape, ends):
    start, end = ends
    progress = np.minimum(np.arange(STEPS + 3) / (STEPS - 1), 1)
    risen = {"linear": progress, "cosine": (1 - np.cos(np.pi * progress)) / 2}[shape]
    want = start + (end - start) * risen
    got = [float(interpolate(start, end, shape, step, STEPS)) for step in range(STEPS + 3)]
    np.testing.assert_allclose(got, want, rtol=1e-6)
    assert got[STEPS - 1 :] == [float(np.float32(end))] * 4  # evaluations take it: not nearly
