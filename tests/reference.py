"""The loss and its metrics in float64 NumPy, from the definitions."""

import numpy as np


def log_softmax(z):
    z = z - z.max(axis=-1, keepdims=True)
    return z - np.log(np.exp(z).sum(axis=-1, keepdims=True))


def kl(log_a, log_b):
    """KL(a || b) = sum_v exp(a) (a - b) of log-probabilities, nats."""
    a = np.exp(log_a)
    return np.where(a > 0, a * (log_a - log_b), 0).sum(-1)


def divergence(name, student, teacher, *, temperature=1.0, weight=None, **options):
    """Returns the divergence of each token [...] from its definition; logits are [..., V].

    Args:
      weight: weight of the forward KL in adaptive_kl and lk_hybrid, constant in its gradient.
      options: fields of LossConfig.
    """
    log_q, log_p = (
        log_softmax(np.asarray(z, np.float64) / temperature) for z in (student, teacher)
    )
    q, p = np.exp(log_q), np.exp(log_p)
    forward, reverse = kl(log_p, log_q), kl(log_q, log_p)
    if name == "forward_kl":
        return forward
    if name == "reverse_kl":
        return reverse
    if name == "symmetric_kl":
        weight = options.get("symmetric_weight", 0.5)
        return weight * forward + (1 - weight) * reverse
    if name in ("jsd", "jsd_cross"):
        beta = options.get("jsd_beta", 0.5)
        if beta in (0, 1):
            return reverse if beta else forward
        of_teacher, of_student = (kl(x, np.log(beta * p + (1 - beta) * q)) for x in (log_p, log_q))
        weight = beta if name == "jsd" else 1 - beta
        return weight * of_teacher + (1 - weight) * of_student
    if name == "skew_forward_kl":
        alpha = options.get("skew_alpha", 0.1)
        return kl(log_p, np.log(alpha * p + (1 - alpha) * q))
    if name == "skew_reverse_kl":
        alpha = options.get("skew_alpha", 0.1)
        return kl(log_q, np.log((1 - alpha) * p + alpha * q))
    if name == "tvd":
        return 1 - np.minimum(p, q).sum(-1)
    if name == "adaptive_kl":
        if weight is None:
            weight = adaptive_weight(q, p, options.get("akl_mass", 0.5))
        return weight * forward + (1 - weight) * reverse
    if name == "nla":
        return -np.log(np.minimum(p, q).sum(-1))
    if name == "lk_hybrid":
        weight = hybrid_weight(q, p) if weight is None else weight
        return weight * forward + (1 - weight) * np.abs(p - q).sum(-1) / 2
    assert name == "alpha_beta"
    return alpha_beta(q, p, options.get("ab_alpha", 0.2), options.get("ab_beta", 0.7))


def adaptive_weight(q, p, mass):
    """Returns the forward KL's weight in adaptive_kl, by sorting (arXiv 2404.02657)."""
    order = np.argsort(-p, axis=-1, kind="stable")
    p, q = (np.take_along_axis(x, order, -1) for x in (p, q))
    head = np.cumsum(p, axis=-1) <= mass
    head[..., 0] = True
    error = np.abs(p - q)
    return (error * head).sum(-1) / error.sum(-1)


def hybrid_weight(q, p):
    """Returns the forward KL's weight in lk_hybrid (arXiv 2602.23881)."""
    return np.exp(-3 * np.minimum(p, q).sum(-1))


def alpha_beta(q, p, A, B):
    """Returns the alpha-beta divergence and its limits, as in doi 10.3390/e13010134."""
    if A == 0 and B == 0:
        return ((np.log(p) - np.log(q)) ** 2).sum(-1) / 2
    if A == 0:
        return (q**B * np.log(q**B / p**B) - q**B + p**B).sum(-1) / B**2
    if B == 0:
        return (p**A * np.log(p**A / q**A) - p**A + q**A).sum(-1) / A**2
    if A + B == 0:
        return (np.log(q**A / p**A) + p**A / q**A - 1).sum(-1) / A**2
    terms = p**A * q**B - A / (A + B) * p ** (A + B) - B / (A + B) * q ** (A + B)
    return -terms.sum(-1) / (A * B)


def distil(
    student,
    teacher,
    labels,
    mask,
    *,
    kd_ratio=0.5,
    temperature=1.0,
    scale=1.0,
    divergence_name="forward_kl",
    **options,
):
    """Returns sums over unmasked tokens of loss and metrics; logits are [..., V].

    Args:
      scale: factor of the divergence.
      options: arguments of `divergence`.
    """
    student, teacher = np.asarray(student, np.float64), np.asarray(teacher, np.float64)
    options["temperature"] = temperature
    kd = scale * divergence(divergence_name, student, teacher, **options)
    values = evaluate(student, teacher, labels, top_k=1)
    ce = values["ce"]
    values |= {"loss": (1 - kd_ratio) * ce + kd_ratio * kd, "ce_loss": ce, "kd_loss": kd}
    return {name: float((value * mask).sum()) for name, value in values.items()}


def evaluate(student, teacher, labels, *, top_k=3):
    """Returns the evaluation metrics of each token, [...]; logits are [..., V]."""
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
    """Returns the expected calibration error, bin by bin as in arXiv 1706.04599 (3)."""
    error = 0.0
    for m in range(num_bins):
        inside = (confidence > m / num_bins) & (confidence <= (m + 1) / num_bins)
        if inside.any():
            gap = abs(correct[inside].mean() - confidence[inside].mean())
            error += inside.sum() / len(confidence) * gap
    return error
