"""python -m kd_jax.evaluate: a student's cross-entropy and distance to its teacher, per token."""

import dataclasses
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from kd_jax.config import Config, HiddenConfig, MeshConfig, TeacherConfig, UserError
from kd_jax.config.checks import Checks, Range
from kd_jax.config.command import ModelArgs, check_out_file, parse_args, run_command
from kd_jax.config.flags import renamed
from kd_jax.inference import scores
from kd_jax.inference.scores import Sums
from kd_jax.weights.files import write_whole
from kd_jax.workdir.history import is_run

if TYPE_CHECKING:
    from kd_jax.inference.exam import Exam
    from kd_jax.inference.load import OpenModel


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateArgs(ModelArgs):
    teacher: str | None = None
    """Teacher to compare with, in any of --model's forms; None omits the metrics that need one."""
    teacher_cache: str | None = None
    """Folder that kd_jax.cache wrote, from which the teacher's outputs are read; of the teacher
    only the lm_head is loaded. Also --teacher.cache."""
    teacher_cache_missing: Literal["error", "compute"] = "error"
    """Documents that the cache lacks: stop with their number, or run the teacher on them and add
    them."""
    teacher_system: str | None = None
    """System text that only the teacher sees, or @FILE; also --teacher.system. None: that of the
    run whose teacher it is; '' is none."""
    teacher_messages: bool = False
    """Give the teacher the records' teacher_messages; also --teacher.messages."""
    against: str | None = None
    """Second model, in any of --model's forms: differences (model minus against) on the same data
    with 95 % confidence intervals."""
    data: str
    """Conversations, in any form that data.path of a run takes."""
    split: str | None = None
    """Split or slice of it, as data.split of a run; None: all of files, test of a hub dataset."""
    draft: bool = False
    """Report the expected tokens of a pass of --teacher in speculative decoding, in which --model
    proposes 4 and 8 tokens at a time: accepted_length_4 and accepted_length_8."""
    accuracy: Annotated[int | None, Range(least=1)] = None
    """Questions of the data to answer greedily, the first ones: the share whose final number is
    that of the data's answer. It is the number after the last ####, and the last number where the
    data's answer has no ####. None: no answers are generated."""
    max_new_tokens: Annotated[int, Range(least=1)] = 320
    """Most tokens of an answer for --accuracy."""
    top_k: Annotated[int, Range(least=1)] = 10
    """Most likely tokens of student and teacher whose overlap is measured."""
    bootstrap_samples: Annotated[int, Range(least=1)] = 2000
    """Bootstrap resamples of the documents for the intervals of --against."""
    seed: Annotated[int, Range(least=0)] = 0
    """Seed of the bootstrap."""
    json: bool = False
    """Print one JSON object instead of tables."""
    out: str | None = None
    """File to write the JSON object to."""
    save: bool = False
    """Write the JSON object to WORKDIR/evaluation.json; --model must be a workdir."""
    seq_len: Annotated[int | None, Range(least=2)] = None
    """Tokens in a row, to which conversations are truncated; None: the run's, or 2048, and less
    where all conversations are shorter."""
    batch_size: Annotated[int | None, Range(least=1)] = None
    """Rows per batch over all devices; None: as many as the platform scores at a time."""
    chat_template: str | None = None
    """Jinja file to use instead of the tokenizer's own chat template."""
    mesh: MeshConfig = field(default_factory=MeshConfig)
    max_conversations: Annotated[int | None, Range(least=1)] = None
    """Use only the first conversations of the data; None uses all."""

    def check(self, checks: Checks) -> None:
        if self.save and not is_run(Path(self.model).expanduser()):
            checks.refuse("--save", "a workdir as --model", self.model)
        if self.teacher is None and self.draft:
            checks.refuse("--teacher", "the model that checks the drafts, with --draft", None)
        if self.teacher is None and (self.teacher_system or self.teacher_messages):
            checks.refuse("--teacher", "a model with a prompt for the teacher", None)
        if self.teacher_cache is None and self.teacher_cache_missing != "error":
            checks.refuse("--teacher-cache-missing", "error without --teacher-cache", "compute")
        no_folder = self.teacher is None or is_run(Path(self.teacher).expanduser())
        if self.teacher_cache is not None and no_folder:
            checks.refuse("--teacher", "a folder or a hub id with --teacher-cache", self.teacher)


