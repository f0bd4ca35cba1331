"""Values of single tokens to what an evaluation reports: means, calibration, intervals. NumPy.

Sums are float64, one entry a group of tokens (a document, or the tokens at some positions), so that
the mean over any of the groups is the ratio of two sums.
"""

import numpy as np

Sums = dict[str, np.ndarray]


NUM_BINS = 15


# What is reported, in its order; the teacher's need one, and topk_overlap a k.
NAMES = (
    "ce", "perplexity", "entropy", "ece", "kl_forward", "kl_reverse", "top1_agreement",
    "topk_overlap", "acceptance", "teacher_ce", "teacher_entropy", "teacher_ece", "entropy_gap",
    "target_tokens",
)  # fmt: skip


TEACHERS = ("teacher_ce", "teacher_entropy", "teacher_ece")


def tally(values: dict[str, np.ndarray], groups: np.ndarray, num_groups: int) -> Sums:
    """Returns sums by group; those of `calibration` are by bin of the confidence too, [G, 15].

    Args:
      values: [n] by name, of n tokens: what kd_head.token_metrics gives.
      groups: [n] int, below num_groups.
    """

    def total(weights, groups=groups, size=num_groups):
        return np.bincount(groups, weights, minlength=size)

    sums = {"target_tokens": np.bincount(groups, minlength=num_groups).astype(np.float64)}
    for name, value in values.items():
        if not name.endswith(("confidence", "correct")):
            sums[name] = total(value)
    for of in ("", "teacher_"):
        if f"{of}confidence" in values:
            confidence = values[f"{of}confidence"].astype(np.float64)
            gap = confidence - values[f"{of}correct"]
            cells = groups * NUM_BINS + _bins(confidence)
            by_cell = total(gap, cells, num_groups * NUM_BINS)
            sums[f"{of}calibration"] = by_cell.reshape(num_groups, NUM_BINS)
    return sums


def _bins(confidence: np.ndarray) -> np.ndarray:
    """Returns the bin of each probability; a bin holds its upper edge."""
    return np.clip(np.ceil(confidence * NUM_BINS).astype(np.int64) - 1, 0, NUM_BINS - 1)


def means(sums: Sums) -> Sums:
    """Returns what is reported of sums over tokens, [...] each as its sums are.

    ece is sum_b |sum of confidence - correct in bin b| / tokens (arXiv 1706.04599); entropy_gap is
    the student's entropy less the teacher's; entropies and divergences are nats.
    """
    count = sums["target_tokens"]
    out = {}
    for name, value in sums.items():
        if name.endswith("calibration"):
            out[name.replace("calibration", "ece")] = np.abs(value).sum(axis=-1) / count
        else:
            out[name] = value / count
    out["target_tokens"] = count
    out["perplexity"] = np.exp(np.minimum(out["ce"], 700.0))
    if "teacher_entropy" in out:
        out["entropy_gap"] = out["entropy"] - out["teacher_entropy"]
    return out


def whole(sums: Sums) -> dict[str, float]:
    """Returns the means over the tokens of all groups."""
    values = means({name: value.sum(axis=0) for name, value in sums.items()})
    return {n: int(x) if n == "target_tokens" else float(x) for n, x in values.items()}


def by_position(sums: Sums) -> list[dict[str, float]]:
    """Returns the means of each bucket of positions that holds a token, [2^b, 2^(b + 1))."""
    out = []
    for bucket in np.flatnonzero(sums["target_tokens"]):
        values = whole({name: value[bucket : bucket + 1] for name, value in sums.items()})
        named = {name: values[name] for name in NAMES if name in values}
        out.append({"start": 1 << int(bucket), "stop": 2 << int(bucket), **named})
    return out


def compare(sums: Sums, others: Sums, num_samples: int, seed: int) -> dict[str, dict[str, float]]:
    """Returns each mean's difference, sums less others, with its 95 % interval.

    The interval is between percentiles of the paired bootstrap: documents are drawn with
    replacement, the same ones for both models, and each sample's means are ratios of its sums.

    Args:
      sums, others: by document, [D, ...] each, of the same documents.
    """
    rng = np.random.default_rng(seed)
    num_documents = len(sums["target_tokens"])
    samples: dict[str, list[np.ndarray]] = {}
    for first in range(0, num_samples, 100):
        size = min(100, num_samples - first)
        counts = np.stack([_resample(rng, num_documents) for _ in range(size)])
        for name, difference in _differences(sums, others, counts).items():
            samples.setdefault(name, []).append(difference)
    observed = _differences(sums, others, np.ones((1, num_documents)))
    theirs = whole(others)
    out: dict[str, dict[str, float]] = {}
    for name, parts in samples.items():
        low, high = np.percentile(np.concatenate(parts), [2.5, 97.5])
        out[name] = {
            "value": theirs[name],
            "difference": float(observed[name][0]),
            "low": float(low),
            "high": float(high),
        }
    return out


def _resample(rng: np.random.Generator, size: int) -> np.ndarray:
    """Returns how often each of `size` things is drawn in `size` draws, float64 for products."""
    return np.bincount(rng.integers(0, size, size), minlength=size).astype(np.float64)


def _differences(sums: Sums, others: Sums, counts: np.ndarray) -> Sums:
    """Returns differences of the means over documents taken `counts` [samples, D] times."""
    ours, theirs = (
        means({name: counts @ value for name, value in some.items()}) for some in (sums, others)
    )
    compared = (n for n in NAMES if n in ours and n not in (*TEACHERS, "target_tokens"))
    return {name: ours[name] - theirs[name] for name in compared}
