"""python -m kd_jax.generate: answers prompts, printing tokens as they are generated.

With --data and --out it answers the prompts of a file, several at a time, and writes records that
kd_jax.train reads. The same command goes on where a killed one stopped; several processes, started
as for training, share the prompts. Both change answers by rounding only.
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

from kd_jax.config import DataConfig, DistributedConfig, MeshConfig
from kd_jax.config.checks import INF, Checks, Range
from kd_jax.config.command import ModelArgs, parse_args, run_command
from kd_jax.inference.prompts import (
    TextWriter,
    chat_stops,
    check_ids,
    check_length,
    context_length,
    decode_answer,
    encode,
    stop_tokens,
    template_stops,
    turn_ends,
)

if TYPE_CHECKING:
    from kd_jax.inference.answer_file import Options
    from kd_jax.inference.load import OpenModel

DRAFT_TOKENS = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerateArgs(ModelArgs):
    prompt: tuple[str, ...] = ()
    """User messages; several are answered in one batch."""
    data: str | None = None
    """Data with prompts, in any form that training reads: conversations up to their last answer,
    which may be missing."""
    split: str | None = None
    """Split of the data, or a slice such as train[:100]; None: train, or the folder's only one."""
    max_conversations: Annotated[int | None, Range(least=1)] = None
    """Use only the first records of the data; None uses all."""
    out: str | None = None
    """File of JSON lines for the answers to --data: messages with the answer as the last turn, and
    index, sample, ended, tokens."""
    samples: Annotated[int, Range(least=1)] = 1
    """Answers to each prompt of --data."""
    batch_rows: Annotated[int | None, Range(least=1)] = None
    """Answers to --data that are decoded at once; None: as many as fit a share of the device's
    memory, up to what the platform decodes fast."""
    system: str | None = None
    """System message before each prompt; with --data in place of a record's own."""
    raw: bool = False
    """Continue the prompt as text, without a chat template."""
    draft: str | None = None
    """Smaller model, in any of --model's forms, that proposes tokens which --model checks several
    at a time (speculative decoding). The answers have the same distribution."""
    draft_tokens: Annotated[int, Range(least=1)] = DRAFT_TOKENS
    """Tokens that the draft model proposes at a time."""
    max_new_tokens: Annotated[int, Range(least=1)] = 256
    """Most tokens of an answer."""
    temperature: Annotated[float, Range(least=0, below=INF)] = 0.0
    """Sampling temperature; 0 is greedy decoding."""
    top_k: Annotated[int | None, Range(least=1)] = None
    """Sample from the k most likely tokens."""
    top_p: Annotated[float | None, Range(above=0, most=1)] = None
    """Sample from the fewest most likely tokens with this total probability."""
    seed: int = 0
    """Seed of the sampling."""
    stop: tuple[str, ...] = ()
    """Texts that end an answer, in addition to the model's end tokens; they are not printed."""
    chat_template: str | None = None
    """Jinja file to use instead of the tokenizer's own chat template."""
    date: str | None = None
    """Date for chat templates that print today's: 26 Jul 2024 or 2024-07-26; None: the run's, or
    26 Jul 2024."""
    mesh: MeshConfig = field(default_factory=lambda: MeshConfig(data=1, tensor=-1))
    distributed: DistributedConfig = field(default_factory=DistributedConfig)

    def check(self, checks: Checks) -> None:
        if self.data is None:
            if not self.prompt or not all(self.prompt):
                checks.refuse("--prompt", "text", self.prompt)
            if self.out is not None:
                checks.refuse("--out", "--data as well", self.out)
            if self.samples > 1:
                checks.refuse("--samples", "--data as well", self.samples)
            for name in ("split", "max_conversations", "batch_rows"):
                if (value := getattr(self, name)) is not None:
                    checks.refuse(f"--{name.replace('_', '-')}", "--data as well", value)
            if self.raw and (self.system is not None or self.chat_template is not None):
                checks.refuse("--raw", "no --system and no --chat-template", True)
        else:
            if self.prompt:
                checks.refuse("--prompt", "either --prompt or --data", self.prompt)
            if self.out is None:
                checks.refuse("--out", "a file for the answers", self.out)
            if self.raw:
                checks.refuse("--raw", "no --raw with --data", self.raw)
            if self.draft is not None:
                checks.refuse("--draft", "none with --data", self.draft)
        if self.draft is None and self.draft_tokens != DRAFT_TOKENS:
            checks.refuse("--draft-tokens", "--draft as well", self.draft_tokens)
        if self.temperature == 0 and self.samples > 1:
            checks.refuse("--temperature", "above 0 with --samples", 0)
        if self.temperature == 0 and (self.top_k or self.top_p):
            checks.refuse("--temperature", "above 0 with --top-k or --top-p", 0)
        if not all(self.stop):
            checks.refuse("--stop", "text", self.stop)
        if self.date is not None:
            checks.check_date(self.date, "--date")


