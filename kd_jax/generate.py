"""python -m kd_jax.generate: answers prompts, printing tokens as they are generated."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Annotated

from kd_jax.config import MeshConfig
from kd_jax.config.checks import Checks, Range
from kd_jax.config.command import ModelArgs, parse_args, run_command
from kd_jax.inference.prompts import TextWriter, chat_stops, check_length, encode, stop_tokens


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerateArgs(ModelArgs):
    prompt: tuple[str, ...]
    """User messages; several are answered in one batch."""
    system: str | None = None
    """System message before each prompt."""
    raw: bool = False
    """Continue the prompt as text, without a chat template."""
    max_new_tokens: Annotated[int, Range(least=1)] = 256
    """Most tokens of an answer."""
    temperature: Annotated[float, Range(least=0)] = 0.0
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

    def check(self, checks: Checks) -> None:
        checks.require(bool(self.prompt) and all(self.prompt), "--prompt", "text", self.prompt)
        checks.require(all(self.stop), "--stop", "text", self.stop)
        greedy = self.temperature == 0 and (self.top_k or self.top_p)
        checks.require_date(self.date or "26 Jul 2024", "--date")
        checks.require(not greedy, "--temperature", "above 0 with --top-k or --top-p", 0)


def main(argv: Sequence[str]) -> None:
    args = parse_args(GenerateArgs, argv, __doc__)
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

    from kd_jax.inference.decoding import unstack_layers
    from kd_jax.inference.drawing import Sampling
    from kd_jax.inference.load import describe_dtype, load_model, open_model
    from kd_jax.inference.sampling import generate
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
    room = check_length(prompts, args.max_new_tokens, folder)
    start_jax(opened.config.compilation_cache)
    mesh = make_mesh(args.mesh, jax.device_count())
    if line := describe_dtype(args.dtype, mesh):
        print(line, file=sys.stderr)
    models = load_model(opened, mesh)
    unstack_layers(models.student, models.frozen)
    ends, texts = (set(), []) if args.raw else chat_stops(tokenizer, args.chat_template, date)
    writers = [TextWriter(tokenizer, [*args.stop, *texts]) for _ in prompts]
    steps = generate(
        models.student,
        models.frozen,
        prompts,
        max_new_tokens=room,
        stop_tokens=ends | stop_tokens(folder, tokenizer),
        sampling=Sampling(temperature=args.temperature, top_k=args.top_k, top_p=args.top_p),
        seed=args.seed,
        vocab_size=max(tokenizer.get_vocab().values()) + 1,
    )
    for tokens in steps:
        for row, (writer, token) in enumerate(zip(writers, tokens, strict=True)):
            if token is not None and (text := writer.push(token)):
                yield row, text
        if all(writer.ended for writer in writers):
            break
    for row, writer in enumerate(writers):
        if text := writer.flush():
            yield row, text


if __name__ == "__main__":
    sys.exit(run_command(main))
