"""Answers to prompts of the command line, and to all prompts of a file, as kd_jax.generate does."""

import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import jax
from jax.sharding import Mesh

from kd_jax.config import DataConfig
from kd_jax.data.chat import chat_template_of
from kd_jax.data.files import check_source, hash_source, list_sources
from kd_jax.data.outputs import check_apart
from kd_jax.data.questions import read_questions
from kd_jax.data.records import describe_ignored
from kd_jax.data.templates import Template
from kd_jax.data.vocabulary import num_entries
from kd_jax.inference.answer_file import AnswerFile, Options, fit_context, write_answers
from kd_jax.inference.arguments import GenerateArgs
from kd_jax.inference.drawing import Sampling
from kd_jax.inference.load import OpenModel, describe_dtype, load_unstacked, open_model
from kd_jax.inference.prompts import (
    TextWriter,
    check_ids,
    check_length,
    check_stops,
    context_length,
    decode_answer,
    encode,
    stop_tokens,
    template_stops,
    text_stops,
    turn_ends,
)
from kd_jax.inference.sampling import generate
from kd_jax.inference.speculative import Model, speculate
from kd_jax.parallel.mesh import make_mesh
from kd_jax.parallel.processes import joined, say
from kd_jax.setup.model_files import compare_tokenizers
from kd_jax.setup.runtime import start_jax
from kd_jax.workdir.checkpoints import open_trained
from kd_jax.workdir.integrity import hash_checkpoint


def answers(args: GenerateArgs) -> Iterator[tuple[int, str]]:
    """Yields pieces of the answers as they are generated: index of the prompt, text."""
    opened = open_model(args.model, args.dtype, args.step, student_path=args.student_path)
    tokenizer, folder = opened.files.tokenizer, opened.files.folder
    check_stops(tokenizer, args.stop, "--stop")
    date, template = args.date or opened.config.data.date, None
    if not args.raw:
        own = DataConfig(path="unused", chat_template=args.chat_template)
        template = chat_template_of(own, tokenizer)
    prompts = encode(
        tokenizer, args.prompt, raw=args.raw, system=args.system, template=template, date=date
    )
    check_ids(prompts, opened.files.arch, "--model")
    room = check_length(prompts, args.max_new_tokens, context_length(opened.files.arch))
    start_jax(opened.config.compilation_cache)
    mesh = make_mesh(args.mesh, jax.device_count())
    if line := describe_dtype(args.dtype, mesh):
        print(line, file=sys.stderr)
    ends, texts = template_stops(tokenizer, template, date)
    writers = [TextWriter(tokenizer, [*args.stop, *texts]) for _ in prompts]
    ends |= stop_tokens(folder, tokenizer) | text_stops(tokenizer, args.stop)
    draft = None if args.draft is None else _open_draft(args, opened)
    if draft is not None:
        check_ids(prompts, draft[0].files.arch, "--draft")
    for pieces in _token_pieces(args, opened, draft, mesh, prompts, room, ends):
        for row, (writer, tokens) in enumerate(zip(writers, pieces, strict=True)):
            for token in tokens:
                if text := writer.push(token):
                    yield row, text
        if all(writer.ended for writer in writers):
            break
    for row, writer in enumerate(writers):
        if text := writer.flush():
            yield row, text


def _token_pieces(
    args: GenerateArgs,
    opened: OpenModel,
    draft: tuple[OpenModel, int] | None,
    mesh: Mesh,
    prompts: list[list[int]],
    room: int,
    ends: set[int],
) -> Iterator[list[list[int]]]:
    """Yields the next tokens of each row, none for rows that have ended."""
    target = Model(*load_unstacked(opened, mesh))
    options: dict[str, Any] = {
        "max_new_tokens": room, "stop_tokens": ends, "sampling": _sampling(args), "seed": args.seed,
        "vocab_size": num_entries(opened.files.tokenizer),
    }  # fmt: skip
    if draft is not None:
        drafter = Model(*load_unstacked(draft[0], mesh))
        options |= {"proposed": args.draft_tokens, "shared_size": draft[1]}
        yield from speculate(target, drafter, prompts, **options)
        return
    for tokens in generate(*target, prompts, **options):
        yield [[] if token is None else [token] for token in tokens]


def _sampling(args: GenerateArgs) -> Sampling:
    return Sampling(temperature=args.temperature, top_k=args.top_k, top_p=args.top_p)