def main(argv: Sequence[str]) -> None:
    args = parse_args(GenerateArgs, argv, __doc__)
    if args.data is not None:
        answer_data(args)
        return
    shown = [""] * len(args.prompt)
    alone = len(args.prompt) == 1
    for row, text in answers(args):
        shown[row] += text
        if alone:
            print(text, end="", flush=True)
    if alone:
        print()
    else:
        pairs = zip(args.prompt, shown, strict=True)
        print("\n\n".join(f"> {prompt}\n{text}" for prompt, text in pairs))


def answers(args: GenerateArgs) -> Iterator[tuple[int, str]]:
    """Yields pieces of the answers as they are generated: index of the prompt, text."""
    import jax  # takes seconds, which --help avoids

    from kd_jax.inference.load import describe_dtype, open_model
    from kd_jax.parallel.mesh import make_mesh
    from kd_jax.setup.runtime import start_jax

    opened = open_model(args.model, args.dtype, args.step)
    tokenizer, folder = opened.source.tokenizer, opened.source.folder
    date = args.date or opened.config.data.date
    prompts = encode(
        tokenizer,
        args.prompt,
        raw=args.raw,
        system=args.system,
        chat_template=args.chat_template,
        date=date,
    )
    check_ids(prompts, opened.source.arch, "--model")
    room = check_length(prompts, args.max_new_tokens, context_length(opened.source.arch))
    start_jax(opened.config.compilation_cache)
    mesh = make_mesh(args.mesh, jax.device_count())
    if line := describe_dtype(args.dtype, mesh):
        print(line, file=sys.stderr)
    ends, texts = (set(), []) if args.raw else chat_stops(tokenizer, args.chat_template, date)
    writers = [TextWriter(tokenizer, [*args.stop, *texts]) for _ in prompts]
    ends |= stop_tokens(folder, tokenizer)
    draft = None if args.draft is None else _open_draft(args, opened)
    if draft is not None:
        check_ids(prompts, draft[0].source.arch, "--draft")
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
    opened: "OpenModel",
    draft: "tuple[OpenModel, int] | None",
    mesh: Any,
    prompts: list[list[int]],
    room: int,
    ends: set[int],
) -> Iterator[list[list[int]]]:
    """Yields the next tokens of each row, none for rows that have ended."""
    from kd_jax.data.vocabulary import num_entries
    from kd_jax.inference.drawing import Sampling
    from kd_jax.inference.load import load_model
    from kd_jax.inference.sampling import generate
    from kd_jax.inference.speculative import Model, speculate
    from kd_jax.inference.unstacking import unstack_layers

    def load(model: "OpenModel") -> Model:
        models = load_model(model, mesh)
        unstack_layers(models.student, models.frozen)
        return Model(models.student, models.frozen)

    target = load(opened)
    sampling = Sampling(temperature=args.temperature, top_k=args.top_k, top_p=args.top_p)
    options: dict[str, Any] = {
        "max_new_tokens": room, "stop_tokens": ends, "sampling": sampling, "seed": args.seed,
        "vocab_size": num_entries(opened.source.tokenizer),
    }  # fmt: skip
    if draft is not None:
        options |= {"proposed": args.draft_tokens, "shared_size": draft[1]}
        yield from speculate(target, load(draft[0]), prompts, **options)
        return
    for tokens in generate(*target, prompts, **options):
        yield [[] if token is None else [token] for token in tokens]


