"""SmolLM2 135M Instruct into half of its own layers, all weights trained.

Student:   the teacher without every second layer (81,413,568 parameters), which
           benchmarks/quality.py writes. It has to relearn everything.
Command:   python -m benchmarks.quality HuggingFaceTB/SmolLM2-135M-Instruct runs/smollm2_80m
           gsm8k_alpaca.json runs/smollm2_quality, which trains this and its controls; or, with the
           student there, python -m kd_jax.train --config configs/smollm2_135m_to_80m.py
Hardware:  any GPU of 8 GB or more (kd_jax.plan: 3.1 GiB), or a CPU.
Expected:  this length is unmeasured; docs/results.md has 30 steps on a CPU.
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
        workdir="runs/smollm2_135m_to_80m",
        teacher=TeacherConfig(path="HuggingFaceTB/SmolLM2-135M-Instruct"),
        student=StudentConfig(path="runs/smollm2_80m"),
        trainable="full",
        lora=LoraConfig(rank=64, alpha=128.0),
        loss=LossConfig(kd_ratio=0.5, divergence="forward_kl"),
        data=DataConfig(
            path="yahma/alpaca-cleaned", split="train[:98%]", seq_len=512, batch_size=4
        ),
        eval=EvalConfig(split="train[98%:]"),  # held out; --eval.path yahma/alpaca-cleaned uses it
        optim=OptimConfig(
            learning_rate=1e-3, schedule="cosine", warmup_steps=10, weight_decay=0.01
        ),
        remat="none",
        epochs=1,
    )
