"""Evaluation of a model beside its teacher and a second model, as kd_jax.evaluate reports it."""

import dataclasses
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from kd_jax.config import Config, HiddenConfig, TeacherConfig, UserError
from kd_jax.config.errors import raise_all
from kd_jax.data.chat import chat_template_of
from kd_jax.data.files import check_source, choose_split
from kd_jax.data.outputs import check_apart
from kd_jax.data.prompts import SYSTEM_FILE, read_prompt
from kd_jax.data.rows import Rows, describe_rows, make_rows, shortest_rows
from kd_jax.data.templates import Template
from kd_jax.data.vocabulary import num_entries
from kd_jax.inference import scores
from kd_jax.inference.arguments import EvaluateArgs
from kd_jax.inference.cached import open_cached
from kd_jax.inference.evaluation import evaluate_rows, rows_at_once
from kd_jax.inference.exam import Accuracy, Exam, read_exam, take_exam
from kd_jax.inference.load import OpenModel, describe_dtype, load_model, open_model
from kd_jax.inference.scores import Sums
from kd_jax.models.architecture import describe_context
from kd_jax.parallel.mesh import make_mesh, platform
from kd_jax.parallel.platforms import choose_dtype
from kd_jax.parallel.processes import say
from kd_jax.parallel.rules import uneven_rows
from kd_jax.setup.cached import CachedTeacher
from kd_jax.setup.model_files import check_shared, compare_tokenizers, shared_vocab
from kd_jax.setup.models import Models
from kd_jax.setup.program import make_program
from kd_jax.setup.runtime import start_jax
from kd_jax.weights.folder import fingerprint, same_path
from kd_jax.workdir.resume import check_same_inputs

