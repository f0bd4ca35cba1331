"""The demo's teacher: a small Llama from random weights, trained on many examples.

Command:   python -m kd_jax.train --config kd_jax/toy/configs/teacher.py
           after python -m kd_jax.demo, which writes the files it reads.
Hardware:  two CPU cores.
Expected:  a cross-entropy close to the language's entropy; measured in docs/benchmarks.md.
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
        workdir="runs/demo/teacher",
        teacher=None,
        student=StudentConfig(path="runs/demo/teacher_init", dtype="float32"),
        trainable="full",
        loss=LossConfig(chunk_tokens=4096),  # a whole batch: the vocabulary is small
        data=DataConfig(path="runs/demo/many.jsonl", seq_len=96, batch_size=8),
        eval=EvalConfig(path="runs/demo/held_out.jsonl", every_steps=100),
        optim=OptimConfig(learning_rate=2e-3, warmup_steps=20, weight_decay=0.1, beta2=0.98),
        checkpoint=CheckpointConfig(every_steps=100),
        log=LogConfig(tensorboard=False),
        steps=500,
        remat="none",
    )
