"""Llama 3.2 1B Instruct fine-tuned on alpaca-cleaned without a teacher: the control arm.

Equal to 8b_to_1b.py but for the teacher: the two runs differ by distillation alone.

Command:   python -m kd_jax.train --config configs/1b_sft.py
Hardware:  one GPU of 24 GB or more (bfloat16).
Source:    8b_to_1b.py.
Expected:  unmeasured so far; docs/benchmarks.md keeps the records.
"""

from kd_jax.config import Config, DataConfig, EvalConfig, LoraConfig, OptimConfig, StudentConfig


def get_config() -> Config:
    return Config(
        workdir="runs/1b_sft",
        teacher=None,
        student=StudentConfig(path="meta-llama/Llama-3.2-1B-Instruct"),
        trainable="lora",
        lora=LoraConfig(rank=64, alpha=128.0),
        data=DataConfig(
            path="yahma/alpaca-cleaned", split="train[:98%]", seq_len=2048, batch_size=4
        ),
        eval=EvalConfig(split="train[98%:]"),  # held out; --eval.path yahma/alpaca-cleaned uses it
        optim=OptimConfig(
            learning_rate=3e-4, schedule="cosine", warmup_steps=100, weight_decay=0.01
        ),
        epochs=1,
    )