_RECORDED = (
    "model", "step", "teacher", "teacher_cache", "teacher_system", "teacher_messages", "against",
    "data", "split", "max_conversations", "seq_len", "chat_template", "top_k", "accuracy",
    "max_new_tokens", "bootstrap_samples", "seed",
)  # fmt: skip
NAMES_IN_TRAINING = {
    f"teacher.{name}": f"teacher-{name}"
    for name in ("cache", "cache-missing", "system", "messages")
}
"""The flags that kd_jax.train has under another name."""


def main(argv: Sequence[str]) -> None:
    args = parse_args(EvaluateArgs, renamed(argv, NAMES_IN_TRAINING), __doc__)
    places = {"--out": args.out, "--save": f"{args.model}/evaluation.json" if args.save else None}
    files = [check_out_file(x, flag, "by_position") for flag, x in places.items() if x is not None]
    result = evaluate(args)
    text = json.dumps(result)
    try:
        for file in files:
            write_whole(file, text + "\n")
    finally:  # a full disk does not lose the numbers
        print(text if args.json else scores.describe(result))


def evaluate(args: EvaluateArgs) -> dict[str, Any]:
    """Returns the object that --json prints: `summarise` of what `measure` measures."""
    opened = _open(args)
    exam = None if args.accuracy is None else _exam(args, *opened[:2])
    result = summarise(args, *measure(args, opened))
    return result if exam is None else result | _accuracy(args, opened[0], exam)


def measure(args: EvaluateArgs, opened: Any = None) -> tuple[Sums, Sums, Sums | None]:
    """Returns the model's sums by document and by position, and --against's by document.

    Documents are in the same order for every model.

    Args:
      opened: what _open(args) returns; None: it is called.
    """
    import jax  # takes seconds, which --help avoids

    from kd_jax.data.chat import chat_template_of
    from kd_jax.data.prompts import read_prompt
    from kd_jax.data.rows import make_rows, shortest_rows
    from kd_jax.inference.evaluation import rows_at_once
    from kd_jax.inference.load import describe_dtype
    from kd_jax.models.architecture import describe_context
    from kd_jax.parallel.mesh import make_mesh
    from kd_jax.setup.runtime import start_jax
    from kd_jax.setup.sources import check_shared

    student, teacher, against, shares = _open(args) if opened is None else opened
    start_jax(student.config.compilation_cache)
    config = _config(args, student.config, jax.device_count())
    mesh = make_mesh(config.mesh, config.data.batch_size)
    tokenizers = [model.source.tokenizer for model in (student, teacher) if model]
    template = chat_template_of(config.data, *tokenizers)
    prompt = read_prompt(_prompted(args, student.config))
    rows = make_rows(config.data, tokenizers[0], template, prompt=prompt)
    if args.seq_len is None and (width := shortest_rows(rows)) < config.data.seq_len:
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, seq_len=width))
        rows = make_rows(config.data, tokenizers[0], template, prompt=prompt)
    context = describe_context(student.source.arch, config.data.seq_len, "model")
    for line in filter(None, [describe_dtype(args.dtype, mesh), context, *rows.notes]):
        print(line, file=sys.stderr)
    for other, shared in shares:
        check_shared(shared, student.source, other.source, rows, "--data")
    if args.batch_size is None:
        size = rows_at_once(mesh, len(rows), config.data.seq_len)
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, batch_size=size))
    cached = loaded = None
    if teacher:
        config, loaded, cached = _load_teacher(args, config, teacher, template, rows, mesh)
    inputs = (teacher, loaded, cached, rows, mesh)
    documents, positions = _measure(args, config, student, *inputs)
    theirs = against and _measure(args, config, against, *inputs)[0]
    return documents, positions, theirs


