"""A student untouched, fine-tuned and distilled, compared on held-out text.

python -m benchmarks.quality TEACHER STUDENT DATA OUT [--steps 60] [any flag of kd_jax.train]

DATA is a JSON list of Alpaca records. STUDENT is a model's folder; if it is not there, TEACHER's
--layers, by default every second, are written to it. Every run starts from --config with the flags
given.

Arms, for all weights and for LoRA: fine-tuned (kd_ratio 0) and distilled (0.5 and 1) for the same
steps, and fine-tuned for the steps that cost as many FLOPs as distillation (kd_jax.planning.cost).
Fine-tuning and distillation each have the learning rate with which they (distillation with kd_ratio
0.5) reach the lowest cross-entropy on validation records in --search-steps. Training, validation
and held-out records are disjoint.

OUT receives the runs, report/index.html, and quality.md, the printed tables. The same command
resumes and repeats nothing that is finished.
"""

import argparse
import itertools
import json
import random
import re
import shlex
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from kd_jax.config import UserError
from kd_jax.config.command import parse_config, run_command
from kd_jax.config.flags import flag_name
from kd_jax.inference.arguments import EvaluateArgs
from kd_jax.inference.comparison import measure, summarise
from kd_jax.inference.scores import Sums, compare, whole
from kd_jax.planning.cost import step_flops
from kd_jax.reporting.page import make_report
from kd_jax.reporting.tables import METRICS, Metric, Table, costs, number
from kd_jax.weights.export import copy_extra_files, new_folder
from kd_jax.weights.files import read_json, write_whole
from kd_jax.weights.folder import load_architecture, resolve
from kd_jax.weights.safetensors import open_folder
from kd_jax.workdir.history import read_run
from kd_jax.workdir.integrity import completion

SCORES = ("ce", "kl_forward", "top1_agreement", "acceptance")
COMPARED = ("ce", "kl_forward")
NOTE = (
    "Means over seeds, per target token of the held-out records. Less control: difference from "
    "fine-tuning with equal compute of the same kind, over the seeds of both, with the 95 % "
    "interval of a paired bootstrap over records, which leaves out the spread between seeds."
)
TASK = Metric("Four answers", "%", 1, scale=100)
KINDS = {"full": "all weights", "lora": "LoRA"}
DOCUMENTS = "documents.npz"
CONTROL = "fine-tuned, equal compute"
LAYER = re.compile(r"(model\.layers\.)(\d+)(\..*)")


@dataclass(frozen=True, kw_only=True, slots=True)
class Arm:
    name: str
    kind: str
    kd_ratio: float
    steps: int
    learning_rate: float
    flops: float
    """FLOPs of one step."""

    @property
    def folder(self) -> str:
        return re.sub(r"[, ]+", "-", f"{self.kind} {self.name}")


@dataclass(kw_only=True, slots=True)
class Row:
    """Results of an arm, or of a model that was not trained (`arm` None)."""

    arm: Arm | None = None
    name: str
    sums: dict[int, Sums] = field(default_factory=dict)
    """Sums over the held-out documents, by seed."""
    right: list[float] = field(default_factory=list)
    """Shares of right answers in the lm-eval task, one a seed."""


