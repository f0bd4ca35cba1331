"""The demo's control: a smaller Llama from random weights, trained on few examples, no teacher.

Command:   python -m kd_jax.train --config kd_jax/toy/configs/finetune.py
           after python -m kd_jax.demo, which writes the files it reads.
Hardware:  two CPU cores.
Expected:  a cross-entropy far above the entropy: it memorises the few answers, slips included;
           measured in docs/benchmarks.md.
"""

from dataclasses import replace
from pathlib import Path

from kd_jax.config import CheckpointConfig, Config
from kd_jax.config.command import load_config


def get_config() -> Config:
    teacher = load_config(Path(__file__).with_name("teacher.py"))
    return replace(
        teacher,
        workdir="runs/demo/seed0/finetune",
        student=replace(teacher.student, path="runs/demo/seed0/untouched"),
        data=replace(teacher.data, path="runs/demo/seed0/few.jsonl"),
        eval=replace(teacher.eval, every_steps=25),
        optim=replace(teacher.optim, learning_rate=3e-3),
        checkpoint=CheckpointConfig(every_steps=50),
        steps=150,
    )
