"""python -m kd_jax.generate: a model's answers to prompts, as they are made."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kd_jax.config import DataConfig, Dtype, MeshConfig, UserError
from kd_jax.config.command import parse_args, run_command


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

    from kd_jax.build import start_jax
    from kd_jax.decoding import Sampling, generate, unstack
    from kd_jax.inference import load_model, open_model
    from kd_jax.model import rebuild
    from kd_jax.sharding import make_mesh

    opened = open_model(args.model, args.dtype, args.step)
    tokenizer, folder = opened.source.tokenizer, opened.source.folder
    prompts = encode(tokenizer, args)
    room = check_length(prompts, args.max_new_tokens, folder)
    start_jax(opened.config.compilation_cache)
    models = load_model(opened, make_mesh(args.mesh, jax.device_count()))
    weights = unstack(rebuild(models.student, models.frozen))
    writers = [TextWriter(tokenizer, args.stop) for _ in prompts]
    steps = generate(
        opened.source.arch,
        weights,
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


def encode(tokenizer: Any, args: GenerateArgs) -> list[list[int]]:
    """Returns the prompts' tokens, in the chat template unless they are raw."""
    from kd_jax.data.chat import chat_template_of, render_prompt

    if args.raw:
        return [tokenizer(text)["input_ids"] for text in args.prompt]
    data = DataConfig(path="unused", chat_template=args.chat_template)
    template = chat_template_of(data, tokenizer)
    before = [] if args.system is None else [{"role": "system", "content": args.system}]
    turns = [[*before, {"role": "user", "content": text}] for text in args.prompt]
    texts = [render_prompt(tokenizer, some, template, args.date) for some in turns]
    return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]


def check_length(prompts: list[list[int]], max_new_tokens: int, folder: Path) -> int:
    """Returns the new tokens for which the context has room, at most `max_new_tokens`.

    Raises:
      UserError: a prompt fills the context, or is empty.
    """
    from kd_jax.disk import read_json

    context = read_json(folder / "config.json").get("max_position_embeddings") or sys.maxsize
    for number, prompt in enumerate(prompts, start=1):
        if not 0 < len(prompt) < context:
            raise UserError(
                f"--prompt {number}: expected 1 to {context - 1} tokens (the model's context is "
                f"{context}), got {len(prompt)}"
            )
    room = min(max_new_tokens, context - max(map(len, prompts)))
    if room < max_new_tokens:
        print(f"note: the context has room for {room} new tokens", file=sys.stderr)
    return room


def stop_tokens(folder: Path, tokenizer: Any) -> set[int]:
    """Returns the tokens that end an answer, from the folder's files and the tokenizer."""
    from kd_jax.disk import read_json

    found = {tokenizer.eos_token_id}
    for name in ("generation_config.json", "config.json"):
        if (folder / name).is_file():
            ends = read_json(folder / name).get("eos_token_id")
            found |= set(ends) if isinstance(ends, list) else {ends}
    return found - {None}


class TextWriter:
    """Turns tokens into text that grows: no half a character, nothing of a stop text."""

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()):
        self.tokenizer = tokenizer
        self.stop = stop
        self.tokens: list[int] = []
        self.text = ""
        self.num_sent = 0
        self.ended = False

    def push(self, token: int) -> str:
        """Returns the text that is certain after one more token and was not returned before."""
        if self.ended:
            return ""
        self.tokens.append(token)
        self.text = self.tokenizer.decode(
            self.tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        found = [at for stop in self.stop if (at := self.text.find(stop)) >= 0]
        if found:
            self.ended, self.text = True, self.text[: min(found)]
            return self._send(len(self.text))
        certain = len(self.text) - max((len(stop) - 1 for stop in self.stop), default=0)
        while certain > 0 and self.text[certain - 1] == "\N{REPLACEMENT CHARACTER}":
            certain -= 1  # it may be the first bytes of a character
        return self._send(certain)

    def flush(self) -> str:
        """Returns what is left when no token comes any more."""
        return self._send(len(self.text))

    def _send(self, until: int) -> str:
        until = max(self.num_sent, until)
        text, self.num_sent = self.text[self.num_sent : until], until
        return text


if __name__ == "__main__":
    sys.exit(run_command(main))