def summarise(
    args: EvaluateArgs, documents: Sums, positions: Sums, theirs: Sums | None = None
) -> dict[str, Any]:
    """Returns the object that --json prints.

    Returns:
      scores.NAMES: means over target tokens, nats; `by_position`: the same for target tokens at
      positions `start` to below `stop` of their documents; `against`: {name: {value, difference,
      low, high}}; `arguments`: model, data and options.
    """
    import jax

    from kd_jax.parallel.platforms import choose_dtype

    values = scores.whole(documents)
    result: dict[str, Any] = {name: values[name] for name in scores.NAMES if name in values}
    _check_finite(args.model, result)
    result["by_position"] = scores.by_position(positions)
    if theirs is not None:
        _check_finite(args.against, scores.whole(theirs))
        result["against"] = scores.compare(documents, theirs, args.bootstrap_samples, args.seed)
    result["arguments"] = {name: getattr(args, name) for name in _RECORDED}
    result["arguments"]["dtype"] = choose_dtype(args.dtype, jax.devices()[0].platform)
    return result


def _exam(args: EvaluateArgs, model: "OpenModel", teacher: "OpenModel | None") -> "Exam":
    """Returns the first args.accuracy questions that the model can be asked."""
    from kd_jax.data.chat import chat_template_of
    from kd_jax.inference.exam import read_exam

    data = _config(args, model.config, 1).data
    tokenizers = [x.source.tokenizer for x in (model, teacher) if x]
    template = chat_template_of(data, *tokenizers)
    count, most = args.accuracy or 0, args.max_new_tokens
    return read_exam(data, count, most, model.source, template, "--accuracy")


def _accuracy(args: EvaluateArgs, model: "OpenModel", exam: "Exam") -> dict[str, Any]:
    """Returns the exact-answer accuracy, its standard error and what it is of."""
    import jax

    from kd_jax.data.vocabulary import num_entries
    from kd_jax.inference.exam import take_exam
    from kd_jax.inference.load import load_model
    from kd_jax.parallel.mesh import make_mesh

    config = _config(args, model.config, jax.device_count())
    models = load_model(model, make_mesh(config.mesh, config.data.batch_size))
    size = num_entries(model.source.tokenizer)
    return take_exam(exam, models.student, models.frozen, size).scores


def _open(args: EvaluateArgs):
    """Returns the checked student, teacher and model to compare with; None where not given.

    Also returns each of the others with the vocabulary that it shares with the student.
    """
    from kd_jax.inference.load import open_model
    from kd_jax.parallel.processes import say
    from kd_jax.setup.sources import compare_tokenizers

    student = open_model(args.model, args.dtype, args.step)
    teacher = against = None
    if args.teacher is not None:
        own = student.config.teacher
        adapter = None if own is None else own.adapter
        if own is not None and adapter is not None and not _is_teacher(student.config, args):
            say(
                f"warning: --teacher {args.teacher} is not the run's teacher {own.path}, so the "
                f"run's teacher.adapter {adapter} is not used"
            )
            adapter = None
        teacher = open_model(
            args.teacher, args.dtype, adapter=adapter, field="teacher", flag="--teacher"
        )
    if args.against is not None:
        against = open_model(args.against, args.dtype, flag="--against")
    shares = []
    for flag, other in (("--teacher", teacher), ("--against", against)):
        if other is not None:
            shared = compare_tokenizers(student.source, other.source, f"--model, {flag}")
            shares.append((other, shared))
    return student, teacher, against, shares


def _is_teacher(run: Config, args: EvaluateArgs) -> bool:
    """Returns True if --teacher is the folder or hub id of the run's teacher."""
    from kd_jax.weights.folder import same_path

    part = run.teacher_part
    return part is not None and part.path is not None and same_path(part.path, args.teacher or "")


