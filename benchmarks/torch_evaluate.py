"""A padded evaluation loop in torch: the peer of benchmarks/evaluate.py, in a process of its own.

python benchmarks/torch_evaluate.py JOB.json

Models of transformers in the job's dtype. Conversations, longest first, are padded to the longest
of their batch; both models compute logits of the tokens with a loss alone. Prints the cross-entropy
of each model, KL(teacher || student) and the share of equal most likely tokens, as kd_jax.evaluate.
Imports nothing of kd_jax.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM


def main(file: str) -> None:
    job = json.loads(Path(file).read_text())
    torch.set_num_threads(job["threads"])
    dtype = {"bfloat16": torch.bfloat16, "float32": torch.float32}[job["dtype"]]
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(job[part], dtype=dtype).eval()
        for part in ("student", "teacher")
    )
    documents = sorted(read(job["documents"]), key=lambda pair: -len(pair[0]))
    sums: dict[str, float] = {}
    for first in range(0, len(documents), job["batch_size"]):
        for name, value in score(student, teacher, documents[first:][: job["batch_size"]]).items():
            sums[name] = sums.get(name, 0.0) + value
    count = sums.pop("target_tokens")
    print(
        json.dumps({"target_tokens": count} | {name: value / count for name, value in sums.items()})
    )


def read(file: str) -> list[tuple[Any, Any]]:
    """Returns the ids and the tokens with a loss of each conversation."""
    arrays = np.load(file)
    cuts = np.cumsum(arrays["lengths"])[:-1]
    return list(
        zip(np.split(arrays["tokens"], cuts), np.split(arrays["target"], cuts), strict=True)
    )


@torch.inference_mode()
def score(student: Any, teacher: Any, batch: list[tuple[Any, Any]]) -> dict[str, float]:
    """Returns sums over the tokens with a loss."""
    longest = len(batch[0][0])
    ids, real, mask = (torch.zeros(len(batch), longest, dtype=torch.long) for _ in range(3))
    for row, (tokens, target) in enumerate(batch):
        ids[row, : len(tokens)] = torch.from_numpy(tokens)
        real[row, : len(tokens)] = 1
        mask[row, : len(tokens)] = torch.from_numpy(target)
    wanted, labels = mask[:, 1:].bool(), ids[:, 1:]
    ours, theirs = (
        model.lm_head(
            model.model(input_ids=ids, attention_mask=real, use_cache=False)
            .last_hidden_state[:, :-1][wanted]
        )
        for model in (student, teacher)
    )  # fmt: skip
    log_q, log_p = (x.float().log_softmax(-1) for x in (ours, theirs))
    right = labels[wanted][:, None]
    return {
        "target_tokens": len(right),
        "ce": -log_q.gather(1, right).sum().item(),
        "teacher_ce": -log_p.gather(1, right).sum().item(),
        "kl_forward": (log_p.exp() * (log_p - log_q)).sum().item(),
        "top1_agreement": (log_q.argmax(-1) == log_p.argmax(-1)).sum().item(),
    }


if __name__ == "__main__":
    main(sys.argv[1])
