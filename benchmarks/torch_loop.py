"""A careful training loop in torch: the peer of benchmarks/peers.py, in a process of its own.

python benchmarks/torch_loop.py JOB.json

Models of transformers, adapters of peft. Rows are packed; attention sees each document alone, by
one causal call a document or with one mask. The head computes tokens with a loss alone, in chunks,
with the gradient in closed form, so that no logits outlive a chunk. Trained weights, optimizer
(fused AdamW) and sums are float32; in bfloat16 products run under autocast and frozen weights are
bfloat16. No gradient checkpointing. Imports nothing of kd_jax.
"""

import json
import resource
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AutoModelForCausalLM

Documents = list[tuple[int, int, int]]  # row, first token, end
documents: Documents = []
"""Documents of the batch, padding included, which attention reads."""


def attend_by_document(module, query, key, value, attention_mask, scaling=None, **_):
    """Attention of transformers: [B, N, S, H] and [B, K, S, H] to [B, S, N, H]."""
    options = {"is_causal": True, "scale": scaling, "enable_gqa": True}
    rows: list[list[torch.Tensor]] = [[] for _ in range(len(query))]
    for row, first, end in documents:
        parts = (x[row : row + 1, :, first:end] for x in (query, key, value))
        rows[row].append(scaled_dot_product_attention(*parts, **options))
    joined = torch.cat([torch.cat(parts, dim=2) for parts in rows])
    return joined.transpose(1, 2).contiguous(), None


class Distil(torch.autograd.Function):
    """Sum over tokens of (1 - r) CE + r KL(teacher || student), divided by `count`."""

    @staticmethod
    def forward(ctx, hidden, head, teacher_hidden, teacher_head, labels, ratio, chunk, count):
        """Takes hidden states [T, D] of tokens with a loss, and heads [V, D], of both models."""
        d_hidden, total = torch.empty_like(hidden), 0.0
        d_head = torch.zeros(head.shape) if ctx.needs_input_grad[1] else None
        weight = head.detach().to(hidden.dtype)
        for first in range(0, len(hidden), chunk):
            rows = slice(first, first + chunk)
            z, t = hidden[rows] @ weight.T, teacher_hidden[rows] @ teacher_head.T
            loss, d_logits = losses(z, t, labels[rows], ratio, count)
            total += loss
            d_logits = d_logits.to(hidden.dtype)
            d_hidden[rows] = d_logits @ weight
            if d_head is None:
                continue
            if hidden.dtype == torch.float32:
                d_head.addmm_(d_logits.T, hidden[rows])
            else:
                d_head += d_logits.T @ hidden[rows]
        ctx.gradients = d_hidden, d_head
        return total

    @staticmethod
    def backward(ctx, scale):
        d_hidden, d_head = ctx.gradients
        d_head = None if d_head is None else d_head.mul_(scale)
        return d_hidden * scale, d_head, *[None] * 6


def losses(z, t, labels, ratio, count):
    """Returns the loss of a chunk and its gradient in the student's logits z [C, V]."""
    log_q, log_p = (x.float().log_softmax(-1) for x in (z, t))
    p, labels = log_p.exp(), labels[:, None]
    kl = (p * (log_p - log_q)).sum()
    loss = (ratio * kl - (1 - ratio) * log_q.gather(1, labels).sum()) / count
    d_logits = (log_q.exp() - ratio * p) / count
    return loss, d_logits.scatter_add_(
        1, labels, -torch.full_like(d_logits[:, :1], (1 - ratio) / count)
    )


def load(job: dict[str, Any], part: str, dtype: torch.dtype) -> nn.Module:
    AttentionInterface.register("by_document", attend_by_document)
    by_document = job["attention"] == "documents"
    return AutoModelForCausalLM.from_pretrained(
        job[part], dtype=dtype, attn_implementation="by_document" if by_document else "sdpa"
    )


def load_student(job: dict[str, Any], dtype: torch.dtype) -> nn.Module:
    if job["trainable"] == "full":
        return load(job, "student", torch.float32)
    from peft import LoraConfig, get_peft_model

    student, options = load(job, "student", dtype), job["lora"]
    config = LoraConfig(
        r=options["rank"], lora_alpha=options["alpha"], target_modules=options["target_modules"]
    )
    return get_peft_model(student, config).base_model.model


