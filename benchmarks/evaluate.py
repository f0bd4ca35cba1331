"""`kd_jax.evaluate` beside a padded loop in torch: python -m benchmarks.evaluate --help.

Both score the same conversations with the same pair of models, each as a whole process: start,
loading and, but in the first round, programs from the compilation cache. Rounds alternate. Prints
seconds, medians over the rounds but the first, and both results, which must agree.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
LIMITS = {"float32": 1e-5, "bfloat16": 2e-2}
"""Largest difference of a mean, relative where it is above 1; torch rounds bfloat16 logits, kd_jax
does not."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("teacher", "student", "data", "out"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--conversations", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=8, help="conversations in a torch batch")
    parser.add_argument("--dtypes", nargs="+", choices=list(LIMITS), default=list(LIMITS))
    parser.add_argument("--rounds", type=int, default=4, help="the first one does not count")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    write_documents(args)
    for dtype in args.dtypes:
        compare(args, dtype)


def write_documents(args: argparse.Namespace) -> None:
    """Writes the conversations' tokens, and which have a loss, to OUT/documents.npz."""
    import numpy as np

    from kd_jax.config import DataConfig
    from kd_jax.data.chat import chat_template_of, load_tokenizer, tokenize
    from kd_jax.data.files import read_raw
    from kd_jax.data.records import make_record

    tokenizer = load_tokenizer(args.student)
    data = DataConfig(path=str(args.data))
    raw = read_raw(data.path, data.split, 0, args.conversations)
    template = chat_template_of(data, tokenizer)
    documents, problems = tokenize(tokenizer, [make_record(*one) for one in raw], template, data)
    assert not problems
    np.savez(
        args.out / "documents.npz",
        tokens=np.concatenate([x.tokens for x in documents]),
        target=np.concatenate([x.target for x in documents]),
        lengths=[len(x.tokens) for x in documents],
    )


def compare(args: argparse.Namespace, dtype: str) -> None:
    job = {
        "student": str(args.student),
        "teacher": str(args.teacher),
        "documents": str(args.out / "documents.npz"),
        "batch_size": args.batch_size,
        "dtype": dtype,
        "threads": len(os.sched_getaffinity(0)),
    }
    (args.out / "job.json").write_text(json.dumps(job))
    ours = ["-m", "kd_jax.evaluate", "--model", job["student"], "--teacher", job["teacher"]]
    ours += ["--data", str(args.data), "--max-conversations", str(args.conversations)]
    ours += ["--dtype", dtype, "--json"]
    arms = {
        "kd_jax": ours,
        "torch": [str(ROOT / "benchmarks" / "torch_evaluate.py"), str(args.out / "job.json")],
    }
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    found = {}
    for _ in range(args.rounds):
        for name, arguments in arms.items():
            start = time.perf_counter()
            command = [sys.executable, *arguments]
            done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
            seconds[name].append(time.perf_counter() - start)
            found[name] = json.loads(done.stdout.splitlines()[-1])
    medians = {name: statistics.median(some[1:] or some) for name, some in seconds.items()}
    for name, some in seconds.items():
        each = ", ".join(f"{x:.1f}" for x in some)
        print(f"{dtype}, {name}: {medians[name]:.1f} s ({each})")
    check(found["kd_jax"], found["torch"], LIMITS[dtype])
    rate = found["torch"]["target_tokens"] / medians["kd_jax"]
    ratio = medians["torch"] / medians["kd_jax"]
    print(f"{dtype}: kd_jax {ratio:.2f} times as fast, {rate:,.0f} target tokens/s")


def check(ours: dict, theirs: dict, limit: float) -> None:
    """Raises SystemExit if two results differ by more than the limit."""
    for name, value in theirs.items():
        gap = abs(ours[name] - value) / max(abs(value), 1)
        print(f"  {name}: kd_jax {ours[name]:.6g}, torch {value:.6g}, {gap:.1e} apart")
        if gap > limit:
            raise SystemExit(f"{name} differs")


if __name__ == "__main__":
    main()
