"""The loss and its metrics in float64 NumPy, straight from the definitions."""

import numpy as np


def log_softmax(z):
    z = z - z.max(axis=-1, keepdims=True)
    return z - np.log(np.exp(z).sum(axis=-1, keepdims=True))


def kl(log_a, log_b):
    """KL(a || b) of log-probabilities, nats."""
    a = np.exp(log_a)
    return np.where(a > 0, a * (log_a - log_b), 0).sum(-1)


def distil(student, teacher, labels, mask, *, kd_ratio=0.5, temperature=1.0):
    """Returns sums over unmasked tokens of loss and metrics; logits are [..., V]."""
    student, teacher = np.asarray(student, np.float64), np.asarray(teacher, np.float64)
    log_q, log_p = log_softmax(student), log_softmax(teacher)
    log_q_t, log_p_t = log_softmax(student / temperature), log_softmax(teacher / temperature)
    picked = np.asarray(labels)[..., None]
    ce = -np.take_along_axis(log_q, picked, -1)[..., 0]
    kd = kl(log_p_t, log_q_t)
    values = {
        "loss": (1 - kd_ratio) * ce + kd_ratio * kd,
        "ce_loss": ce,
        "kd_loss": kd,
        "teacher_entropy": -(np.exp(log_p_t) * log_p_t).sum(-1),
        "teacher_ce": -np.take_along_axis(log_p, picked, -1)[..., 0],
        "top1_agreement": student.argmax(-1) == teacher.argmax(-1),
    }
    return {name: float((value * mask).sum()) for name, value in values.items()}


def evaluate(student, teacher, labels, *, top_k=3):
    """Returns what an evaluation says of each token, [...]; logits are [..., V]."""
    student, teacher = np.asarray(student, np.float64), np.asarray(teacher, np.float64)
    log_q, log_p = log_softmax(student), log_softmax(teacher)
    picked = np.asarray(labels)[..., None]
    values = {
        "kl_forward": kl(log_p, log_q),
        "kl_reverse": kl(log_q, log_p),
        "top1_agreement": student.argmax(-1) == teacher.argmax(-1),
        "acceptance": np.minimum(np.exp(log_p), np.exp(log_q)).sum(-1),
    }
    for of, log in (("", log_q), ("teacher_", log_p)):
        values[f"{of}ce"] = -np.take_along_axis(log, picked, -1)[..., 0]
        values[f"{of}entropy"] = -(np.exp(log) * log).sum(-1)
        values[f"{of}confidence"] = np.exp(log).max(-1)
        values[f"{of}correct"] = log.argmax(-1) == labels
    first = [np.argsort(-log, axis=-1)[..., :top_k] for log in (log_q, log_p)]
    shared = [
        len(set(a) & set(b)) for a, b in zip(*(x.reshape(-1, top_k) for x in first), strict=True)
    ]
    values["topk_overlap"] = np.array(shared).reshape(values["ce"].shape) / top_k
    return values


def calibration_error(confidence, correct, num_bins=15):
    """Returns the expected calibration error, bin by bin as arXiv 1706.04599 (3) writes it."""
    error = 0.0
    for m in range(num_bins):
        inside = (confidence > m / num_bins) & (confidence <= (m + 1) / num_bins)
        if inside.any():
            gap = abs(correct[inside].mean() - confidence[inside].mean())
            error += inside.sum() / len(confidence) * gap
    return error
