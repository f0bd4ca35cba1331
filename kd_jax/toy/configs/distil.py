"""The demo's distillation: finetune.py with a teacher in place of the labels.

Command:   python -m kd_jax.train --config kd_jax/toy/configs/distil.py
           after python -m kd_jax.demo, which writes the files it reads.
Hardware:  two CPU cores.
Expected:  a cross-entropy close to the teacher's, which shows the odds of all answers at every
           token; measured in docs/benchmarks.md.
"""

from dataclasses import replace
from pathlib import Path

from kd_jax.config import Config, TeacherConfig
from kd_jax.config.command import load_config


def get_config() -> Config:
    control = load_config(Path(__file__).with_name("finetune.py"))
    return replace(
        control,
        workdir="runs/demo/seed0/distil",
        teacher=TeacherConfig(path="runs/demo/teacher_hf", dtype="float32"),
        loss=replace(control.loss, kd_ratio=1.0, divergence="forward_kl"),
    )
