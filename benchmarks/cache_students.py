"""Students trained from each form of a teacher's cache, and how far each stays from the teacher.

python -m benchmarks.cache_students --out OUT --config FILE [--seeds 3] [flags of kd_jax.train]

OUT receives a cache of each form and results.jsonl. Every run starts from the same student; a seed
is an order of the data. Each student is measured on --eval.path with the exact cache, which equals
the live teacher. Prints the means over seeds with their standard errors, and the differences from
the student of the exact cache with the same seed. The same command repeats nothing finished.
"""

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from kd_jax.config import Config, UserError
from kd_jax.config.command import parse_args, parse_config, run_command
from kd_jax.config.flags import split_flags
from kd_jax.config.record import dump
from kd_jax.data.batches import count_steps
from kd_jax.inference import scores
from kd_jax.inference.cached import Data, Storage, make_cache, open_finished, with_live_teacher
from kd_jax.inference.evaluation import evaluate_rows
from kd_jax.reporting.tables import Metric, summary
from kd_jax.setup.cached import CachedTeacher
from kd_jax.setup.inputs import choose, row_source
from kd_jax.setup.models import Models, load_models
from kd_jax.setup.program import make_program
from kd_jax.setup.runtime import start_jax
from kd_jax.teachers.manifest import read_cache
from kd_jax.teachers.storage import token_bytes
from kd_jax.training.step import init_state, jit_train_step

EXACT = "exact"
FORMS = (EXACT, "int8", "float8", "topk 256", "topk 64", "topk 16", "sampled 64")
SHOWN = ("kl_forward", "ce", "top1_agreement")
NATS, PERCENT = Metric("", "nats", 4), Metric("", "%", 2, scale=100)


@dataclass(frozen=True, kw_only=True, slots=True)
class Args:
    out: str
    """Folder for the caches and the results."""
    seeds: int = 3
    """Runs of each form."""
    forms: tuple[str, ...] = FORMS
    """Forms to train from: exact, which must be among them, int8, float8, topk K, sampled K."""


def main(argv: Sequence[str]) -> None:
    own, flags = split_flags(Args, Config, argv)
    args = parse_args(Args, own, __doc__)
    config = with_live_teacher(parse_config(flags))
    if config.eval.path is None or EXACT not in args.forms:
        raise UserError(f"expected --eval.path, and --forms with {EXACT}")
    storages = {name: storage_of(name) for name in args.forms}
    start_jax(config.compilation_cache)
    for name, storage in storages.items():
        data = make_cache(config, folder(args, name), storage)
    config = choose(config, data.student.arch, data.teacher.arch, data.mesh)
    train_all(args, config, data)
    print(table(args))


def storage_of(form: str) -> Storage:
    kind, *k = form.split()
    if not k and kind in (EXACT, "int8", "float8"):
        return Storage(dtype="auto" if kind == EXACT else kind)
    if len(k) == 1 and kind in ("topk", "sampled") and k[0].isdecimal():
        return Storage(kind, k=int(k[0]))
    raise UserError(f"--forms: expected exact, int8, float8, 'topk K' or 'sampled K', got {form!r}")


def folder(args: Args, form: str) -> str:
    return str(Path(args.out) / form.replace(" ", ""))


def read_results(args: Args) -> list[dict[str, Any]]:
    file = Path(args.out) / "results.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def train_all(args: Args, config: Config, data: Data) -> None:
    """Trains and measures what is not finished: all forms with the first seed, then the next."""
    recipe = json.dumps(dump(config), sort_keys=True)
    record = Path(args.out) / "config.json"
    if record.exists() and record.read_text() != recipe:
        raise UserError(f"--out: {args.out} has results of another configuration. Give another")
    record.write_text(recipe)
    done = {(x["form"], x["seed"]) for x in read_results(args)}
    own = (data.identity, data.rows)
    cached = {name: open_finished(config, folder(args, name), *own) for name in args.forms}
    models = load_models(config, data.student, data.teacher, data.mesh, outputs="hidden")
    for seed in range(args.seeds):
        for name in (name for name in args.forms if (name, seed) not in done):
            start = time.perf_counter()
            student = train(replace(config, seed=seed), data, models, cached[name])
            result = measure(config, data, models, student, cached[EXACT])
            result |= {"form": name, "seed": seed, "seconds": time.perf_counter() - start}
            with open(Path(args.out) / "results.jsonl", "a") as out:
                print(json.dumps(result), file=out)
            print(f"{name}, seed {seed}: {result}", flush=True)


def train(config: Config, data: Data, models: Models, cached: CachedTeacher) -> Any:
    """Returns the weights of a student trained from a cache."""
    num_steps = count_steps(data.rows[0], config)
    models = replace(models, teacher_outputs=cached.kind)
    program = make_program(config, models, data.vocab_size, data.mesh, num_steps)
    state = init_state(program, jax.tree.map(jnp.copy, models.trainable))
    source = row_source(config, data.rows[0], data.mesh, 0, cached.train)
    step = jit_train_step(data.mesh, jax.tree.map(lambda x: x.sharding, state))
    for number in range(num_steps):
        batch = source(number, state)
        state, _ = step(program, state, models.frozen, models.teacher_arrays, batch)
    return state.trainable["student"]


def measure(
    config: Config, data: Data, models: Models, student: Any, exact: CachedTeacher
) -> dict[str, float]:
    """Returns scores of a student on the held-out rows, with the exact cache."""
    rows = data.rows[1]
    assert rows is not None
    program = make_program(config, models, data.vocab_size, data.mesh)
    arrays = (models.frozen | student, models.teacher_arrays)
    sums, _ = evaluate_rows(program, data.mesh, *arrays, rows, config, exact.held_out)
    whole = scores.whole(sums)
    return {name: whole[name] for name in (*SHOWN, "target_tokens")}


def table(args: Args) -> str:
    """Returns a table in Markdown of the finished runs."""
    runs: dict[str, dict[int, dict[str, Any]]] = {}
    for x in read_results(args):
        runs.setdefault(x["form"], {})[x["seed"]] = x
    names = ("KL(teacher ‖ student)", "less exact", "CE", "top-1 agreement, %")
    lines = [f"| form | bytes a token | seeds | {' | '.join(names)} |", "|---" * 7 + "|"]
    for form in (form for form in args.forms if form in runs):
        cache, found = read_cache(folder(args, form)), runs[form]
        assert cache is not None
        shared = sorted(found.keys() & runs[EXACT].keys())
        kl, ce, top1 = ([x[name] for x in found.values()] for name in SHOWN)
        less = [found[s]["kl_forward"] - runs[EXACT][s]["kl_forward"] for s in shared]
        cells = [form, f"{token_bytes(cache.fields):,}", str(len(found))]
        cells += [summary(kl, NATS, error=True)]
        gap = summary(less, NATS, error=True, sign=True)
        cells += ["–" if form == EXACT else gap.replace("\N{MINUS SIGN}", "-")]
        cells += [summary(ce, NATS, error=True), summary(top1, PERCENT, error=True)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(run_command(main))
