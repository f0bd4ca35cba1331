"""Prompts to tokens, tokens to text, and stop conditions."""

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from kd_jax.config import UserError
from kd_jax.data.chat import end_of_turn, render_prompt
from kd_jax.data.encode import ids_of, prompt_ids
from kd_jax.data.templates import Template
from kd_jax.inference.sampling import Stop
from kd_jax.models.architecture import Architecture
from kd_jax.weights.chat_files import end_tokens
from kd_jax.weights.files import read_json


def encode(
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    raw: bool,
    system: str | None,
    template: Template | None,
    date: str,
) -> list[list[int]]:
    """Returns the tokens of each prompt, in the chat template unless `raw`.

    Args:
      system: system message before each prompt; None omits it.
      date: date for templates that print today's.
    """
    if raw:
        return [prompt_ids(tokenizer, text).tolist() for text in prompts]
    before = [] if system is None else [{"role": "system", "content": system}]
    turns = [[*before, {"role": "user", "content": text}] for text in prompts]
    texts = [render_prompt(tokenizer, some, template, date) for some in turns]
    return [ids_of(tokenizer, text).tolist() for text in texts]


def check_ids(prompts: Sequence[ArrayLike], arch: Architecture, flag: str) -> None:
    """Raises UserError for tokens that the model has no embedding of."""
    highest = max((int(np.max(prompt, initial=0)) for prompt in prompts), default=0)
    if highest >= arch.vocab_size:
        raise UserError(
            f"{flag}: expected an embedding for each token of the prompts, got a model with "
            f"{arch.vocab_size:,} and token {highest}. Its tokenizer is of another model"
        )


def check_length(prompts: list[list[int]], max_new_tokens: int, context: int) -> int:
    """Returns the number of new tokens that fit the context, at most `max_new_tokens`.

    Raises:
      UserError: a prompt fills the context, or is empty.
    """
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


def context_length(arch: Architecture) -> int:
    """Returns the model's most tokens of prompt and answer."""
    return arch.max_position_embeddings or sys.maxsize


def template_stops(
    tokenizer: Any, template: Template | None, date: str
) -> tuple[set[int], list[str]]:
    """Returns the template's end of turn as a token or, if it is several tokens, as a text.

    The text leaves out special tokens, as decoded answers do. If all tokens are special, the first
    one is the end.
    """
    if template is None:
        return set(), []
    ids, text = end_of_turn(tokenizer, template, date)
    special = set(_special_tokens(tokenizer).values())
    if len(ids) < 2 or special.issuperset(ids):
        return set(ids[:1]), []
    return set(), [text if special.isdisjoint(ids) else decode_answer(tokenizer, ids)]


def text_stops(tokenizer: Any, texts: Iterable[str]) -> set[int]:
    """Returns the tokens of the texts that are special tokens, which decoded answers lack."""
    special = _special_tokens(tokenizer)
    return {special[text] for text in texts if text in special}


def check_stops(tokenizer: Any, texts: Iterable[str], flag: str) -> None:
    """Raises UserError for a text that could never end an answer: decoded ones lack its token."""
    special = _special_tokens(tokenizer)
    for text in texts:
        if text not in special and (within := next((x for x in special if x in text), None)):
            raise UserError(
                f"{flag}: expected text without special tokens, or one special token alone, got "
                f"{text!r}, which has {within}"
            )


def _special_tokens(tokenizer: Any) -> dict[str, int]:
    """Returns the ids of the tokens that decode_answer leaves out, by text."""
    added = tokenizer.added_tokens_decoder
    return {token.content: number for number, token in added.items() if token.special}


def turn_ends(tokenizer: Any, template: Template | None, date: str) -> set[Stop]:
    """Returns the template's end of turn, a token or several one after the other; {}: none."""
    ids = () if template is None else tuple(end_of_turn(tokenizer, template, date)[0])
    return {ids if len(ids) > 1 else ids[0]} if ids else set()


def stop_tokens(folder: Path, tokenizer: Any) -> set[int]:
    """Returns the tokens that end an answer, from the folder's files and the tokenizer."""
    found = {tokenizer.eos_token_id}
    for name in ("generation_config.json", "config.json"):
        if (folder / name).is_file():
            found |= {*end_tokens(read_json(folder / name), folder / name)}
    return found - {None}


def decode_answer(tokenizer: Any, tokens: list[int]) -> str:
    """Returns the text of an answer's tokens, without special tokens."""
    return tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)


_RECENT, _COMMON = 64, 8  # tokens
_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"  # perhaps the first bytes of a character


class TextWriter:
    """Decodes tokens to text one by one, without incomplete characters and without stop texts.

    Only recent tokens are decoded with each new one. tokenizers' DecodeStream raises an error at
    invalid UTF-8 after byte fallback tokens.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()):
        self.tokenizer = tokenizer
        self.stop = stop
        self.before = ""
        self.tokens: list[int] = []
        """Recent ones; the first characters of their text, `skip`, are in `before`."""
        self.skip = 0
        self.text = ""
        self.num_sent = 0
        self.ended = False

    def push(self, token: int) -> str:
        """Returns the new text that later tokens cannot change."""
        if self.ended:
            return ""
        self.tokens.append(token)
        self.text = self.before + decode_answer(self.tokenizer, self.tokens)[self.skip :]
        if len(self.tokens) >= 2 * _RECENT and not self.text.endswith(_INCOMPLETE):
            self._settle()
        found = [at for stop in self.stop if (at := self.text.find(stop)) >= 0]
        if found:
            self.ended, self.text = True, self.text[: min(found)]
            return self._send(len(self.text))
        certain = len(self.text) - max((len(stop) - 1 for stop in self.stop), default=0)
        while certain > 0 and self.text[certain - 1] == _INCOMPLETE:
            certain -= 1
        return self._send(certain)

    def _settle(self) -> None:
        """Moves text of old tokens to `before`, unless the recent ones alone have another text."""
        recent = self.tokens[-_RECENT:]
        common, text = (decode_answer(self.tokenizer, x) for x in (recent[:_COMMON], recent))
        shown = text.removeprefix(common)
        if text == common + shown and self.text.endswith(shown):
            self.before = self.text.removesuffix(shown)
            self.tokens, self.skip = recent, len(common)

    def flush(self) -> str:
        """Returns the rest of the text after the last token."""
        return self._send(len(self.text))

    def _send(self, until: int) -> str:
        until = max(self.num_sent, until)
        text, self.num_sent = self.text[self.num_sent : until], until
        return text
