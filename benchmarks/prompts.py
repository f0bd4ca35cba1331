"""A system prompt distilled into the weights, on the demo's language.

python -m benchmarks.prompts OUT [--seeds 3] [--steps 50] [--base-steps 500] [--rank 16]

A base model learns the language plainly and, after the system message SYSTEM, as a sailor speaks
it. Students are this base with LoRA and never see the message. They learn from a few exchanges of
a sailor, once fine-tuned and once distilled from the base itself with the message (teacher.kind
base, teacher.system). Both are measured on held-out exchanges: cross-entropy, whose floor is known,
and KL(base with the message || student without it).

OUT receives the models, the runs and prompts.md, the printed table. The same command resumes.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from kd_jax.config.command import run_command
from kd_jax.demo import CONFIGS, NUM_FEW, NUM_HELD_OUT, NUM_MANY, VOCAB_SIZE
from kd_jax.reporting.tables import Metric, summary
from kd_jax.toy import grammar
from kd_jax.toy.models import make_tokenizer, write_llama
from kd_jax.weights.files import write_whole
from kd_jax.workdir.integrity import completion

SYSTEM = "You are a sailor. Speak as one."
SHAPE = {
    "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip
ROWS = ["--data.seq-len", "128", "--data.pack"]
METRICS = {
    "ce": Metric("", "nats", 4),
    "kl_forward": Metric("", "nats", 4),
    "top1_agreement": Metric("", "%", 1, scale=100),
}


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--base-steps", type=int, default=500)
    parser.add_argument("--rank", type=int, default=16)
    args = parser.parse_args(argv)
    start = time.perf_counter()
    held_out = grammar.draw(NUM_HELD_OUT, "held out")
    write(args.out / "held_out.jsonl", [record(q, sailor(a)) for q, a in held_out])
    tokenizer, base = make_base(args.out, args.base_steps)
    floor = grammar.realised_floor(held_out, lambda a: len(tokenizer.encode(sailor(a))) + 1)
    arms: dict[str, list[dict[str, float]]] = {}
    arms["untouched"] = [measure(args.out, base, base, "untouched.json")]
    for seed in range(args.seeds):
        for name, values in learn(args, base, seed).items():
            arms.setdefault(name, []).append(values)
    prompted = arms["untouched"][0]["teacher_ce"]
    text = table(arms, floor, prompted)
    write_whole(args.out / "prompts.md", text)
    print(text)
    print(
        f"{time.perf_counter() - start:.0f} s, results of an earlier command reused",
        file=sys.stderr,
    )


def sailor(answer: str) -> str:
    """Returns an answer as a sailor says it."""
    return f"Aye, {answer[0].lower()}{answer[1:-1]}, matey!"


def record(question: grammar.Question, answer: str, **more: str) -> dict[str, str]:
    return {"instruction": question.instruction, "input": "", "output": answer, **more}


def write(file: Path, records: list[dict[str, str]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, "".join(json.dumps(x) + "\n" for x in records))


def make_base(out: Path, steps: int) -> tuple[Any, Path]:
    """Returns the tokenizer and the exported base, which speaks both ways."""
    drawn = grammar.draw(NUM_MANY, "many")
    pairs = [(q.instruction, a) for q, a in drawn]
    pairs += [(q, sailor(a)) for q, a in pairs[: len(pairs) // 2]]
    tokenizer = make_tokenizer([*pairs, (SYSTEM, "system")], VOCAB_SIZE)
    first, workdir, base = out / "first", out / "base", out / "base_hf"
    if not first.exists():
        write_llama(first, tokenizer, seed=1000, **SHAPE)
    plain = [record(q, a) for q, a in drawn[::2]]
    write(out / "many.jsonl", plain + [record(q, sailor(a), system=SYSTEM) for q, a in drawn[1::2]])
    flags = ["--student.path", first, "--steps", steps]
    train(CONFIGS / "teacher.py", workdir, out, out / "many.jsonl", flags)
    if not base.exists():
        from convert.to_hf import main

        call(main, ["--workdir", workdir, "--out", base])
    return tokenizer, base


def learn(args: argparse.Namespace, base: Path, seed: int) -> dict[str, dict[str, float]]:
    """Returns the scores of one seed's students, fine-tuned and distilled."""
    folder, found = args.out / f"seed{seed}", {}
    few = folder / "few.jsonl"
    write(few, [record(q, sailor(a)) for q, a in grammar.draw(NUM_FEW, f"few {seed}")])
    own = ["--teacher.kind", "base", "--teacher.system", SYSTEM, "--loss.kd-ratio", 1]
    lora = ["--trainable", "lora", "--lora.rank", args.rank, "--lora.alpha", 2 * args.rank]
    for name, flags in {"fine-tuned": [], "distilled from itself": own}.items():
        workdir = folder / name.partition(" ")[0]
        flags = [*flags, *lora, "--student.path", base, "--steps", args.steps, "--seed", seed]
        train(CONFIGS / "finetune.py", workdir, args.out, few, flags)
        found[name] = measure(args.out, workdir, base, f"seed{seed}/{workdir.name}.json")
    return found


def train(config: Path, workdir: Path, out: Path, data: Path, flags: list[Any]) -> None:
    from kd_jax.train import main

    if completion(workdir):
        return
    words = ["--config", config, "--workdir", workdir, "--data.path", data, *ROWS]
    call(main, [*words, "--eval.path", out / "held_out.jsonl", *flags])


def measure(out: Path, model: Path, base: Path, name: str) -> dict[str, float]:
    """Returns the scores of kd_jax.evaluate on the held-out exchanges, by the prompted base."""
    from kd_jax.evaluate import main

    if not (out / name).is_file():
        words = ["--model", model, "--teacher", base, "--teacher-system", SYSTEM]
        words += ["--data", out / "held_out.jsonl", "--dtype", "float32", "--seq-len", 128]
        call(main, [*words, "--batch-size", 16, "--out", out / name])
    return json.loads((out / name).read_text())


def call(command: Any, words: list[Any]) -> None:
    with redirect_stdout(sys.stderr):
        command([str(word) for word in words])


def table(arms: dict[str, list[dict[str, float]]], floor: float, prompted: float) -> str:
    """Returns means over seeds with their standard errors, as Markdown."""
    lines = [
        "| student, without the message | CE, nats | KL(base with it \\|\\| student), nats "
        "| Top-1 agreement, % |",
        "| --- | --- | --- | --- |",
    ]
    for name, rows in arms.items():
        cells = [summary([row[n] for row in rows], m, error=True) for n, m in METRICS.items()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines.append(f"| base with the message | {prompted:.4f} | 0.0000 | 100.0 |")
    return "\n".join(lines) + f"\n\nEntropy of the held-out answers: {floor:.4f} nats a token.\n"


if __name__ == "__main__":
    sys.exit(run_command(main))
