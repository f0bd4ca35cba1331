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
        "kl_forward": kl(log_p, log_q),
        "kl_reverse": kl(log_q, log_p),
        "acceptance": np.minimum(np.exp(log_p), np.exp(log_q)).sum(-1),
    }
    return {name: float((value * mask).sum()) for name, value in values.items()}
