"""The demo's control: a smaller Llama from random weights, trained on few examples, no teacher.

Command:   python -m kd_jax.train --config kd_jax/toy/configs/finetune.py
           after python -m kd_jax.demo, which writes the files it reads.
Hardware:  two CPU cores.
Expected:  a cross-entropy far above the entropy: it memorises the few answers, slips included;
           measured in docs/benchmarks.md.
"""

from kd_jax.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    EvalConfig,
    LogConfig,
    LossConfig,
    OptimConfig,
    StudentConfig,
)


def get_config() -> Config:
    return Config(
        workdir="runs/demo/seed0/finetune",
        teacher=None,
        student=StudentConfig(path="runs/demo/seed0/untouched", dtype="float32"),
        trainable="full",
        loss=LossConfig(chunk_tokens=4096),
        data=DataConfig(path="runs/demo/seed0/few.jsonl", seq_len=96, batch_size=8),
        eval=EvalConfig(path="runs/demo/held_out.jsonl", every_steps=25),
        optim=OptimConfig(learning_rate=3e-3, warmup_steps=20, weight_decay=0.1, beta2=0.98),
        checkpoint=CheckpointConfig(every_steps=50),
        log=LogConfig(tensorboard=False),
        steps=150,
        remat="none",
    )
