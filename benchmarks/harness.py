"""lm-eval with the kd_jax model and with its own `hf` model: examples per second.

python -m benchmarks.harness FOLDER DATA.json [--examples 200] [--rounds 2] [--dtype bfloat16]

DATA is a JSON list of Alpaca records, such as GSM8K. The task is multiple choice: a record's
question with its own output and those of three others. `hf` runs with the fastest batch size of 1,
8 and 16, measured on the first examples. Rounds alternate between the models and time the whole
task, tokenization included. The first round of kd_jax compiles and is printed separately.
"""

import argparse
import json
import os
import platform
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ["HF_DATASETS_OFFLINE"] = os.environ["HF_HUB_OFFLINE"] = "1"

import jax
import lm_eval
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from kd_jax.inference.lm_eval_model import KdJaxLM

TASK = """
task: four_answers
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
test_split: test
output_type: multiple_choice
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_target: label
doc_to_choice: choices
metric_list:
  - metric: acc
"""
BATCH_SIZES = (1, 8, 16)
PROBED = 16  # examples that determine hf's batch size


def write_task(folder: Path, data: Path, num_examples: int) -> None:
    rng = random.Random(0)
    records = json.loads(data.read_text())
    examples = []
    for record in records[:num_examples]:
        answers = [record["output"], *(x["output"] for x in rng.sample(records, 3))]
        label = rng.randrange(4)
        answers[0], answers[label] = answers[label], answers[0]
        choices = [f" {answer}" for answer in answers]
        examples.append({"question": record["instruction"], "choices": choices, "label": label})
    (folder / "data.json").write_text(json.dumps(examples))
    (folder / "task.yaml").write_text(TASK.format(data=folder / "data.json"))


def run(model: Any, manager: TaskManager, limit: int) -> tuple[float, dict[str, Any]]:
    """Returns a model's seconds for the first `limit` examples, and lm-eval's results."""
    start = time.perf_counter()
    result = lm_eval.simple_evaluate(
        model, tasks=["four_answers"], task_manager=manager, limit=limit, bootstrap_iters=0
    )
    return time.perf_counter() - start, result


def scores(result: dict[str, Any]) -> list[float]:
    samples = result["samples"]["four_answers"]
    return [float(value) for sample in samples for value, _ in sample["filtered_resps"]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--examples", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        write_task(Path(scratch), args.data, args.examples)
        manager = TaskManager(include_path=scratch)
        options = {"dtype": args.dtype, "device": "cpu"}
        hf = HFLM(pretrained=str(args.folder), **options)
        probes = {}
        for size in BATCH_SIZES:
            hf.batch_size_per_gpu = size
            probes[size] = PROBED / run(hf, manager, PROBED)[0]
            print(f"hf, batch size {size}: {probes[size]:.2f} examples/s", flush=True)
        hf.batch_size_per_gpu = max(probes, key=lambda size: probes[size])
        ours = KdJaxLM(str(args.folder), dtype=args.dtype, compilation_cache=None)
        first, _ = run(ours, manager, args.examples)
        rates: dict[str, list[float]] = {"hf": [], "kd_jax": []}
        for _ in range(args.rounds):
            for name, model in (("hf", hf), ("kd_jax", ours)):
                seconds, result = run(model, manager, args.examples)
                rates[name].append(args.examples / seconds)
                print(f"{name}: {rates[name][-1]:.2f} examples/s", flush=True)
                if name == "hf":
                    want = scores(result)
        gaps = [abs(a - b) for a, b in zip(scores(result), want, strict=True)]
    device = jax.devices()[0].device_kind
    print(f"{platform.machine()}, {device}, {args.dtype}, {args.examples} examples, 4 answers each")
    medians = {name: statistics.median(some) for name, some in rates.items()}
    print(f"hf      {medians['hf']:8.2f} examples/s, batch size {hf.batch_size_per_gpu}")
    print(f"kd_jax  {medians['kd_jax']:8.2f} examples/s")
    print(f"kd_jax  {args.examples / first:8.2f} examples/s in its first round, which compiles")
    print(f"ratio   {medians['kd_jax'] / medians['hf']:8.2f}")
    print(f"largest difference of a log-likelihood {max(gaps):.2g}, of {max(map(abs, want)):.5g}")


if __name__ == "__main__":
    main()
