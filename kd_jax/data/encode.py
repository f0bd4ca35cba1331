"""Texts to tokens and targets; byte-level BPE by a cache of what stands between spaces."""

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from kd_jax.config import UserError
from kd_jax.config.errors import first_line

Span = tuple[int, int]
Encoded = tuple[np.ndarray, np.ndarray]
"""Ids [n] int32, and True for the tokens with a character in one of the text's spans, [n] bool."""

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (  # pieces of text, whose ends no token crosses
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = LLAMA3.replace("{1,3}", "")
# No word of these patterns has a space after another character than white space, so that such a
# space begins a word, and tokens before it do not depend on what follows.
_SPACED = {_GPT2, LLAMA3, _QWEN2}
_SPACE = re.compile(r"(?<=\S) (?=\S)")

_MOST_PIECES = 2**18
_LONGEST_PIECE = 64
"""Characters of a piece that is remembered."""


def encode(tokenizer: Any, texts: Sequence[str], spans: Sequence[Sequence[Span]]) -> list[Encoded]:
    """Returns each text's ids, and which tokens have a character in its spans.

    Args:
      spans: [begin, end) characters of each text.
    """
    spans = [[(begin, end) for begin, end in some if begin < end] for some in spans]
    with _naming(tokenizer):
        if (pieces := _pieces_of(tokenizer)) is not None:
            return pieces.encode(texts, spans)
        encodings = tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)
    return [
        (np.array(encoding.ids, np.int32), _targets(encoding.offsets, some))
        for encoding, some in zip(encodings, spans, strict=True)
    ]


def ids_of(tokenizer: Any, text: str) -> np.ndarray:
    """Returns a text's ids [n] int32, without those that the tokenizer adds."""
    return encode(tokenizer, [text], [()])[0][0]


def prompt_ids(tokenizer: Any, text: str) -> np.ndarray:
    """Returns the ids of a prompt of text, which begins as the texts of training do."""
    begin, _ = edges(tokenizer, text)
    return np.concatenate([np.array(begin, np.int32), ids_of(tokenizer, text)])


def edges(tokenizer: Any, text: str) -> tuple[list[int], list[int]]:
    """Returns the ids of begin and end of text, each [] if there is none or the text has it.

    Ids beside the text, since in the text they would change the tokens next to them.
    """
    first, last = tokenizer.bos_token_id, tokenizer.eos_token_id
    begins = tokenizer.backend_tokenizer.encode("").ids[:1] == [first]
    begin = [first] if begins and not text.startswith(tokenizer.bos_token) else []
    return begin, [] if last is None or text.endswith(tokenizer.eos_token) else [last]


@contextmanager
def _naming(tokenizer: Any) -> Iterator[None]:
    """Names the tokenizer that rejects a text: one without a token for unknown characters."""
    try:
        yield
    except Exception as error:
        if type(error) is not Exception:  # the tokenizers library raises no narrower one
            raise
        raise UserError(
            f"{tokenizer.name_or_path}: expected a tokenizer for any text, got one that rejects a "
            f"text of the data ({first_line(error)})"
        ) from None


def _targets(offsets: Sequence[Span], spans: Sequence[Span]) -> np.ndarray:
    start, stop = np.array(offsets, np.int64).reshape(-1, 2).T
    target = np.zeros(len(offsets), bool)
    for begin, end in spans:
        target |= (stop > begin) & (start < end)
    return target


