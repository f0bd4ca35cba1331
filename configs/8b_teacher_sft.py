"""Llama 3.1 8B Instruct fine-tuned by LoRA on alpaca-cleaned: adapts the teacher to the data.

Distil from it afterwards, with the adapter on its base

    python -m convert.to_hf --workdir runs/8b_teacher_sft --out out/8b_adapter --format adapter
    python -m kd_jax.train --config configs/8b_to_1b.py --teacher.adapter out/8b_adapter

or with merged weights: omit --format and give --teacher.path.

Command:   python -m kd_jax.train --config configs/8b_teacher_sft.py
Hardware:  one GPU of 80 GB or more (bfloat16).
Source:    torchtune's preset for this model widened to the projections that 8b_to_1b.py adapts.
Expected:  unmeasured so far; docs/benchmarks.md keeps the records.
"""

from kd_jax.config import Config, DataConfig, EvalConfig, LoraConfig, OptimConfig, StudentConfig


def get_config() -> Config:
    return Config(
        workdir="runs/8b_teacher_sft",
        teacher=None,
        student=StudentConfig(path="meta-llama/Llama-3.1-8B-Instruct"),
        trainable="lora",
        lora=LoraConfig(rank=8, alpha=16.0),
        data=DataConfig(
            path="yahma/alpaca-cleaned", split="train[:98%]", seq_len=2048, batch_size=4
        ),
        eval=EvalConfig(split="train[98%:]"),  # held out; --eval.path yahma/alpaca-cleaned uses it
        optim=OptimConfig(
            learning_rate=3e-4, schedule="cosine", warmup_steps=100, weight_decay=0.01
        ),
        epochs=1,
    )
