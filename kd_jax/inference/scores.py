"""Evaluation scores from the values of tokens: means, calibration errors, bootstrap intervals.

Sums are float64 [G], one entry for each group of tokens (a document, or a range of positions). The
mean over any selection of groups is a ratio of two sums.
"""

from typing import Any

import numpy as np

Sums = dict[str, np.ndarray]

NUM_BINS = 15
DRAFT_LENGTHS = (4, 8)
"""Tokens that a draft model proposes at a time, for which accepted_length is reported."""
# Reported scores in order. Some need a teacher, and topk_overlap needs a k.
NAMES = (
    "ce", "perplexity", "entropy", "ece", "kl_forward", "kl_reverse", "top1_agreement",
    "topk_overlap", "acceptance", "teacher_ce", "teacher_entropy", "teacher_ece", "entropy_gap",
    *(f"accepted_length_{k}" for k in DRAFT_LENGTHS), "target_tokens",
)  # fmt: skip
TEACHERS = ("teacher_ce", "teacher_entropy", "teacher_ece")


def tally(values: dict[str, np.ndarray], groups: np.ndarray, num_groups: int) -> Sums:
    """Returns the sums of each group, [G]; calibration sums are split by confidence, [G, 15].

    Args:
      values: [n] by name, the fused_head.token_metrics of n tokens.
      groups: [n] int, the group of each token, below num_groups.
    """
    sums: Sums = {"target_tokens": np.bincount(groups, minlength=num_groups).astype(np.float64)}
    for name, value in values.items():
        if not name.endswith(("confidence", "correct")):
            sums[name] = np.bincount(groups, value, minlength=num_groups)
    for model in ("", "teacher_"):
        if f"{model}confidence" in values:
            confidence = values[f"{model}confidence"].astype(np.float64)
            known = np.nan_to_num(confidence)  # of NaN there is one message, about the sums
            bins = np.ceil(known * NUM_BINS).astype(np.int64) - 1  # upper edges belong to bins
            cells = groups * NUM_BINS + np.clip(bins, 0, NUM_BINS - 1)
            gap = confidence - values[f"{model}correct"]
            by_cell = np.bincount(cells, gap, minlength=num_groups * NUM_BINS)
            sums[f"{model}calibration"] = by_cell.reshape(num_groups, NUM_BINS)
    return sums


def accepted_length(acceptance: np.ndarray, documents: np.ndarray, proposed: int) -> np.ndarray:
    """Returns the expected tokens of a pass of the target model, [n]: 1 + a_1 + a_1 a_2 + ...

    The sum is over the `proposed` tokens from each token on, those of its document that are there;
    one token is the target's own (arXiv 2211.17192).

    Args:
      acceptance: [n] of consecutive target tokens, the chance that each one's draft is accepted.
      documents: [n] int, in order.
    """
    total, product = np.ones(len(acceptance)), np.ones(len(acceptance))
    for ahead in range(min(proposed, len(acceptance))):
        inside = np.zeros(len(acceptance), bool)
        inside[: len(inside) - ahead] = documents[ahead:] == documents[: len(documents) - ahead]
        product *= np.where(inside, np.roll(acceptance, -ahead), 0.0)
        total += product
    return total


def means(sums: Sums) -> Sums:
    """Returns scores, each with the leading shape of its sums; entropies and divergences in nats.

    ece = sum_b |sum over bin b of (confidence - correct)| / tokens (arXiv 1706.04599);
    entropy_gap = entropy - teacher_entropy.
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
    """Returns the scores of all tokens together."""
    values = means({name: value.sum(axis=0) for name, value in sums.items()})
    return {n: int(x) if n == "target_tokens" else float(x) for n, x in values.items()}


def by_position(sums: Sums) -> list[dict[str, float]]:
    """Returns the scores of each nonempty bucket of positions; bucket b is [2^b, 2^(b + 1))."""
    out = []
    for bucket in map(int, np.flatnonzero(sums["target_tokens"])):
        values = whole({name: value[bucket : bucket + 1] for name, value in sums.items()})
        named = {name: values[name] for name in NAMES if name in values}
        out.append({"start": 1 << bucket, "stop": 2 << bucket, **named})
    return out


def compare(sums: Sums, others: Sums, num_samples: int, seed: int) -> dict[str, dict[str, float]]:
    """Returns each score's difference, `sums` minus `others`, with its 95 % interval.

    The interval is the percentile interval of a paired bootstrap over documents: each sample draws
    documents with replacement, the same ones for both models, and divides their summed values.

    Args:
      sums, others: [D] or [D, 15] float64, of the same D documents in the same order.
    """
    rng = np.random.default_rng(seed)
    num_documents = len(sums["target_tokens"])
    batch = 100  # bounds the memory of [samples, D] counts
    samples = [
        _differences(sums, others, _draw(rng, min(batch, num_samples - first), num_documents))
        for first in range(0, num_samples, batch)
    ]
    theirs = whole(others)
    out: dict[str, dict[str, float]] = {}
    for name, observed in _differences(sums, others, np.ones((1, num_documents))).items():
        low, high = np.percentile(np.concatenate([part[name] for part in samples]), [2.5, 97.5])
        out[name] = {
            "value": theirs[name],
            "difference": float(observed[0]),
            "low": float(low),
            "high": float(high),
        }
    return out


def _draw(rng: np.random.Generator, num_samples: int, size: int) -> np.ndarray:
    """Returns the count of each of `size` documents in each sample, float64 [samples, D]."""
    drawn = rng.integers(0, size, (num_samples, size))
    cells = drawn + size * np.arange(num_samples)[:, None]
    counts = np.bincount(cells.ravel(), minlength=drawn.size).reshape(drawn.shape)
    return counts.astype(np.float64)  # for a BLAS product


def _differences(sums: Sums, others: Sums, counts: np.ndarray) -> Sums:
    """Returns differences of scores, [samples] each, for document counts [samples, D] float64."""
    ours, theirs = (
        means({name: counts @ value for name, value in some.items()}) for some in (sums, others)
    )
    compared = (n for n in NAMES if n in ours and n not in (*TEACHERS, "target_tokens"))
    return {name: ours[name] - theirs[name] for name in compared}


def describe(result: dict[str, Any]) -> str:
    """Returns the object that kd_jax.evaluate prints as lines and tables."""
    numbers = {n: x for n, x in result.items() if isinstance(x, int | float)}
    width = max(16, *(len(name) + 1 for name in numbers))
    lines = [f"{name:{width}}{x:.6g}" for name, x in numbers.items()]
    columns = [n for n in ("ce", "kl_forward", "top1_agreement", "ece") if n in result]
    lines += ["", "by position of the target token in its document", ""]
    lines.append("".join(f"{n:>16}" for n in ("positions", "target_tokens", *columns)))
    for row in result["by_position"]:
        place = f"{row['start']}-{row['stop'] - 1}"
        cells = "".join(f"{row[name]:16.6g}" for name in columns)
        lines.append(f"{place:>16}{row['target_tokens']:16}{cells}")
    if "against" in result:
        named = result["arguments"]
        lines += ["", f"{named['model']} minus {named['against']}, 95 % interval", ""]
        lines.append(f"{'':{width}}{'model':>12}{'against':>12}{'difference':>12}    interval")
        for name, row in result["against"].items():
            cells = "".join(f"{x:12.6g}" for x in (result[name], row["value"], row["difference"]))
            lines.append(f"{name:{width}}{cells}    [{row['low']:.6g}, {row['high']:.6g}]")
    return "\n".join(lines)
