"""python -m kd_jax.generate: a model's answers to prompts, as they are made."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from kd_jax.config import Dtype, MeshConfig, UserError
from kd_jax.config.command import parse_args, run_command
from kd_jax.inference.prompts import TextWriter, check_length, encode, stop_tokens


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerateArgs:
    model: str
    """Folder in Hugging Face form, hub id, output of convert.from_hf, or a workdir."""
    prompt: tuple[str, ...]
    """Questions; several are answered side by side."""
    system: str | None = None
    """System message before each question."""
    raw: bool = False
    """Go on with the prompt as it stands, without a chat template."""
    max_new_tokens: int = 256
    """Tokens of an answer at most."""
    temperature: float = 0.0
    """0 takes the likeliest token each time; above, tokens are drawn, 1 from the model's odds."""
    top_k: int | None = None
    """Draw from the k likeliest tokens alone."""
    top_p: float | None = None
    """Draw from the fewest likeliest tokens that have this probability together."""
    seed: int = 0
    """Seeds the draws."""
    stop: tuple[str, ...] = ()
    """Texts before which an answer ends, besides the model's own end tokens."""
    dtype: Dtype = "bfloat16"
    """dtype of weights and matrix products."""
    step: int | None = None
    """Checkpoint of the workdir; None takes the latest."""
    chat_template: str | None = None
    """Jinja file to use instead of the tokenizer's own chat template."""
    date: str = "26 Jul 2024"
    """The date shown to chat templates that print today's, as day month year."""
    mesh: MeshConfig = field(default_factory=lambda: MeshConfig(data=1, tensor=-1))

    def __post_init__(self) -> None:
        limits = {
            "--prompt": (bool(self.prompt) and all(self.prompt), "text", self.prompt),
            "--max-new-tokens": (self.max_new_tokens >= 1, "at least 1", self.max_new_tokens),
            "--temperature": (self.temperature >= 0, "at least 0", self.temperature),
            "--top-k": (self.top_k is None or self.top_k >= 1, "at least 1", self.top_k),
            "--top-p": (self.top_p is None or 0 < self.top_p <= 1, "0 < p <= 1", self.top_p),
            "--stop": (all(self.stop), "text", self.stop),
        }
        wrong = [
            f"{flag}: expected {expected}, got {got!r}"
            for flag, (holds, expected, got) in limits.items()
            if not holds
        ]
        if self.temperature == 0 and (self.top_k or self.top_p):
            wrong.append("--temperature: expected above 0 beside --top-k or --top-p, got 0")
        if wrong:
            raise UserError("\n".join(wrong))


def main(argv: Sequence[str]) -> None:
    prog = "python -m kd_jax.generate"
    args = parse_args(GenerateArgs, argv, prog=prog, description=__doc__)
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
    """Yields the number of a prompt and the next piece of its answer, as they are made."""
    import jax  # seconds that --help need not pay

    from kd_jax.inference.decoding import Sampling, generate, unstack_layers
    from kd_jax.inference.load import load_model, open_model
    from kd_jax.parallel.mesh import make_mesh
    from kd_jax.setup.runtime import start_jax

    opened = open_model(args.model, args.dtype, args.step)
    tokenizer, folder = opened.source.tokenizer, opened.source.folder
    prompts = encode(
        tokenizer,
        args.prompt,
        raw=args.raw,
        system=args.system,
        chat_template=args.chat_template,
        date=args.date,
    )
    room = check_length(prompts, args.max_new_tokens, folder)
    start_jax(opened.config.compilation_cache)
    models = load_model(opened, make_mesh(args.mesh, jax.device_count()))
    unstack_layers(models.student, models.frozen)
    writers = [TextWriter(tokenizer, args.stop) for _ in prompts]
    steps = generate(
        models.student,
        models.frozen,
        prompts,
        max_new_tokens=room,
        stop_tokens=stop_tokens(folder, tokenizer),
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
