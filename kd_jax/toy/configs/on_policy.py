"""The demo's on-policy distillation: the distilled student goes on with answers that it samples.

Command:   python -m kd_jax.train --config kd_jax/toy/configs/on_policy.py
           after python -m kd_jax.demo, which writes the files it reads.
Hardware:  two CPU cores.
Expected:  no gain over more steps of distil.py, for answers of one sentence: docs/results.md.
"""

from dataclasses import replace
from pathlib import Path

from kd_jax.config import Config, OnPolicyConfig
from kd_jax.config.command import load_config


def get_config() -> Config:
    distil = load_config(Path(__file__).with_name("distil.py"))
    return replace(
        distil,
        workdir="runs/demo/seed0/on_policy",
        student=replace(distil.student, path="runs/demo/seed0/distil_hf"),
        on_policy=OnPolicyConfig(fraction=0.5, max_new_tokens=16),
        loss=replace(distil.loss, divergence="reverse_kl"),
        optim=replace(distil.optim, learning_rate=1e-3),
        steps=100,
    )