def _open_draft(args: GenerateArgs, opened: "OpenModel") -> "tuple[OpenModel, int]":
    """Returns the draft model, and the vocabulary entries that it shares with the target."""
    from kd_jax.inference.load import open_model
    from kd_jax.setup.sources import compare_tokenizers

    assert args.draft is not None
    draft = open_model(args.draft, args.dtype, flag="--draft")
    return draft, compare_tokenizers(opened.source, draft.source, "--model, --draft").size


def answer_data(args: GenerateArgs) -> None:
    """Writes the answers to the prompts of args.data into args.out."""
    from kd_jax.inference.load import open_model
    from kd_jax.parallel.processes import joined, say
    from kd_jax.setup.runtime import start_jax

    opened = open_model(args.model, args.dtype, args.step)
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


def _write_answers(args: GenerateArgs, opened: "OpenModel") -> dict[str, int] | None:
    import jax

    from kd_jax.data.questions import read_questions
    from kd_jax.inference.answer_file import AnswerFile, fit_context, write_answers
    from kd_jax.inference.load import describe_dtype, load_model
    from kd_jax.inference.unstacking import unstack_layers
    from kd_jax.parallel.mesh import make_mesh
    from kd_jax.parallel.processes import say

    tokenizer = opened.source.tokenizer
    data, template = _data(args, opened)
    mesh = make_mesh(args.mesh, jax.local_device_count(), jax.local_devices())
    options = _options(args, opened, template, data.date)
    identity = _identity(args, opened, data, template)
    file = AnswerFile(args.out or "", identity)
    if file.is_whole:
        say(f"{args.out}: the answers are there")
        return None
    questions, left_out = read_questions(data, tokenizer, template, args.system)
    check_ids([question.tokens for question in questions], opened.source.arch, "--model")
    fitting, notes = fit_context(questions, options)
    for line in filter(None, [describe_dtype(args.dtype, mesh), left_out, *notes]):
        say(line)

    decode = partial(decode_answer, tokenizer)
    with file.begun():
        models = load_model(opened, mesh)
        unstack_layers(models.student, models.frozen)
        return write_answers(file, models.student, models.frozen, fitting, options, decode)


def _data(args: GenerateArgs, opened: "OpenModel") -> tuple[DataConfig, Any]:
    """Returns the configuration of the prompts, and the chat template."""
    from kd_jax.data.chat import chat_template_of
    from kd_jax.data.files import check_source, default_split

    assert args.data is not None
    split = default_split(args.data) if args.split is None else args.split
    check_source(args.data, split, "--data")
    data = DataConfig(
        path=args.data,
        split=split,
        date=args.date or opened.config.data.date,
        chat_template=args.chat_template,
        max_conversations=args.max_conversations,
    )
    return data, chat_template_of(data, opened.source.tokenizer)


def _options(args: GenerateArgs, opened: "OpenModel", template: Any, date: str) -> "Options":
    from kd_jax.data.vocabulary import num_entries
    from kd_jax.inference.answer_file import Options
    from kd_jax.inference.drawing import Sampling

    tokenizer, folder = opened.source.tokenizer, opened.source.folder
    _, texts = template_stops(tokenizer, template, date)
    return Options(
        sampling=Sampling(temperature=args.temperature, top_k=args.top_k, top_p=args.top_p),
        samples=args.samples,
        seed=args.seed,
        stop_tokens=turn_ends(tokenizer, template, date) | stop_tokens(folder, tokenizer),
        stop_texts=[*args.stop, *texts],
        max_new_tokens=args.max_new_tokens,
        context=context_length(opened.source.arch),
        batch_rows=args.batch_rows,
        vocab_size=num_entries(tokenizer),
    )


def _identity(
    args: GenerateArgs, opened: "OpenModel", data: DataConfig, template: Any
) -> dict[str, Any]:
    """Returns all that the answers depend on, as JSON."""
    from kd_jax.data.files import hash_source

    assert args.data is not None
    names = (
        "system", "max_new_tokens", "temperature", "top_k", "top_p", "seed", "samples", "stop",
        "dtype", "step", "max_conversations",
    )  # fmt: skip
    return {
        **{name: getattr(args, name) for name in names},
        "model": opened.source.hashes,
        "data": hash_source(args.data, data.split),
        "date": data.date,
        "template": template,
    }


if __name__ == "__main__":
    sys.exit(run_command(main))