@dataclass(slots=True)
class _Pieces:
    """The tokens of pieces: added tokens, and texts up to the next space that begins a word."""

    backend: Any
    added: re.Pattern[str]
    """Matches the added tokens."""
    tokens: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def encode(self, texts: Sequence[str], spans: Sequence[Sequence[Span]]) -> list[Encoded]:
        split = [self._split(text) for text in texts]
        pieces = list(chain.from_iterable(split))
        tokens = self._tokens(pieces)
        ids = np.fromiter(chain.from_iterable(tokens), np.int32)
        # Tokens and characters in the first n pieces of all texts.
        num_tokens = np.append(0, np.cumsum(np.fromiter(map(len, tokens), np.int64)))
        num_chars = np.append(0, np.cumsum(np.fromiter(map(len, pieces), np.int64)))
        target = np.zeros(len(ids), bool)
        encoded: list[Encoded] = []
        first = 0
        for some, own in zip(split, spans, strict=True):
            last = first + len(some)
            for span in own:
                begin, end = (int(num_chars[first]) + place for place in span)
                low = int(np.searchsorted(num_chars, begin, side="right")) - 1
                high = int(np.searchsorted(num_chars, end, side="left"))
                target[num_tokens[low + 1] : num_tokens[high - 1]] = True
                for i in {low, high - 1}:
                    start = num_chars[i]
                    target[num_tokens[i] : num_tokens[i + 1]] |= (
                        begin <= start and num_chars[i + 1] <= end
                    ) or _targets(self._offsets(pieces[i]), [(begin - start, end - start)])
            own_tokens = slice(num_tokens[first], num_tokens[last])
            encoded.append((ids[own_tokens], target[own_tokens]))
            first = last
        return encoded

    def _split(self, text: str) -> list[str]:
        pieces: list[str] = []
        for number, part in enumerate(self.added.split(text)):
            if number % 2:
                pieces.append(part)
            elif part:
                begin, *others = _SPACE.split(part)
                pieces.append(begin)
                pieces += [f" {other}" for other in others]
        return pieces

    def _tokens(self, pieces: list[str]) -> list[tuple[int, ...]]:
        if len(self.tokens) > _MOST_PIECES:
            self.tokens.clear()
        new = list(set(pieces) - self.tokens.keys())
        encodings = self.backend.encode_batch(new, add_special_tokens=False)
        for piece, encoding in zip(new, encodings, strict=True):
            self.tokens[piece] = tuple(encoding.ids)
        tokens = [self.tokens[piece] for piece in pieces]
        for piece in new:
            if len(piece) > _LONGEST_PIECE:
                del self.tokens[piece]
        return tokens

    def _offsets(self, piece: str) -> list[Span]:
        return self.backend.encode(piece, add_special_tokens=False).offsets


_PIECES: WeakKeyDictionary[Any, _Pieces | None] = WeakKeyDictionary()
"""By tokenizer, none of which it keeps alive: one can use more memory than a small model."""


def _pieces_of(tokenizer: Any) -> _Pieces | None:
    """Returns the pieces of a byte-level BPE tokenizer with a known pattern; None for any other."""
    if tokenizer not in _PIECES:
        _PIECES[tokenizer] = _make_pieces(tokenizer)
    return _PIECES[tokenizer]


def _make_pieces(tokenizer: Any) -> _Pieces | None:
    from tokenizers.models import BPE

    backend = tokenizer.backend_tokenizer
    added = backend.get_added_tokens_decoder().values()
    if (
        not isinstance(backend.model, BPE)
        or backend.model.dropout
        or any(token.single_word or token.lstrip or token.rstrip for token in added)
        or _tree(backend.normalizer) not in (None, {"type": "NFC"})
        or not _is_spaced(_tree(backend.pre_tokenizer))
    ):
        return None
    names = map(re.escape, sorted((token.content for token in added), key=len, reverse=True))
    return _Pieces(backend, re.compile(f"({'|'.join(names) or '(?!)'})"))


def _tree(part: Any) -> Any:
    """Returns a normalizer or pre-tokenizer as in tokenizer.json, which is slow to write whole."""
    return part and json.loads(part.__getstate__())


def _is_spaced(tree: Any) -> bool:
    """Returns True for a pre-tokenizer that splits by a pattern of _SPACED and then maps bytes."""
    steps = [] if tree is None else tree.get("pretokenizers", [tree])
    if steps and steps[0]["type"] == "Digits":  # splits words further
        steps = steps[1:]
    last = steps[-1] if steps else {}
    if last.get("type") != "ByteLevel" or last["add_prefix_space"]:
        return False
    if len(steps) == 1:
        return last.get("use_regex", True)
    keys = {key: steps[0].get(key) for key in ("type", "behavior", "invert")}
    isolated = {"type": "Split", "behavior": "Isolated", "invert": False}
    is_split = len(steps) == 2 and keys == isolated and not last.get("use_regex", True)
    return is_split and steps[0]["pattern"].get("Regex") in _SPACED
