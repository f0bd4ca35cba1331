"""Llama 3.3 70B Instruct into Llama 3.1 8B Instruct by LoRA, on alpaca-cleaned.

Both models' weights are sharded over the devices; the teacher's are 141 GB in bfloat16.

Command:   python -m kd_jax.train --config configs/70b_to_8b.py
Hardware:  eight H100 or H200, or a v5p-16, or more of them (docs/planning.md; bfloat16).
Source:    8b_to_1b.py at the next size.
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
        workdir="runs/70b_to_8b",
        teacher=TeacherConfig(path="meta-llama/Llama-3.3-70B-Instruct"),
        student=StudentConfig(path="meta-llama/Llama-3.1-8B-Instruct"),
        trainable="lora",
        lora=LoraConfig(rank=64, alpha=128.0),
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
