"""python -m kd_jax.demo: the whole workflow in minutes, from random weights to a report.

A teacher learns from many examples of a small language with known entropy (kd_jax.toy.grammar). A
smaller student gets few examples: it is evaluated untouched, fine-tuned, and distilled; with
--on-policy also when it has gone on to learn from answers that it samples itself.
"""

import hashlib
import json
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path
from typing import Annotated, Any, TextIO

from kd_jax.config import UserError
from kd_jax.config.checks import Checked, PathText, Range
from kd_jax.config.command import load_config, parse_args, run_command
from kd_jax.toy import grammar
from kd_jax.toy.outcome import COLUMNS, make_table, show
from kd_jax.weights.files import read_json, write_whole
from kd_jax.workdir.integrity import completion

NUM_MANY, NUM_FEW, NUM_HELD_OUT = 16_000, 400, 600
VOCAB_SIZE = 640
TEACHER = {"hidden_size": 128, "intermediate_size": 384}
STUDENT = {"hidden_size": 64, "intermediate_size": 192}
COMMON = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
CONFIGS = Path(__file__).parent / "toy" / "configs"
MARK, LOG = "demo.json", "demo.log"

Values = dict[str, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoArgs(Checked):
    out: PathText = "runs/demo"
    """Folder for all results. The same command resumes in the same folder."""
    seeds: Annotated[int, Range(least=1)] = 1
    """Number of students, each with its own examples, initial weights and order of rows. Two or
    more give standard errors."""
    on_policy: bool = False
    """Train the distilled student further on its own sampled answers, and show for all models the
    share of sampled answers that the language has."""
    json: bool = False
    """Print one JSON object; progress goes to stderr."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """Destinations of the demo's files and output."""

    out: Path
    console: Any
    log: TextIO
    """Receives the output of the commands."""
    on_policy: bool = False
    """As in DemoArgs."""


def main(argv: Sequence[str]) -> None:
    args = parse_args(DemoArgs, argv, __doc__)
    from rich.console import Console

    out = Path(args.out).expanduser()
    claim(out)
    console = Console(stderr=args.json, highlight=False, markup=False, soft_wrap=True)
    with (out / LOG).open("a", buffering=1) as log:
        stage = Stage(out=out, console=console, log=log, on_policy=args.on_policy)
        result = run_demo(stage, args.seeds)
    write(out / "result.json", json.dumps(result, indent=2) + "\n")
    show(console, result)
    if args.json:
        print(json.dumps(result))


def claim(out: Path) -> None:
    """Makes the demo's folder, or checks that this version of the demo made it.

    Raises:
      UserError: the folder holds other files, or results of another version.
    """
    here = Path(__file__)
    files = [here, *sorted((here.parent / "toy").rglob("*.py"))]
    recipe = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
    how = "Give another --out, or remove the folder"
    try:
        if (out / MARK).is_file():
            if read_json(out / MARK).get("recipe") != recipe:
                raise UserError(f"--out: {out} was made by another version of the demo. {how}")
        elif out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise UserError(f"--out: expected a new folder or an earlier demo's, got {out}. {how}")
        else:
            write(out / MARK, json.dumps({"recipe": recipe}) + "\n")
    except OSError as error:
        raise UserError(f"--out: {out} cannot be written ({error})") from None


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, text)


def run_demo(stage: Stage, num_seeds: int) -> dict[str, Any]:
    """Returns the object that --json prints: entropies, each model's numbers by seed, and costs."""
    from kd_jax.workdir.metrics import peak_memory_bytes

    start, cpu_start = time.perf_counter(), time.process_time()
    held_out = grammar.draw(NUM_HELD_OUT, "held out")
    tokenizer = write_corpus(stage, held_out)
    entropy = measure_entropy(stage, tokenizer, held_out)
    models: dict[str, list[Values]] = {"teacher": [teach(stage, tokenizer)]}
    for seed in range(num_seeds):
        for name, values in learn(stage, tokenizer, seed).items():
            models.setdefault(name, []).append(values)
    for values in (values for rows in models.values() for values in rows):
        values["excess"] = values["ce"] - entropy["held_out"]
    result = {"seeds": num_seeds, "entropy": entropy, "models": models}
    ask(stage, stage.out / "seed0" / "distil_hf", "What is three plus four?")
    return result | {
        "report": str(report(stage, result)),
        "seconds": time.perf_counter() - start,
        "cpu_seconds": time.process_time() - cpu_start,
        "peak_memory_bytes": peak_memory_bytes(),
    }


