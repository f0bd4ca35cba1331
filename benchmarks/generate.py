"""Greedy generation of kd_jax and transformers: tokens per second.

python benchmarks/generate.py FOLDER... [--dtypes float32 bfloat16] [--batches 1 8 32]

Both generate --tokens tokens after prompts of 32 tokens, in the same dtype and without early stop,
greedy or drawn at --temperature and --top-p. Rounds alternate after a warm-up. Prints medians of
new tokens per second, prefill included, and of the ratio of two neighbouring runs. Needs torch.
"""

import argparse
import platform
import statistics
import time
from pathlib import Path

import jax
import numpy as np

from kd_jax.config import MeshConfig
from kd_jax.inference.drawing import Sampling
from kd_jax.inference.load import load_unstacked, open_model
from kd_jax.inference.sampling import sample
from kd_jax.parallel.mesh import make_mesh
from kd_jax.setup.runtime import start_jax
from kd_jax.weights.files import read_json

PROMPT = 32


def ours(folder: Path, dtype: str, args: argparse.Namespace):
    """Returns a function from prompts to (seconds, new tokens)."""
    opened = open_model(str(folder), dtype)
    model = load_unstacked(opened, make_mesh(MeshConfig(), jax.device_count()))
    sampling = Sampling(temperature=args.temperature, top_p=args.top_p)

    def run(prompts):
        begin = time.perf_counter()
        found = sample(
            *model, prompts, keys=range(len(prompts)),
            max_new_tokens=args.tokens, sampling=sampling, batch_rows=len(prompts),
        )  # fmt: skip
        return time.perf_counter() - begin, [row.tolist() for row in found.tokens]

    return run


def theirs(folder: Path, dtype: str, args: argparse.Namespace):
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    options = {"max_new_tokens": args.tokens, "do_sample": False, "eos_token_id": None}
    if args.temperature:
        drawn = {"do_sample": True, "temperature": args.temperature, "top_k": 0}
        options |= drawn | {"top_p": args.top_p or 1.0}

    def run(prompts):
        ids = torch.tensor(prompts)
        begin = time.perf_counter()
        with torch.no_grad():
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **options
            )
        return time.perf_counter() - begin, out[:, PROMPT:].tolist()

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--top-p", type=float)
    args = parser.parse_args()
    start_jax(None)
    print(f"{platform.processor() or platform.machine()}, jax {jax.__version__}")
    rng = np.random.default_rng(0)
    for folder in args.folders:
        for dtype in args.dtypes:
            sides = {"kd_jax": ours(folder, dtype, args)}
            sides["transformers"] = theirs(folder, dtype, args)
            vocab_size = read_json(folder / "config.json")["vocab_size"]
            for batch in args.batches:
                prompts = rng.integers(1000, vocab_size, (batch, PROMPT)).tolist()
                found = {name: run(prompts)[1] for name, run in sides.items()}  # warm
                pairs = zip(*found.values(), strict=True)
                same = sum(ours == theirs for ours, theirs in pairs)
                rates: dict[str, list[float]] = {name: [] for name in sides}
                for _ in range(args.rounds):
                    for name, run in sides.items():
                        rates[name].append(batch * args.tokens / run(prompts)[0])
                middle = {name: statistics.median(values) for name, values in rates.items()}
                ratios = [x / y for x, y in zip(*rates.values(), strict=True)]
                print(
                    f"{folder.name} {dtype} batch {batch}: kd_jax {middle['kd_jax']:.1f}, "
                    f"transformers {middle['transformers']:.1f} tokens/s, "
                    f"ratio {statistics.median(ratios):.2f}, {same} rows with the same tokens",
                    flush=True,
                )


if __name__ == "__main__":
    main()