def _prompted(args: EvaluateArgs, run: Config) -> TeacherConfig | None:
    """Returns the teacher with the prompt that only it sees: the arguments', or its run's."""
    from kd_jax.parallel.processes import say

    if args.teacher is None:
        return None
    part = TeacherConfig(
        path=args.teacher, system=args.teacher_system or None, messages=args.teacher_messages
    )
    own, given = run.teacher, args.teacher_system is not None or args.teacher_messages
    if given or own is None or not own.has_prompt or not _is_teacher(run, args):
        return part
    say(f"the teacher sees the prompt of its run {args.model}; --teacher-system '' removes it")
    return dataclasses.replace(part, system=own.system, messages=own.messages, seq_len=own.seq_len)


def _load_teacher(args, config, teacher, template, rows, mesh):
    """Returns the configuration, the teacher's arrays, and the values of --teacher-cache."""
    from kd_jax.inference.cached import open_cached
    from kd_jax.inference.load import load_head, load_model
    from kd_jax.parallel.mesh import platform
    from kd_jax.parallel.platforms import choose_dtype

    if args.teacher_cache is None:
        return config, load_model(teacher, mesh), None
    part = TeacherConfig(
        path=teacher.config.student.path,
        dtype=choose_dtype(args.dtype, platform(mesh)),
        cache=args.teacher_cache,
        cache_missing=args.teacher_cache_missing,
    )
    config = dataclasses.replace(config, teacher=part, hidden=HiddenConfig())
    source = teacher.source
    cached = open_cached(config, source, mesh, source.hashes, template, (rows, None))
    return config, load_head(teacher, mesh), cached


def _measure(args, config, student, teacher, loaded_teacher, cached, rows, mesh):
    """Returns a model's sums by document and by position; its weights are freed on return."""
    from kd_jax.inference.evaluation import evaluate_rows
    from kd_jax.inference.load import load_model
    from kd_jax.setup.program import make_program
    from kd_jax.setup.sources import shared_vocab

    vocab_size = shared_vocab(student.source, teacher and teacher.source).size
    if args.top_k > vocab_size:
        raise UserError(
            f"--top-k: expected at most {vocab_size} (vocabulary size), got {args.top_k}"
        )
    if cached is not None:
        cached.check_vocab(vocab_size)
    models = load_model(student, mesh)
    if loaded_teacher is not None:
        arrays = loaded_teacher.frozen
        models = dataclasses.replace(
            models,
            teacher=loaded_teacher.student,
            teacher_arrays=arrays,
            teacher_kind="live" if cached is None else cached.kind,
            separate_teacher_rows=cached is None and rows.teacher is not None,
        )
    program = make_program(config, models, vocab_size, mesh)
    head = dataclasses.replace(program.head, top_k=args.top_k)
    program = dataclasses.replace(program, head=head)
    arrays = (models.frozen, models.teacher_arrays)
    lengths = scores.DRAFT_LENGTHS if args.draft else ()
    read_teacher = cached and cached.train
    return evaluate_rows(program, mesh, *arrays, rows, config, read_teacher, draft_lengths=lengths)


def _check_finite(model: str | None, values: dict[str, float]) -> None:
    wrong = ", ".join(f"{name} {x}" for name, x in values.items() if not math.isfinite(x))
    if wrong:
        raise UserError(f"{model}: expected finite values, got {wrong}")


def _config(args: EvaluateArgs, run: Config, num_devices: int) -> Config:
    """Returns the run's configuration, changed by the arguments."""
    from kd_jax.data.files import check_source, default_split

    split = default_split(args.data) if args.split is None else args.split
    check_source(args.data, split, "--data")
    return dataclasses.replace(
        run,
        mesh=args.mesh,
        optim=dataclasses.replace(run.optim, accumulation_steps=1),
        data=dataclasses.replace(
            run.data,
            path=args.data,
            split=split,
            seq_len=run.data.seq_len if args.seq_len is None else args.seq_len,
            batch_size=num_devices if args.batch_size is None else args.batch_size,
            chat_template=args.chat_template,
            max_conversations=args.max_conversations,
        ),
    )


if __name__ == "__main__":
    sys.exit(run_command(main))
