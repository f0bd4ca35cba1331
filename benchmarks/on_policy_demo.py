"""On-policy students of the demo's language beside off-policy ones, at equal steps and equal time.

python -m benchmarks.on_policy_demo [--out runs/demo] [--seeds 3] [--steps 150] [--warm]

Runs kd_jax.demo in the folder first, unless it has. All students of a seed begin from the same
random weights, or with --warm from the demo's distilled student, and learn from the demo's few
examples or their questions. "Equal time" arms are off-policy with as many more steps as the
on-policy arm's steps took longer, by their median seconds. Prints means and standard errors over
seeds of the held-out KL in both directions, the cross-entropy, and the share of exact questions
that are answered right.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from kd_jax import demo
from kd_jax.reporting.tables import Metric, summary
from kd_jax.workdir.integrity import completion

ON = ("--on-policy.max-new-tokens", "16")
REVERSE, JSD = (("--loss.divergence", name) for name in ("reverse_kl", "jsd"))
HALF, ALL = (("--on-policy.fraction", share, *ON) for share in ("0.5", "1"))
RISING = ("--on-policy.fraction-end", "1", "--on-policy.schedule", "linear", *ON)
ARMS: dict[str, tuple[str, ...]] = {
    "off, forward KL": (),
    "off, reverse KL": REVERSE,
    "off, JSD": JSD,
    "lambda 0.5, forward KL": HALF,
    "lambda 1, forward KL": ALL,
    "lambda 0.5, reverse KL": (*HALF, *REVERSE),
    "lambda 1, reverse KL": (*ALL, *REVERSE),
    "lambda 0.5, JSD": (*HALF, *JSD),
    "lambda 1, JSD": (*ALL, *JSD),
    "lambda 0 to 1, reverse KL": (*RISING, *REVERSE),
}
# On-policy arms, each with the off-policy one that gets its time.
EQUAL_TIME = {
    "lambda 0.5, reverse KL": "off, reverse KL",
    "lambda 1, reverse KL": "off, reverse KL",
    "lambda 1, JSD": "off, JSD",
    "lambda 0.5, forward KL": "off, forward KL",
}
NATS = Metric("", "nats", 4)
SHOWN = {
    "kl_reverse": NATS, "kl_forward": NATS, "ce": NATS, "right": Metric("", "%", 1, scale=100)
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="runs/demo")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--warm", action="store_true")
    args = parser.parse_args()
    out = Path(args.out)
    demo.main(["--out", str(out), "--seeds", str(args.seeds)])
    found: dict[str, list[dict[str, float]]] = {}
    for seed in range(args.seeds):
        for name, flags in ARMS.items():
            values = run(out, seed, name, flags, args.steps, args.warm)
            found.setdefault(name, []).append(values)
        for name, base in EQUAL_TIME.items():
            times = (found[name][0]["step_seconds"], found[base][0]["step_seconds"])
            steps = round(args.steps * times[0] / times[1])
            more = run(out, seed, f"{base}, time of {name}", ARMS[base], steps, args.warm)
            found.setdefault(f"{base}, time of {name}", []).append(more)
        file = out / f"on_policy{'_warm' if args.warm else ''}.json"
        file.write_text(json.dumps(found, indent=1))
    print(table(found))
    return 0


def run(
    out: Path, seed: int, name: str, flags: Sequence[str], steps: int, warm: bool
) -> dict[str, float]:
    """Trains, exports and evaluates one student; a finished one is evaluated alone."""
    from kd_jax.train import main as train

    folder, teacher = out / f"seed{seed}", out / "teacher_hf"
    place = folder / f"{'warm ' if warm else ''}{name}".replace(",", "").replace(" ", "_")
    words = ["--config", str(demo.CONFIGS / "distil.py"), "--workdir", str(place)]
    words += ["--student.path", str(folder / ("distil_hf" if warm else "untouched"))]
    words += ["--data.path", str(folder / "few.jsonl"), "--teacher.path", str(teacher)]
    words += ["--eval.path", "None", "--seed", str(seed), "--steps", str(steps), *flags]
    words += ["--optim.learning-rate", "1e-3"] if warm else []
    with (out / demo.LOG).open("a", buffering=1) as log:
        stage = demo.Stage(out=out, console=Silent(), log=log)
        if not completion(place):
            with redirect_stdout(log):
                train(words)
        exported = demo.export(stage, place)
        demo.evaluate(stage, place, teacher)
    values = json.loads((place / "evaluation.json").read_text())
    lines = [json.loads(line) for line in (place / "metrics.jsonl").read_text().splitlines()]
    seconds = statistics.median(line["step_seconds"] for line in lines[10:])
    found = {x: values[x] for x in SHOWN if x in values} | {"right": demo.share_right(exported)}
    print(f"seed {seed}, {name}: {steps} steps, {seconds:.3f} s a step, {found}", flush=True)
    return found | {"step_seconds": seconds, "steps": steps}


class Silent:
    """A console that prints nothing."""

    def print(self, *_: Any, **__: Any) -> None:
        pass


def table(found: dict[str, list[dict[str, float]]]) -> str:
    """Returns means ± standard errors as a table in Markdown."""
    lines = [
        "| arm | steps | s a step | KL(student ‖ teacher) | KL(teacher ‖ student) | CE | right, % |"
    ]
    lines.append("| --- " * 7 + "|")
    for name, values in found.items():
        cells = [name, f"{values[0]['steps']}", f"{values[0]['step_seconds']:.3f}"]
        cells += [summary([x[n] for x in values], m, error=True) for n, m in SHOWN.items()]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
