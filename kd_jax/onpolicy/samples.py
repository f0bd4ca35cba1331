"""Samples as rows of a batch, and what is measured of them."""

import math
from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from kd_jax.config import OnPolicyConfig
from kd_jax.data.batches import align_targets
from kd_jax.data.store import COLUMNS, TEACHER, Batch
from kd_jax.inference.sampling import Stop, stop_length
from kd_jax.losses.head_inputs import FIRST_OF_BIN

GROUP = "group"
LOG_PROBS = "log_probs"
# Columns of sampled rows: those of the data's, the group of each token (losses.head_inputs.Targets)
# and the log-probability with which it was drawn.
SAMPLE_COLUMNS = {**COLUMNS, GROUP: np.int32, LOG_PROBS: np.float32}
# Metrics of sampled tokens: the name in metrics.jsonl and the sign, by kd_head's name.
SAMPLED = {
    "ce_loss": ("student_log_prob", -1),
    "teacher_ce": ("teacher_log_prob", -1),
    "entropy": ("entropy", 1),
    "kl_forward": ("kl_forward", 1),
    "kl_reverse": ("kl_reverse", 1),
}


class Sample(NamedTuple):
    """A prompt and the answer that was drawn, with its end if it has one: ids int32."""

    prompt: np.ndarray
    answer: np.ndarray
    log_probs: np.ndarray
    """Log-probability of each token of the answer when it was drawn, nats, float32."""


def fill_rows(rows: Sequence[Sequence[Sample]], seq_len: int, pad: int) -> Batch:
    """Returns the columns [R, S] of samples, packed into the rows that they are given in."""
    out: Batch = {
        name: np.zeros((len(rows), seq_len), kind) for name, kind in SAMPLE_COLUMNS.items()
    }
    out["tokens"][:] = pad
    for number, samples in enumerate(rows):
        start = 0
        for segment, sample in enumerate(samples, start=1):
            first, stop = (
                start + len(sample.prompt),
                start + len(sample.prompt) + len(sample.answer),
            )
            whole, drawn = (number, slice(start, stop)), (number, slice(first, stop))
            out["tokens"][whole] = np.concatenate([sample.prompt, sample.answer])
            out["segment_ids"][whole] = segment
            out["positions"][whole] = np.arange(stop - start)
            out["loss_mask"][drawn] = True
            places = np.arange(stop - first)
            out[GROUP][drawn] = np.searchsorted(FIRST_OF_BIN, places, side="right")
            out[LOG_PROBS][drawn] = sample.log_probs
            start = stop
    return out


def with_teacher(columns: Batch, rows: Sequence[Sequence[Sample]], seq_len: int) -> Batch:
    """Returns the columns with those of the teacher's rows, as data.batches.read_batch names them.

    Args:
      rows: the same answers after the teacher's own prompts.
      seq_len: of the teacher's rows.
    """
    teacher = fill_rows(rows, seq_len, 0)
    own = {name: teacher[name] for name in COLUMNS if name != "loss_mask"}
    own["places"] = align_targets(columns, teacher)
    return columns | {f"{TEACHER}{name}": x for name, x in own.items()}


def samples_in(columns: Batch) -> Iterator[Sample]:
    """Yields the samples in rows that `fill_rows` made."""
    for row in range(len(columns["tokens"])):
        segments = columns["segment_ids"][row]
        for segment in range(1, int(segments.max(initial=0)) + 1):
            there = segments == segment
            tokens, drawn, log_probs = (
                columns[name][row, there] for name in ("tokens", "loss_mask", LOG_PROBS)
            )
            yield Sample(tokens[~drawn], tokens[drawn], log_probs[drawn])


def describe(columns: Batch, stops: Collection[Stop]) -> dict[str, float | None]:
    """Returns means over the samples of rows, by name in metrics.jsonl.

    None stands for a metric of the step that has no value: of a bin, or a step, without tokens.
    """
    samples = list(samples_in(columns))
    lengths = [len(sample.answer) for sample in samples]
    ends = [stop_length(sample.answer, stops) for sample in samples]
    ended = [end > 0 for end in ends]
    empty = [end == size for end, size in zip(ends, lengths, strict=True)]
    bins = np.bincount(columns[GROUP].ravel(), minlength=1 + len(FIRST_OF_BIN))[1:]
    found: dict[str, float | None] = {
        f"samples/{name}_from_{first}": None
        for first, count in zip(FIRST_OF_BIN, bins, strict=True)
        for name in ("kl_forward", "kl_reverse")
        if not count
    }
    found["samples/count"] = len(samples)
    if not samples:
        return found | {f"samples/{name}": None for name, _ in SAMPLED.values()}
    drawn = columns[LOG_PROBS][columns["loss_mask"]]
    return found | {
        "samples/length": float(np.mean(lengths)),
        "samples/ended": float(np.mean(ended)),
        "samples/empty": float(np.mean(empty)),
        "samples/repetition": float(np.mean([repetition(x.answer) for x in samples])),
        "samples/drawn_log_prob": float(np.mean(drawn, dtype=np.float64)),
    }


def repetition(tokens: np.ndarray, n: int = 4) -> float:
    """Returns the share of n-grams that occurred before in the same tokens; 0 for fewer than n."""
    grams = [tuple(tokens[i : i + n].tolist()) for i in range(len(tokens) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def num_sampled_rows(config: OnPolicyConfig, step: int, num_steps: int, batch_size: int) -> int:
    """Returns how many rows of optimizer step `step` are samples, in a run of `num_steps`."""
    share, steps = config.fraction, config.schedule_steps or num_steps
    if config.fraction_end is not None:
        progress = min(step / max(steps - 1, 1), 1.0)
        if config.schedule == "cosine":
            progress = 0.5 * (1 - math.cos(math.pi * progress))
        share += (config.fraction_end - config.fraction) * progress
    return math.floor(share * batch_size + 0.5)


def spread(num_rows: int, batch_size: int) -> np.ndarray:
    """Returns which rows of a batch are samples, [num_rows] int64, as evenly as possible."""
    places = np.arange(batch_size + 1) * num_rows // batch_size
    return np.flatnonzero(np.diff(places))


def mix(batch: Batch, samples: Batch) -> Batch:
    """Returns the batch [A, B, S] with some of its rows replaced by samples [R, S]."""
    shape = batch["tokens"].shape[:2]
    size = shape[0] * shape[1]
    chosen = spread(len(samples["tokens"]), size)
    batch = batch | {GROUP: np.zeros(batch["tokens"].shape, SAMPLE_COLUMNS[GROUP])}
    out: Batch = {}
    for name, column in batch.items():
        flat = column.reshape(size, -1).copy()
        flat[chosen] = samples[name]
        out[name] = flat.reshape(column.shape)
    return out