def _open_draft(args: GenerateArgs, opened: OpenModel) -> tuple[OpenModel, int]:
    """Returns the draft model, and the vocabulary entries that it shares with the target."""
    assert args.draft is not None
    draft = open_model(args.draft, args.dtype, flag="--draft")
    return draft, compare_tokenizers(opened.files, draft.files, "--model, --draft").size


def answer_data(args: GenerateArgs) -> None:
    """Writes the answers to the prompts of args.data into args.out."""
    opened = open_model(args.model, args.dtype, args.step, student_path=args.student_path)
    start_jax(opened.config.compilation_cache)  # before `joined`, which starts jax
    with joined(args.distributed):
        counts = _write_answers(args, opened)
        if counts is not None:
            share = counts["ended"] / counts["answers"]
            say(
                f"{args.out}: {counts['answers']:,} answers of {counts['tokens']:,} tokens, "
                f"{share:.1%} ended by themselves"
                + f"; {counts['empty']:,} empty ones left out"
                * (counts["empty"] > 0)
            )


def _write_answers(args: GenerateArgs, opened: OpenModel) -> dict[str, int] | None:
    """Returns counts of the answers, on process 0; None for a file that was whole before."""
    tokenizer = opened.files.tokenizer
    data, template = _data(args, opened)
    mesh = make_mesh(args.mesh, jax.local_device_count(), jax.local_devices())
    options = _options(args, opened, template, data.date)
    opened, hashes = _identified(opened)
    identity = _identity(args, hashes, data, template)
    file = AnswerFile(args.out or "", identity)
    if file.is_whole:
        say(f"{args.out}: the answers are there")
        return None
    questions, left_out = read_questions(
        data, tokenizer, template, args.system, keep_system=args.keep_system
    )
    check_ids([question.tokens for question in questions], opened.files.arch, "--model")
    fitting, notes = fit_context(questions, options)
    ignored = describe_ignored(Counter(x for question in questions for x in question.ignored))
    notes += [f"warning: {args.data}: {line}" for line in ignored]
    for line in filter(None, [describe_dtype(args.dtype, mesh), left_out, *notes]):
        say(line)
    decode = partial(decode_answer, tokenizer)
    with file.begun():
        return write_answers(file, *load_unstacked(opened, mesh), fitting, options, decode)


def _data(args: GenerateArgs, opened: OpenModel) -> tuple[DataConfig, Template | None]:
    """Returns the configuration of the prompts, and the chat template."""
    assert args.data is not None
    check_source(args.data, args.split, "--data")
    check_apart(args.data, args.split, {"--out": args.out}, "--data")
    data = DataConfig(
        path=args.data,
        split=args.split,
        date=args.date or opened.config.data.date,
        chat_template=args.chat_template,
        max_conversations=args.max_conversations,
    )
    return data, chat_template_of(data, opened.files.tokenizer)


def _options(
    args: GenerateArgs, opened: OpenModel, template: Template | None, date: str
) -> Options:
    tokenizer, folder = opened.files.tokenizer, opened.files.folder
    check_stops(tokenizer, args.stop, "--stop")
    _, texts = template_stops(tokenizer, template, date)
    stops = turn_ends(tokenizer, template, date) | stop_tokens(folder, tokenizer)
    return Options(
        sampling=_sampling(args),
        samples=args.samples,
        seed=args.seed,
        stop_tokens=stops | text_stops(tokenizer, args.stop),
        stop_texts=[*args.stop, *texts],
        max_new_tokens=args.max_new_tokens,
        context=context_length(opened.files.arch),
        batch_rows=args.batch_rows,
        vocab_size=num_entries(tokenizer),
    )


def _identified(opened: OpenModel) -> tuple[OpenModel, dict[str, str]]:
    """Returns the model at the checkpoint that is there now, and hashes of all its files."""
    hashes = opened.files.hashes
    if opened.workdir is None:
        return opened, hashes
    trained = open_trained(opened.workdir, opened.step)
    hashes["checkpoint"] = hash_checkpoint(trained.place)
    return replace(opened, step=trained.step), hashes


def _identity(
    args: GenerateArgs, hashes: dict[str, str], data: DataConfig, template: Template | None
) -> dict[str, Any]:
    """Returns all that the answers depend on, as JSON."""
    assert args.data is not None
    names = (
        "system", "keep_system", "max_new_tokens", "temperature", "top_k", "top_p", "seed",
        "samples", "stop", "dtype", "step", "max_conversations",
    )  # fmt: skip
    return {
        **{name: getattr(args, name) for name in names},
        "model": hashes,
        "data": ", ".join(hash_source(path, data.split) for path, _ in list_sources(args.data)),
        "date": data.date,
        "template": template,
    }