def main(argv: Sequence[str]) -> None:
    args, flags = parse(argv)
    args.teacher = str(resolve(args.teacher, "TEACHER"))
    if not args.student.exists():
        keep_layers(Path(args.teacher), args.student, args.layers)
    claim(args)
    split_records(args)
    table = make_table(compare_arms(args, flags))
    runs = sorted(path.parent for path in args.out.glob("runs/*/evaluation.json"))
    write_whole(args.out / "quality.md", f"{markdown(table)}\n\n{markdown(shorten(table))}\n")
    print(f"\n{(args.out / 'quality.md').read_text()}")
    if runs:
        title = "A student fine-tuned and distilled"
        print(make_report(runs, args.out / "report", title=title, extra=[table]))


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Returns the benchmark's own arguments, and the flags for every run of kd_jax.train."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form, allow_abbrev=False)
    parser.add_argument("teacher", help="folder or hub id")
    parser.add_argument("student", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", type=int, nargs="+", help="of TEACHER, from 0, for STUDENT")
    parser.add_argument("--config", default="configs/smollm2_135m_to_80m.py")
    parser.add_argument("--steps", type=int, default=60, help="of the arms of equal steps")
    parser.add_argument("--full-seeds", type=int, default=3, help="0: no arms of this kind")
    parser.add_argument("--lora-seeds", type=int, default=3, help="0: no arms of this kind")
    parser.add_argument("--full-rates", type=float, nargs="+", default=[3e-4, 1e-3, 3e-3])
    parser.add_argument("--lora-rates", type=float, nargs="+", default=[1e-3, 3e-3, 1e-2])
    parser.add_argument("--search-steps", type=int, default=20)
    parser.add_argument("--held-out", type=int, default=200, help="records")
    parser.add_argument("--validation", type=int, default=50, help="records")
    parser.add_argument("--examples", type=int, default=50, help="of the lm-eval task; 0: no task")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--finished-only", action="store_true", help="leave out unfinished arms")
    return parser.parse_known_args(argv)


def keep_layers(teacher: Path, student: Path, layers: Sequence[int] | None = None) -> None:
    """Writes a model with some of the teacher's layers, by default every second, and the rest."""
    from safetensors.numpy import save_file

    config = read_json(teacher / "config.json")
    count = config["num_hidden_layers"]
    kept = sorted(range(0, count, 2) if layers is None else set(layers))
    if not kept or kept[0] < 0 or kept[-1] >= count:
        raise UserError(f"--layers: expected layers from 0 to {count - 1}, got {layers}")
    config["num_hidden_layers"] = len(kept)
    if config.get("layer_types"):
        config["layer_types"] = [config["layer_types"][i] for i in kept]
    tensors = {}
    for name, tensor in open_folder(teacher).items():
        found = LAYER.fullmatch(name)
        if found and int(found[2]) not in kept:
            continue
        index = found and kept.index(int(found[2]))
        tensors[f"{found[1]}{index}{found[3]}" if found else name] = tensor.read()
    with new_folder(student) as place:
        save_file(tensors, place / "model.safetensors", metadata={"format": "pt"})
        write_whole(place / "config.json", json.dumps(config, indent=2))
        copy_extra_files(teacher, place)


def claim(args: argparse.Namespace) -> None:
    """Makes OUT, or checks that it holds results of the same models, records and dtype."""
    names = ("teacher", "student", "data", "held_out", "validation", "dtype")
    wanted = {name: str(getattr(args, name)) for name in names}
    file = args.out / "quality.json"
    before = read_json(file) if file.is_file() else wanted
    for name in (name for name in names if before.get(name) != wanted[name]):
        raise UserError(
            f"OUT: expected {args.out} to be new or of {name} {wanted[name]}, got results of "
            f"{before.get(name)}. Give another OUT"
        )
    args.out.mkdir(parents=True, exist_ok=True)
    write_whole(file, json.dumps(wanted) + "\n")


def split_records(args: argparse.Namespace) -> None:
    """Writes OUT/{held_out,validation,train}.json: disjoint records in an order drawn once."""
    records = {record["instruction"]: record for record in json.loads(args.data.read_text())}
    found = list(records.values())  # of equal questions only the last
    random.Random(0).shuffle(found)
    first, second = args.held_out, args.held_out + args.validation
    parts = {"held_out": found[:first], "validation": found[first:second], "train": found[second:]}
    for name, part in parts.items():
        if not part:
            raise UserError(f"DATA: expected more than {second} records, got {len(found)}")
        write_whole(args.out / f"{name}.json", json.dumps(part))


def compare_arms(args: argparse.Namespace, flags: Sequence[str]) -> list[Row]:
    """Trains and evaluates what is not finished; returns the results of all arms and models."""
    untouched = Row(name="untouched")
    untouched.sums[0] = evaluate(args, flags, args.student, args.out / "untouched")
    untouched.right = answer(args, args.student, args.out / "untouched")
    teacher = Row(name="teacher", sums={0: as_teacher(untouched.sums[0])})
    teacher.right = answer(args, args.teacher, args.out / "teacher")
    rows: dict[str, Row] = {}
    for kind, num_seeds in {"full": args.full_seeds, "lora": args.lora_seeds}.items():
        arms = make_arms(args, flags, kind) if num_seeds else []
        for seed, arm in itertools.product(range(num_seeds), arms):
            workdir = args.out / "runs" / f"{arm.folder}-seed{seed}"
            if args.finished_only and not (workdir / DOCUMENTS).is_file():
                continue
            train(arm_words(args, flags, arm, seed, workdir), workdir)
            row = rows.setdefault(arm.folder, Row(arm=arm, name=arm.name))
            row.sums[seed] = evaluate(args, flags, workdir, workdir)
            row.right += answer(args, workdir, workdir)
    return [untouched, *rows.values(), teacher]


def make_arms(args: argparse.Namespace, flags: Sequence[str], kind: str) -> list[Arm]:
    """Returns the arms of a kind, fine-tuned and distilled with the rates that were found best."""
    rates = {ratio: search(args, flags, kind, ratio) for ratio in (0.0, 0.5)}
    plain, distilled = (step_cost(args, flags, kind, ratio) for ratio in rates)
    longer = round(args.steps * distilled / plain)
    print(f"a step with the teacher costs {distilled / plain:.3f} times the FLOPs: {longer} steps")

    def arm(name: str, kd_ratio: float, steps: int) -> Arm:
        rate, flops = (rates[0.5], distilled) if kd_ratio else (rates[0.0], plain)
        options = {"kind": kind, "learning_rate": rate, "flops": flops}
        return Arm(name=name, kd_ratio=kd_ratio, steps=steps, **options)

    return [
        arm("fine-tuned, equal steps", 0.0, args.steps),
        arm(CONTROL, 0.0, longer),
        arm("distilled, kd_ratio 0.5", 0.5, args.steps),
        arm("distilled, kd_ratio 1", 1.0, args.steps),
    ]


def search(args: argparse.Namespace, flags: Sequence[str], kind: str, kd_ratio: float) -> float:
    """Returns the learning rate with the lowest cross-entropy on validation records."""
    found: dict[float, float] = {}
    for rate in getattr(args, f"{kind}_rates"):
        words, workdir = search_run(args, flags, kind, kd_ratio, rate)
        train([*words, "--eval.path", str(args.out / "validation.json")], workdir)
        found[rate] = read_run(workdir).held_out["ce"].iloc[-1]
    rate = min(found, key=lambda rate: found[rate])
    shown = ", ".join(f"{rate:g}: {ce:.3f}" for rate, ce in found.items())
    print(f"{KINDS[kind]}, kd_ratio {kd_ratio:g}: validation CE by rate: {shown}; taken {rate:g}")
    return rate


def search_run(
    args: argparse.Namespace, flags: Sequence[str], kind: str, kd_ratio: float, rate: float
) -> tuple[list[str], Path]:
    """Returns the flags and the workdir of a run of the search."""
    options = {"kind": kind, "kd_ratio": kd_ratio, "steps": args.search_steps, "flops": 0.0}
    arm = Arm(name=f"search {kd_ratio:g} {rate:g}", learning_rate=rate, **options)
    workdir = args.out / "search" / arm.folder
    return arm_words(args, flags, arm, 0, workdir), workdir


def step_cost(args: argparse.Namespace, flags: Sequence[str], kind: str, kd_ratio: float) -> float:
    """Returns the FLOPs of an optimizer step with the target tokens that the search had."""
    rate = getattr(args, f"{kind}_rates")[0]
    words, workdir = search_run(args, flags, kind, kd_ratio, rate)
    config, run = parse_config(words), read_run(workdir)
    num_targets = costs(run)["target_tokens"] / run.last_step
    student, teacher = (load_architecture(Path(path)) for path in (args.student, args.teacher))
    num_tokens = config.data.batch_size * config.data.seq_len
    flops, _ = step_flops(config, student, teacher if kd_ratio else None, num_tokens, num_targets)
    return flops


def arm_words(
    args: argparse.Namespace, flags: Sequence[str], arm: Arm, seed: int, workdir: Path
) -> list[str]:
    """Returns the flags of kd_jax.train for a run.

    Raises:
      UserError: the user's flags set what an arm sets.
    """
    values = {
        "config": args.config,
        "teacher.path": args.teacher,
        "student.path": args.student,
        "data.path": args.out / "train.json",
        "data.split": "train",
        "eval.split": "train",
        "workdir": workdir,
        "trainable": arm.kind,
        "loss.kd-ratio": arm.kd_ratio,
        "optim.learning-rate": arm.learning_rate,
        "steps": arm.steps,
        "seed": seed,
    }
    for name in values.keys() & set(map(flag_name, flags)):
        raise UserError(f"--{name}: expected the value of each arm, got one for all. Leave it out")
    return [word for name, x in values.items() for word in (f"--{name}", str(x))] + [*flags]


def train(words: Sequence[str], workdir: Path) -> None:
    """Runs kd_jax.train, unless the workdir holds the finished run."""
    from kd_jax.train import main

    if completion(workdir):
        return
    print(f"$ python -m kd_jax.train {shlex.join(words)}", flush=True)
    start = time.perf_counter()
    main(words)
    print(f"{workdir.name}: {time.perf_counter() - start:.0f} s", flush=True)
    if not completion(workdir):
        raise KeyboardInterrupt  # after SIGTERM training saves and returns


def evaluate(args: argparse.Namespace, flags: Sequence[str], model: Path, folder: Path) -> Sums:
    """Returns a model's sums over the held-out documents, which FOLDER/documents.npz keeps."""
    file = folder / DOCUMENTS
    if not file.is_file():
        config = parse_config(["--config", args.config, *flags])
        options = EvaluateArgs(
            model=str(model),
            teacher=args.teacher,
            data=str(args.out / "held_out.json"),
            dtype=args.dtype,
            seq_len=config.data.seq_len,
            batch_size=8,
        )
        measured = measure(options)
        folder.mkdir(parents=True, exist_ok=True)
        result = summarise(options, measured)
        write_whole(folder / "evaluation.json", json.dumps(result) + "\n")
        with open(folder / "part.npz", "wb") as out:
            np.savez(out, **measured.documents)
        (folder / "part.npz").replace(file)
        print(f"{folder.name}: " + ", ".join(f"{n} {result[n]:.4f}" for n in SCORES), flush=True)
    with np.load(file) as stored:
        return dict(stored)


def as_teacher(sums: Sums) -> Sums:
    """Returns the sums that the teacher would have if it were evaluated against itself."""
    count = sums["target_tokens"]
    agrees = {"top1_agreement": count, "acceptance": count, "kl_forward": np.zeros_like(count)}
    return {"ce": sums["teacher_ce"], "target_tokens": count, **agrees}


def answer(args: argparse.Namespace, model: str | Path, folder: Path) -> list[float]:
    """Returns the model's share of right answers in the task, or nothing if there is no task."""
    if not args.examples:
        return []
    file, task = folder / "lm_eval.json", args.out / "task"
    if not file.is_file():
        from benchmarks.harness import write_task  # imports torch
        from kd_jax.lm_eval import LmEvalArgs, run_tasks

        task.mkdir(exist_ok=True)
        write_task(task, args.out / "held_out.json", args.examples)
        options = LmEvalArgs(
            model=str(model), tasks="four_answers", include_path=str(task), dtype=args.dtype
        )
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(file, json.dumps(run_tasks(options)["results"]["four_answers"], default=str))
    return [float(read_json(file)["acc,none"])]


def make_table(rows: Sequence[Row]) -> Table:
    """Returns a row for each arm and model: means over seeds, and differences with intervals."""
    controls = {row.arm.kind: row for row in rows if row.arm and row.arm.name == CONTROL}
    metrics = [METRICS[name] for name in SCORES]
    cells = []
    for row in rows:
        control = controls.get(row.arm.kind) if row.arm and row.arm.name != CONTROL else None
        cells.append([*describe(row), *score_cells(row), *difference_cells(row, control)])
    names = ["student", "trained", "learning rate", "steps", "TFLOP", "seeds"]
    names += [metric.heading for metric in (*metrics, TASK)]
    names += [f"{METRICS[name].label} less control" for name in COMPARED]
    used = [i for i in range(len(names)) if any(line[i] != "–" for line in cells)]
    header, *lines = ([line[i] for i in used] for line in (names, *cells))
    return Table(title="Held-out records", header=header, rows=lines, note=NOTE)


def describe(row: Row) -> list[str]:
    arm, seeds = row.arm, str(len(row.sums))
    if arm is None:
        return [row.name, "–", "–", "–", "–", "–"]
    teraflops = number(arm.steps * arm.flops / 1e12, 1)
    return [row.name, KINDS[arm.kind], f"{arm.learning_rate:g}", str(arm.steps), teraflops, seeds]


def score_cells(row: Row) -> list[str]:
    values = whole(pool(row.sums.values()))
    cells = [number(METRICS[n].scale * values[n], METRICS[n].decimals) for n in SCORES]
    right = number(TASK.scale * float(np.mean(row.right)), TASK.decimals) if row.right else "–"
    return [*cells, right]


def pool(sums: Iterable[Sums]) -> Sums:
    """Returns the sums over seeds, whose scores are means over seeds."""
    found = list(sums)
    return {name: np.sum([one[name] for one in found], axis=0) for name in found[0]}


def difference_cells(row: Row, control: Row | None) -> list[str]:
    """Returns differences from the control over the seeds of both, with bootstrap intervals."""
    if control is None:
        return ["–"] * len(COMPARED)
    seeds = sorted(row.sums.keys() & control.sums.keys())
    ours, theirs = (pool(some.sums[seed] for seed in seeds) for some in (row, control))
    found = compare(ours, theirs, num_samples=2000, seed=0)
    cells = []
    for name in COMPARED:
        value, low, high = (
            number(found[name][x], METRICS[name].decimals, sign=True)
            for x in ("difference", "low", "high")
        )
        cells.append(f"{value} [{low}, {high}]")
    return cells


def shorten(table: Table) -> Table:
    """Returns the columns and rows for a README: scores of all arms that train all weights."""
    names = ("student", "steps", "TFLOP", "seeds", *(METRICS[name].heading for name in SCORES))
    columns = [table.header.index(name) for name in names if name in table.header]
    rows = [row for row in table.rows if KINDS["lora"] not in row]
    header, *lines = ([row[i] for i in columns] for row in (table.header, *rows))
    return replace(table, header=header, rows=lines, note="")


def markdown(table: Table) -> str:
    """Returns a table in Markdown, and its note."""
    lines = [table.header, ["---"] * len(table.header), *table.rows]
    text = "\n".join(f"| {' | '.join(line)} |".replace("\N{NO-BREAK SPACE}", " ") for line in lines)
    return f"{text}\n\n{table.note}" if table.note else text


if __name__ == "__main__":
    sys.exit(run_command(main))