_RECORDED = (
    "model", "step", "teacher", "teacher_cache", "teacher_system", "teacher_messages", "against",
    "data", "split", "max_conversations", "seq_len", "chat_template", "top_k", "accuracy",
    "max_new_tokens", "bootstrap_samples", "seed",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Setup:
    """The checked inputs of an evaluation. No weights are loaded."""

    config: Config
    """The run's, changed by the arguments."""
    student: OpenModel
    teacher: OpenModel | None
    against: OpenModel | None
    vocab_sizes: list[int]
    """Vocabulary entries that the student, and --against, share with the teacher."""
    mesh: Mesh
    rows: Rows
    exam: Exam | None
    cached: CachedTeacher | None = None
    """The values of --teacher-cache."""


class Measured(NamedTuple):
    """Sums over target tokens; documents are in the same order for every model."""

    documents: Sums
    positions: Sums
    """By position bucket, as evaluation.evaluate_rows returns them."""
    against: Sums | None = None
    """By document, of the second model."""
    accuracy: Accuracy | None = None
    step: int | None = None
    """Optimizer step of the run's checkpoint; None: the model is no run."""


def evaluate(args: EvaluateArgs) -> dict[str, Any]:
    """Returns the object that --json prints: `summarise` of what `measure` measures."""
    return summarise(args, measure(args))


def measure(args: EvaluateArgs) -> Measured:
    """Returns what the arguments ask for; mistakes in them are found before weights are loaded."""
    setup = open_setup(args)
    teacher = accuracy = theirs = None
    if setup.teacher is not None:
        head_only = setup.cached is not None
        teacher = load_model(setup.teacher, setup.mesh, head_only=head_only)
    if setup.against is not None:
        against = load_model(setup.against, setup.mesh)
        theirs, _ = _sums(args, setup, against, teacher, setup.vocab_sizes[1])
        del against  # whose memory the model takes
    models = load_model(setup.student, setup.mesh)
    documents, positions = _sums(args, setup, models, teacher, setup.vocab_sizes[0])
    del teacher  # whose memory the answers take
    if setup.exam is not None:
        size = num_entries(setup.student.files.tokenizer)
        accuracy = take_exam(setup.exam, models.student, models.frozen, size)
    return Measured(documents, positions, theirs, accuracy, models.step)


def summarise(args: EvaluateArgs, measured: Measured) -> dict[str, Any]:
    """Returns the object that --json prints.

    Returns:
      scores.NAMES: means over target tokens, nats; `by_position`: the same for target tokens at
      positions `start` to below `stop` of their documents; `against`: {name: {value, difference,
      low, high}}; `arguments`: model, data and options; with --accuracy also exam.Accuracy.scores.
    """
    values = scores.whole(measured.documents)
    result: dict[str, Any] = {name: values[name] for name in scores.NAMES if name in values}
    _check_finite(args.model, result)
    result["by_position"] = scores.by_position(measured.positions)
    if measured.against is not None:
        _check_finite(args.against, scores.whole(measured.against))
        pair = (measured.documents, measured.against)
        result["against"] = scores.compare(*pair, args.bootstrap_samples, args.seed)
    result["arguments"] = {name: getattr(args, name) for name in _RECORDED}
    result["arguments"]["step"] = measured.step
    result["arguments"]["dtype"] = choose_dtype(args.dtype, jax.devices()[0].platform)
    return result if measured.accuracy is None else result | measured.accuracy.scores


def open_setup(args: EvaluateArgs) -> Setup:
    """Returns the checked models, devices, questions and rows."""
    student = open_model(args.model, args.dtype, args.step, student_path=args.student_path)
    teacher = against = None
    if args.teacher is not None:
        teacher = _open_teacher(args, student)
    if args.against is not None:
        against = open_model(args.against, args.dtype, flag="--against")
    shares = [
        (other.files, compare_tokenizers(student.files, other.files, f"--model, {flag}"))
        for flag, other in (("--teacher", teacher), ("--against", against))
        if other is not None
    ]
    start_jax(student.config.compilation_cache)
    config = _config(args, student.config, jax.device_count())
    mesh = make_mesh(config.mesh, config.data.batch_size)
    tokenizers = [model.files.tokenizer for model in (student, teacher) if model]
    template = chat_template_of(config.data, *tokenizers)
    exam = None
    if args.accuracy is not None:
        limits = args.accuracy, args.max_new_tokens
        exam = read_exam(config.data, *limits, student.files, template, "--accuracy")
    config, rows = _make_rows(args, config, student, template)
    raise_all(uneven_rows(mesh.shape, {"--seq-len": config.data.seq_len}))
    context = describe_context(student.files.arch, config.data.seq_len, "model")
    data = f"{args.data}: {describe_rows(rows)}"
    for line in filter(None, [describe_dtype(args.dtype, mesh), context, data]):
        print(line, file=sys.stderr)
    for files, shared in shares:
        check_shared(shared, student.files, files, rows, "--data")
    if args.batch_size is None:
        size = rows_at_once(mesh, len(rows), config.data.seq_len)
        config = _with_data(config, batch_size=size)
    setup = Setup(
        config=config, student=student, teacher=teacher, against=against, mesh=mesh, rows=rows,
        vocab_sizes=_vocab_sizes(args, [student, against], teacher), exam=exam,
    )  # fmt: skip
    return setup if args.teacher_cache is None else _with_cache(args, setup, template)


def _open_teacher(args: EvaluateArgs, student: OpenModel) -> OpenModel:
    """Returns the teacher, with the run's adapter if it is the run's teacher."""
    assert args.teacher is not None
    run, own = student.config, student.config.teacher
    adapter = None if own is None else own.adapter
    if own is not None and adapter is not None and not _is_teacher(run, args):
        say(
            f"warning: --teacher {args.teacher} is not the run's teacher {own.path}, so the "
            f"run's teacher.adapter {adapter} is not used"
        )
        adapter = None
    opened = open_model(
        args.teacher, args.dtype, adapter=adapter, field="teacher", flag="--teacher"
    )
    if adapter is not None and student.workdir is not None and run.distils:
        content = fingerprint(opened.files.folders["teacher.adapter"])
        check_same_inputs(student.workdir, {"teacher.adapter": content})
    return opened


def _is_teacher(run: Config, args: EvaluateArgs) -> bool:
    """Returns True if --teacher is the folder or hub id of the run's teacher."""
    part = run.teacher_part
    return part is not None and part.path is not None and same_path(part.path, args.teacher or "")


def _config(args: EvaluateArgs, run: Config, num_devices: int) -> Config:
    """Returns the run's configuration, changed by the arguments."""
    split = choose_split(args.data, args.split)
    check_source(args.data, split, "--data")
    check_apart(args.data, split, {"--out": args.out}, "--data")
    optim = dataclasses.replace(run.optim, accumulation_steps=1)
    return _with_data(
        dataclasses.replace(run, mesh=args.mesh, optim=optim),
        path=args.data,
        split=split,
        seq_len=run.data.seq_len if args.seq_len is None else args.seq_len,
        batch_size=num_devices if args.batch_size is None else args.batch_size,
        overlong="truncate",
        chat_template=args.chat_template,
        max_conversations=args.max_conversations,
    )


def _with_data(config: Config, **changes: Any) -> Config:
    return dataclasses.replace(config, data=dataclasses.replace(config.data, **changes))


def _make_rows(
    args: EvaluateArgs, config: Config, model: OpenModel, template: Template | None
) -> tuple[Config, Rows]:
    """Returns the rows, and the configuration with their length: the shortest, or --seq-len."""
    prompt = read_prompt(_prompted(args, model))

    def make(config: Config) -> Rows:
        return make_rows(config.data, model.files.tokenizer, template, prompt=prompt)

    rows = make(config)
    if args.seq_len is None and (width := shortest_rows(rows)) < config.data.seq_len:
        config = _with_data(config, seq_len=width)
        rows = make(config)
    return config, rows


def _prompted(args: EvaluateArgs, model: OpenModel) -> TeacherConfig | None:
    """Returns the teacher with the prompt that only it sees: the arguments', or its run's."""
    if args.teacher is None:
        return None
    part = TeacherConfig(
        path=args.teacher, system=args.teacher_system or None, messages=args.teacher_messages
    )
    own, given = model.config.teacher, args.teacher_system is not None or args.teacher_messages
    if given or own is None or not own.has_prompt or not _is_teacher(model.config, args):
        return part
    say(f"the teacher sees the prompt of its run {args.model}; --teacher-system '' removes it")
    system, file = own.system, (model.workdir or Path()) / SYSTEM_FILE
    if system is not None and system.startswith("@") and file.is_file():
        system = f"@{file}"  # as the run read it
    return dataclasses.replace(part, system=system, messages=own.messages, seq_len=own.seq_len)


def _vocab_sizes(
    args: EvaluateArgs, models: list[OpenModel | None], teacher: OpenModel | None
) -> list[int]:
    """Returns the vocabulary entries that each model shares with the teacher."""
    files = None if teacher is None else teacher.files
    sizes = [shared_vocab(model.files, files).size for model in models if model is not None]
    if args.top_k > min(sizes):
        expected = f"at most {min(sizes)} (vocabulary size)"
        raise UserError(f"--top-k: expected {expected}, got {args.top_k}")
    return sizes


def _with_cache(args: EvaluateArgs, setup: Setup, template: Template | None) -> Setup:
    """Returns the setup with the values of --teacher-cache."""
    teacher = setup.teacher
    assert teacher is not None
    part = TeacherConfig(
        path=teacher.config.student.path,
        dtype=choose_dtype(args.dtype, platform(setup.mesh)),
        cache=args.teacher_cache,
        cache_missing=args.teacher_cache_missing,
    )
    config = dataclasses.replace(setup.config, teacher=part, hidden=HiddenConfig())
    files, rows = teacher.files, (setup.rows, None)
    cached = open_cached(config, files, setup.mesh, files.hashes, template, rows)
    for size in setup.vocab_sizes:
        cached.check_vocab(size)
    return dataclasses.replace(setup, config=config, cached=cached)


def _sums(
    args: EvaluateArgs, setup: Setup, models: Models, teacher: Models | None, vocab_size: int
) -> tuple[Sums, Sums]:
    """Returns a model's sums by document and by position."""
    cached = setup.cached
    if teacher is not None:
        models = dataclasses.replace(
            models,
            teacher=teacher.student,
            teacher_arrays=teacher.frozen,
            teacher_outputs="live" if cached is None else cached.kind,
            separate_teacher_rows=cached is None and setup.rows.teacher is not None,
        )
    program = make_program(setup.config, models, vocab_size, setup.mesh)
    head = dataclasses.replace(program.head, top_k=args.top_k)
    program = dataclasses.replace(program, head=head)
    arrays = (models.frozen, models.teacher_arrays)
    read_teacher = None if cached is None else cached.train
    lengths = scores.DRAFT_LENGTHS if args.draft else ()
    return evaluate_rows(
        program, setup.mesh, *arrays, setup.rows, setup.config, read_teacher, draft_lengths=lengths
    )


def _check_finite(model: str | None, values: dict[str, float]) -> None:
    wrong = ", ".join(f"{name} {x}" for name, x in values.items() if not math.isfinite(x))
    if wrong:
        raise UserError(f"{model}: expected finite values, got {wrong}")
