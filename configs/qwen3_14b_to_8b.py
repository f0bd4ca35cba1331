"""Qwen3 14B into Qwen3 8B by LoRA, on alpaca-cleaned.

Command:   python -m kd_jax.train --config configs/qwen3_14b_to_8b.py
Hardware:  one GPU of 80 GB or more (bfloat16).
Source:    the preset published with torchtune's recipe (rank 64); there a step was 16 padded
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
        workdir="runs/qwen3_14b_to_8b",
        teacher=TeacherConfig(path="Qwen/Qwen3-14B"),
        student=StudentConfig(path="Qwen/Qwen3-8B"),
        trainable="lora",
        lora=LoraConfig(rank=64, alpha=128.0),
        loss=LossConfig(kd_ratio=0.5, divergence="forward_kl"),
        data=DataConfig(
            path="yahma/alpaca-cleaned", split="train[:98%]", seq_len=2048, batch_size=2
        ),
        eval=EvalConfig(split="train[98%:]"),  # held out; --eval.path yahma/alpaca-cleaned uses it
        optim=OptimConfig(
            learning_rate=3e-4, schedule="cosine", warmup_steps=100, weight_decay=0.01
        ),
        epochs=1,
    )
