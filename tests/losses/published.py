"""Writes published.json: losses and gradients of published implementations on the same logits.

    python tests/losses/published.py trl
    python tests/losses/published.py torchtune
    python tests/losses/published.py distillkit CLONE
    python tests/losses/published.py distillm CLONE/distillm
    python tests/losses/published.py abkd CLONE/distillation_llm/distillm

Each needs torch and the package or the clone's folder; the tests need neither. Values are means
over tokens. Gradients are those of the sum with respect to the student's logits.
"""

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

FILE = Path(__file__).with_suffix(".json")
TOKENS, V = 4, 17


def make_logits():
    """Returns student and teacher logits, [TOKENS, V] float64, standard deviation 2.5."""
    rng = np.random.default_rng(20)
    shared = rng.normal(size=(TOKENS, V))
    return tuple(2.5 * (0.6 * shared + 0.8 * rng.normal(size=(TOKENS, V))) for _ in range(2))


def of_trl():
    from trl.experimental.gkd.gkd_trainer import GKDTrainer

    run = GKDTrainer.generalized_jsd_loss
    for beta in (0, 0.1, 0.5, 0.9, 1):
        for T in (1.0, 2.0):
            loss = {"divergence": "jsd", "jsd_beta": beta, "temperature": T, "compat": "trl"}
            yield loss, lambda s, t, beta=beta, T=T: run(s, t, beta=beta, temperature=T)


def of_torchtune():
    import torch
    from torchtune.modules import loss as kd

    labels = torch.zeros(TOKENS, dtype=torch.long)
    kinds = {"forward_kl": kd.ForwardKLLoss(), "reverse_kl": kd.ReverseKLLoss()}
    for name, module in kinds.items():
        loss = {"divergence": name, "compat": "torchtune"}
        yield loss, lambda s, t, module=module: module(s, t, labels)
    for weight in (0.3, 0.5):
        loss = {"divergence": "symmetric_kl", "symmetric_weight": weight, "compat": "torchtune"}
        yield loss, lambda s, t, w=weight: kd.SymmetricKLLoss(w)(s, t, labels)


def of_distillkit():
    from distillkit.lossfuncs.jsd import JSDLoss
    from distillkit.lossfuncs.kl import KLDLoss
    from distillkit.lossfuncs.tvd import TVDLoss
    from distillkit.signals import DenseSignal
    from transformers.modeling_outputs import CausalLMOutput

    for name, kind in (("forward_kl", KLDLoss), ("jsd", JSDLoss), ("tvd", TVDLoss)):
        for T in (1.0, 3.0):
            loss = {"divergence": name, "temperature": T, "compat": "distillkit"}

            def run(s, t, kind=kind, T=T):
                teacher = DenseSignal(
                    logits=t[None], generation_temperature=1.0, hidden_states=None, vocab_size=V
                )
                return kind(T)(CausalLMOutput(logits=s[None]), teacher)

            yield loss, run


def of_distillm():
    """Its forward and skewed KL lack the teacher's entropy, as torchtune's."""
    import losses
    import torch

    batch = {"label": torch.zeros(1, TOKENS, dtype=torch.long)}

    def skewed_forward_kl(student, teacher, batch, lam):
        entropy = torch.distributions.Categorical(logits=teacher).entropy().mean()
        return losses.skewed_forward_kl(student, teacher, batch, lam) - entropy

    kinds = [
        ({"divergence": "forward_kl", "compat": "torchtune"}, losses.forward_kl, {}),
        ({"divergence": "reverse_kl"}, losses.reverse_kl, {}),
        ({"divergence": "symmetric_kl", "symmetric_weight": 0.1, "compat": "torchtune"},
         losses.symmetric_kl, {"lam": 0.9}),
        ({"divergence": "jsd", "jsd_beta": 0.1}, losses.js_distance, {"lam": 0.9}),
        ({"divergence": "tvd"}, losses.tv_distance, {}),
        ({"divergence": "skew_reverse_kl", "skew_alpha": 0.1}, losses.skewed_reverse_kl, {}),
        ({"divergence": "skew_forward_kl", "skew_alpha": 0.1}, skewed_forward_kl, {"lam": 0.1}),
    ]  # fmt: skip
    for loss, run, options in kinds:
        yield loss, lambda s, t, run=run, o=options: run(s[None], t[None], batch, **o)


def of_abkd():
    """Its adaptive KL baseline is the code of LLM_KD_AKL."""
    import losses
    import torch

    batch = {"label": torch.zeros(1, TOKENS, dtype=torch.long)}
    yield {"divergence": "adaptive_kl"}, lambda s, t: losses.AKL(t[None], s[None], batch)
    for alpha, beta in ((0.2, 0.7), (1, 0), (0, 1), (0.5, 0.5), (1.5, -0.5), (0, 0)):
        loss = {"divergence": "alpha_beta", "ab_alpha": alpha, "ab_beta": beta}
        yield loss, lambda s, t, a=alpha, b=beta: losses.ab_div(s[None], t[None], batch, a, b)


KINDS = {
    "trl": of_trl,
    "torchtune": of_torchtune,
    "distillkit": of_distillkit,
    "distillm": of_distillm,
    "abkd": of_abkd,
}


def measure(kind):
    """Yields the fields of LossConfig, the mean value, and the gradient of the sum."""
    import torch

    for loss, run in kind():
        student, teacher = (torch.tensor(x) for x in make_logits())
        student.requires_grad_()
        value = run(student, teacher)
        (value * TOKENS).backward()
        gradient = [[float(f"{x:.9g}") for x in row] for row in student.grad.tolist()]
        yield {"loss": loss, "value": value.item(), "gradient": gradient}


def main(name, folder=None):
    if folder is None:
        version = importlib.metadata.version(name)
    else:
        sys.path.insert(0, folder)
        command = ["git", "-C", folder, "rev-parse", "--short", "HEAD"]
        version = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    results = json.loads(FILE.read_text()) if FILE.exists() else {}
    results[name] = {"version": version, "cases": list(measure(KINDS[name]))}
    lines = ",\n".join(
        f"{json.dumps(key)}: {json.dumps(value)}" for key, value in sorted(results.items())
    )
    FILE.write_text("{\n" + lines + "\n}\n")


if __name__ == "__main__":
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    main(*sys.argv[1:])