def write_corpus(stage: Stage, held_out: Sequence[tuple[grammar.Question, str]]) -> Any:
    """Writes the teacher's and the held-out examples; returns a tokenizer trained on the former."""
    from kd_jax.toy.models import make_tokenizer

    many = grammar.draw(NUM_MANY, "many")
    questions = grammar.make_questions()
    stage.console.print(
        f"A language of {len(questions)} questions, {sum(q.exact for q in questions)} of which "
        f"have one right answer. Examples: {NUM_MANY:,} for the teacher, {NUM_FEW} for each "
        f"student, {NUM_HELD_OUT} held out."
    )
    for question in (questions[0], next(q for q in questions if q.exact)):
        odds = sorted(question.answers.items(), key=lambda pair: -pair[1])
        shown = ", ".join(f"{answer} {p:.0%}" for answer, p in odds[:3])
        more = ", ..." if len(odds) > 3 else ""
        stage.console.print(f"  {question.instruction}  {shown}{more}", style="dim")
    write(stage.out / "many.jsonl", grammar.to_lines(many))
    write(stage.out / "held_out.jsonl", grammar.to_lines(held_out))
    return make_tokenizer([(q.instruction, a) for q, a in many], VOCAB_SIZE)


def measure_entropy(
    stage: Stage, tokenizer: Any, held_out: Sequence[tuple[grammar.Question, str]]
) -> Values:
    """Returns the entropy of the language and of the held-out answers, in nats per target token."""

    def num_tokens(answer: str) -> int:
        return len(tokenizer.encode(answer, add_special_tokens=False)) + 1  # the end of the turn

    expected = grammar.expected_floor(num_tokens)
    realised = grammar.realised_floor(held_out, num_tokens)
    stage.console.print(
        f"  known entropy of the answers, nats per token: {expected:.4f}; "
        f"of the held-out answers: {realised:.4f}"
    )
    return {"expected": expected, "held_out": realised}


def teach(stage: Stage, tokenizer: Any) -> Values:
    """Trains, exports and evaluates the teacher."""
    from kd_jax.toy.models import write_llama

    first, workdir = stage.out / "teacher_init", stage.out / "teacher"
    if not first.exists():
        write_llama(first, tokenizer, seed=1000, **COMMON, **TEACHER)
    paths = {"student.path": first, "data.path": stage.out / "many.jsonl"}
    train(stage, "teacher", workdir, paths, seed=0)
    return measure(stage, workdir, export(stage, workdir), teacher=None)


def learn(stage: Stage, tokenizer: Any, seed: int) -> dict[str, Values]:
    """Trains, exports and evaluates the students of one seed; returns their numbers by arm."""
    from kd_jax.toy.models import write_llama

    folder, teacher = stage.out / f"seed{seed}", stage.out / "teacher_hf"
    untouched = folder / "untouched"
    write(folder / "few.jsonl", grammar.to_lines(grammar.draw(NUM_FEW, f"few {seed}")))
    if not untouched.exists():
        write_llama(untouched, tokenizer, seed=seed, **COMMON, **STUDENT)
    found = {"untouched": measure(stage, untouched, untouched, teacher)}
    data, taught = {"data.path": folder / "few.jsonl"}, {"teacher.path": teacher}
    arms = {
        "finetune": data | {"student.path": untouched},
        "distil": data | taught | {"student.path": untouched},
    }
    if stage.on_policy:
        arms["on_policy"] = data | taught | {"student.path": folder / "distil_hf"}
    for name, paths in arms.items():
        train(stage, name, folder / name, paths, seed)
        exported = export(stage, folder / name)
        found[name] = measure(stage, folder / name, exported, teacher)
    return found


def run(stage: Stage, command: str, main: Callable, words: Sequence[str], done: bool) -> float:
    """Prints a command as a user would type it, runs it here unless `done`; returns its seconds."""
    line = shlex.join(["python", "-m", command, *words])
    stage.console.print(f"$ {line}", style="dim" if done else "bold")
    if done:
        return 0.0
    stage.log.write(f"$ {line}\n")
    start = time.perf_counter()
    with redirect_stdout(stage.log):
        main(words)
    return time.perf_counter() - start


def train(stage: Stage, name: str, workdir: Path, paths: dict[str, Path], seed: int) -> None:
    """Runs a config file, with flags for the fields that the file has otherwise."""
    from kd_jax.train import main

    file = CONFIGS / f"{name}.py"
    if file.is_relative_to(Path.cwd()):
        file = file.relative_to(Path.cwd())
    config = load_config(file)
    fields = {"workdir": workdir, **paths, "eval.path": stage.out / "held_out.jsonl", "seed": seed}
    words = ["--config", str(file)]
    for field, value in fields.items():
        if str(reduce(getattr, field.split("."), config)) != str(value):
            words += [f"--{field}", str(value)]
    try:
        seconds = run(stage, "kd_jax.train", main, words, done=completion(workdir))
    except SystemExit:  # a signal: training has saved
        raise KeyboardInterrupt from None
    if seconds:
        stage.console.print(f"  {config.steps} steps in {seconds:.0f} s")


