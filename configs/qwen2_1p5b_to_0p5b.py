"""Qwen2 1.5B Instruct into Qwen2 0.5B Instruct by LoRA, on alpaca-cleaned.

Command:   python -m kd_jax.train --config configs/qwen2_1p5b_to_0p5b.py
Hardware:  one GPU of 24 GB or more (bfloat16).
Source:    the preset published with torchtune's recipe (rank 32); there a step was 64 padded
           conversations, here it is packed rows with about as many.
Expected:  unmeasured so far; docs/benchmarks.md keeps the records.
"""

from kd_jax.config import (
    Config,
    DataConfig,
    EvalConfig,
    LoraConfig,
    LossConfig,
    OptimConfig,
    StudentConfig,
    TeacherConfig,
)


def get_config() -> Config:
    return Config(
        workdir="runs/qwen2_1p5b_to_0p5b",
        teacher=TeacherConfig(path="Qwen/Qwen2-1.5B-Instruct"),
        student=StudentConfig(path="Qwen/Qwen2-0.5B-Instruct"),
        trainable="lora",
        lora=LoraConfig(rank=32, alpha=64.0),
        loss=LossConfig(kd_ratio=0.5, divergence="forward_kl"),
        data=DataConfig(
            path="yahma/alpaca-cleaned", split="train[:98%]", seq_len=2048, batch_size=8
        ),
        eval=EvalConfig(split="train[98%:]"),  # held out; --eval.path yahma/alpaca-cleaned uses it
        optim=OptimConfig(
            learning_rate=3e-4, schedule="cosine", warmup_steps=100, weight_decay=0.01
        ),
        epochs=1,
    )
