"""Qwen2.5 7B Instruct into Qwen2.5 3B Instruct by LoRA, on alpaca-cleaned.

The heads are padded to 152,064 and 151,936 entries; the loss covers the tokenizer's 151,665.

Command:   python -m kd_jax.train --config configs/qwen2p5_7b_to_3b.py
Hardware:  one GPU of 80 GB or more (bfloat16).
Source:    8b_to_1b.py for this pair.
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
        workdir="runs/qwen2p5_7b_to_3b",
        teacher=TeacherConfig(path="Qwen/Qwen2.5-7B-Instruct"),
        student=StudentConfig(path="Qwen/Qwen2.5-3B-Instruct"),
        trainable="lora",
        lora=LoraConfig(rank=64, alpha=128.0),
        loss=LossConfig(kd_ratio=0.5, divergence="forward_kl"),
        data=DataConfig(
            path="yahma/alpaca-cleaned", split="train[:98%]", seq_len=2048, batch_size=4
        ),
        eval=EvalConfig(split="train[98%:]"),  # held out; --eval.path yahma/alpaca-cleaned uses it
        optim=OptimConfig(
            learning_rate=3e-4, schedule="cosine", warmup_steps=100, weight_decay=0.01
        ),
        epochs=1,
    )
