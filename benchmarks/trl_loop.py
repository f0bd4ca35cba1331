"""TRL's GKD trainer, off-policy, as a peer of benchmarks/peers.py; in an environment with TRL.

python benchmarks/trl_loop.py JOB.json

Defaults of the trainer but for what the comparison fixes: the forward KL alone (beta 0), no samples
(lmbda 0), AdamW's options. Each step takes as many conversations as kd_jax's packed rows have on
average; they are padded, for the trainer does not pack. Imports nothing of kd_jax.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoTokenizer, TrainerCallback
from trl.experimental.gkd import GKDConfig, GKDTrainer


class Trainer(GKDTrainer):
    """Counts the tokens with a loss."""

    num_targets = 0

    def compute_loss(self, model, inputs, *args, **kwargs):
        self.num_targets += int((inputs["labels"] != -100).sum())
        return super().compute_loss(model, inputs, *args, **kwargs)


class Lines(TrainerCallback):
    """Writes a line of metrics after each step."""

    def __init__(self, path: str):
        self.path, self.start = Path(path), time.perf_counter()
        self.trainer: Any = None

    def on_step_end(self, args, state, control, **kwargs):
        now = time.perf_counter()
        line = {
            "step": state.global_step,
            "loss": None,
            "target_tokens": self.trainer.num_targets,
            "step_seconds": now - self.start,
        }
        with self.path.open("a") as out:
            print(json.dumps(line), file=out)
        self.start, self.trainer.num_targets = now, 0


def conversations(file: str) -> Dataset:
    """Returns Alpaca records as chat messages."""
    records = json.loads(Path(file).read_text())
    found = []
    for record in records:
        asked = "\n\n".join(filter(None, (record["instruction"], record.get("input"))))
        turns = {"user": asked, "assistant": record["output"]}
        found.append({"messages": [{"role": n, "content": x} for n, x in turns.items()]})
    return Dataset.from_list(found)


def main(file: str) -> None:
    job = json.loads(Path(file).read_text())
    torch.set_num_threads(job["threads"])
    optim, folder = job["optim"], Path(job["metrics"]).parent
    config = GKDConfig(
        output_dir=str(folder / "trl"),
        lmbda=0.0,
        beta=0.0,
        max_length=job["seq_len"],
        per_device_train_batch_size=job["conversations"],
        max_steps=job["steps"],
        learning_rate=optim["learning_rate"],
        weight_decay=optim["weight_decay"],
        adam_beta2=optim["beta2"],
        max_grad_norm=optim["clip_norm"],
        warmup_steps=optim["warmup_steps"],
        use_cpu=True,
        bf16=job["dtype"] == "bfloat16",
        save_strategy="no",
        report_to=[],
    )
    lines, peft_config = Lines(job["metrics"]), None
    if job["trainable"] == "lora":
        from peft import LoraConfig

        lora = job["lora"]
        peft_config = LoraConfig(
            r=lora["rank"], lora_alpha=lora["alpha"], target_modules=lora["target_modules"]
        )
    trainer = Trainer(
        model=job["student"],
        teacher_model=job["teacher"],
        args=config,
        train_dataset=conversations(job["data"]),
        processing_class=AutoTokenizer.from_pretrained(job["student"]),
        peft_config=peft_config,
        callbacks=[lines],
    )
    lines.trainer = trainer
    trainer.train()


if __name__ == "__main__":
    main(sys.argv[1])