def make_optimizer(student: nn.Module, options: dict[str, Any]) -> torch.optim.Optimizer:
    named = [(name, x) for name, x in student.named_parameters() if x.requires_grad]
    plain = [x for name, x in named if name.endswith(("norm.weight", ".bias"))]
    decayed = [x for name, x in named if not name.endswith(("norm.weight", ".bias"))]
    groups = [{"params": decayed}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(
        groups,
        lr=options["learning_rate"],
        betas=(options["beta1"], options["beta2"]),
        eps=options["epsilon"],
        weight_decay=options["weight_decay"],
        fused=True,
    )


def find_documents(segments: np.ndarray) -> Documents:
    found = []
    for row, ids in enumerate(segments):
        cuts = [0, *(np.flatnonzero(np.diff(ids)) + 1).tolist(), len(ids)]
        found += [(row, first, end) for first, end in pairwise(cuts)]
    return found


def document_mask(segments: torch.Tensor) -> torch.Tensor:
    """Returns which keys a query attends to, [B, 1, S, S] bool."""
    same = segments[:, :, None] == segments[:, None]
    return (same & torch.ones(same.shape[1:], dtype=torch.bool).tril())[:, None]


def read_batch(batches: Any, step: int, job: dict[str, Any]) -> tuple[dict[str, Any], Any, Any]:
    """Returns the models' arguments, the places of the tokens with a loss, and their labels."""
    tokens, segments, positions, mask = (
        torch.from_numpy(batches[name][step])
        for name in ("tokens", "segment_ids", "positions", "targets")
    )
    documents[:] = find_documents(segments.numpy())
    attention_mask = None if job["attention"] == "documents" else document_mask(segments)
    arguments = {"input_ids": tokens.long(), "position_ids": positions.long()}
    return arguments | {"attention_mask": attention_mask}, mask, tokens.roll(-1, 1)[mask].long()


def train_step(job: dict[str, Any], student: Any, teacher: Any, batch: Any) -> torch.Tensor:
    """Returns the loss, its gradients added to the student's weights."""
    arguments, mask, labels = batch
    bfloat16 = job["dtype"] == "bfloat16"
    with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        with torch.no_grad():
            theirs = teacher.model(**arguments, use_cache=False).last_hidden_state[mask]
        ours = student.model(**arguments, use_cache=False).last_hidden_state[mask]
    dtype = torch.bfloat16 if bfloat16 else torch.float32
    ours, theirs = ours.to(dtype), theirs.to(dtype)
    heads = student.lm_head.weight, teacher.lm_head.weight.to(dtype)
    options = (job["kd_ratio"], job["chunk"], len(labels))
    loss = Distil.apply(ours, heads[0], theirs, heads[1], labels, *options)
    loss.backward()
    return loss


def main(file: str) -> None:
    job = json.loads(Path(file).read_text())
    torch.set_num_threads(job["threads"])
    torch.manual_seed(0)
    dtype = {"bfloat16": torch.bfloat16, "float32": torch.float32}[job["dtype"]]
    teacher = load(job, "teacher", dtype).eval().requires_grad_(False)
    student = load_student(job, dtype).train()
    optimizer = make_optimizer(student, job["optim"])
    trained = [x for group in optimizer.param_groups for x in group["params"]]
    if job["compile"]:
        student.model, teacher.model = torch.compile(student.model), torch.compile(teacher.model)
    batches = np.load(job["batches"])
    with open(job["metrics"], "w") as out:
        for step in range(len(batches["tokens"])):
            start = time.perf_counter()
            warm = min(1.0, (step + 1) / max(job["optim"]["warmup_steps"], 1))
            for group in optimizer.param_groups:
                group["lr"] = job["optim"]["learning_rate"] * warm
            batch = read_batch(batches, step, job)
            loss = train_step(job, student, teacher, batch)
            nn.utils.clip_grad_norm_(trained, job["optim"]["clip_norm"])
            optimizer.step()
            optimizer.zero_grad()
            line = {
                "step": step + 1,
                "loss": float(loss),
                "target_tokens": len(batch[2]),
                "step_seconds": time.perf_counter() - start,
                "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            }
            print(json.dumps(line), file=out, flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