def export(stage: Stage, workdir: Path) -> Path:
    from convert.to_hf import main

    out = workdir.with_name(f"{workdir.name}_hf")
    words = ["--workdir", str(workdir), "--out", str(out)]
    run(stage, "convert.to_hf", main, words, done=out.exists())
    return out


def measure(stage: Stage, model: Path, exported: Path, teacher: Path | None) -> Values:
    """Returns a model's scores on the held-out examples and its share of right answers."""
    values = evaluate(stage, model, teacher) | {"right": share_right(exported)}
    if stage.on_policy:
        values["possible"] = share_possible(exported)
    metrics = {name: COLUMNS[name] for name in values}
    shown = (f"{m.label} {values[name] * m.scale:.{m.decimals}f}" for name, m in metrics.items())
    stage.console.print(f"  {', '.join(shown)}")
    return values


def evaluate(stage: Stage, model: Path, teacher: Path | None) -> Values:
    """Returns the scores of kd_jax.evaluate on the held-out examples."""
    from kd_jax.evaluate import main

    words = ["--model", str(model), "--data", str(stage.out / "held_out.jsonl")]
    words += ["--dtype", "float32", "--batch-size", "16"]
    if teacher is not None:
        words += ["--teacher", str(teacher)]
    if (model / "checkpoints").is_dir():
        file, where = model / "evaluation.json", ["--save"]
    else:
        file = model.with_name(f"{model.name}.json")
        seq_len = load_config(CONFIGS / "distil.py").data.seq_len
        where = ["--seq-len", str(seq_len), "--out", str(file)]
    run(stage, "kd_jax.evaluate", main, [*words, *where], done=file.is_file())
    found = read_json(file)
    return {name: found[name] for name in COLUMNS if name in found}


def share_right(model: Path) -> float:
    """Returns the share of exact questions that a model answers right by greedy decoding."""
    exact = {q.instruction: q.likeliest for q in grammar.make_questions() if q.exact}
    given = answer(model, tuple(exact), "answers", temperature=0.0)
    return sum(given[prompt] == right for prompt, right in exact.items()) / len(exact)


def share_possible(model: Path) -> float:
    """Returns the share of sampled answers, one to each question, that the language has."""
    odds = {q.instruction: q.answers for q in grammar.make_questions()}
    given = answer(model, tuple(odds), "samples", temperature=1.0)
    return sum(given[prompt] in answers for prompt, answers in odds.items()) / len(odds)


def answer(model: Path, prompts: tuple[str, ...], name: str, temperature: float) -> dict[str, str]:
    """Returns a model's answer to each prompt, which a file next to its folder keeps."""
    from kd_jax.inference.answering import answers
    from kd_jax.inference.arguments import GenerateArgs

    file = model.with_name(f"{model.name}_{name}.json")
    if not file.is_file():
        said = [""] * len(prompts)
        args = GenerateArgs(
            model=str(model),
            prompt=prompts,
            max_new_tokens=12,
            temperature=temperature,
            dtype="float32",
        )
        for row, text in answers(args):
            said[row] += text
        write(file, json.dumps(dict(zip(prompts, said, strict=True)), indent=2) + "\n")
    return read_json(file)


def ask(stage: Stage, model: Path, prompt: str) -> None:
    """Prints an exported model's answer to a question."""
    from kd_jax.generate import main

    run(stage, "kd_jax.generate", main, ["--model", str(model), "--prompt", prompt], done=False)
    stage.console.print(f"  {(stage.out / LOG).read_text().splitlines()[-1]}")


def report(stage: Stage, result: dict[str, Any]) -> Path:
    """Writes the report of the first seed's runs, headed by the table of all seeds."""
    from kd_jax.reporting.page import make_report

    out = stage.out / "report"
    shutil.rmtree(out, ignore_errors=True)  # make_report refuses an interrupted report
    runs = [stage.out / "seed0" / name for name in ("finetune", "distil")]
    runs += [stage.out / "seed0" / "on_policy"] * stage.on_policy
    table = make_table(result)
    if result["seeds"] > 1:
        table = replace(table, note=f"{table.note} The rest of the page shows the first seed only.")
    title = "The demo: a student fine-tuned and distilled on few examples"
    return make_report(runs, out, title=title, extra=[table])


if __name__ == "__main__":
    sys.exit(run_command(main))
