"""Texts to tokens and targets; byte-level BPE by a cache of words, almost twice as fast.

A pre-tokenizer's pattern splits text into words, whose tokens do not depend on their neighbours.
"""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import chain
from typing import Any

import numpy as np

from kd_jax.data.caching import once_per_tokenizer

Span = tuple[int, int]

_MOST_WORDS = 2**18
# Characters whose class and normal form are the same in every version of Unicode.
_STABLE = re.compile("[\t\n\r -~\u00a0-\u017e\u0180-\u024f\u2010-\u2027\u2030-\u205e]*")
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def encode(
    tokenizer: Any, texts: Sequence[str], spans: Sequence[Sequence[Span]]
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Returns each text's ids [n] int32, and the tokens with a character in its spans, [n] bool.

    Args:
      spans: [begin, end) characters of each text.
    """
    words = _words_of(tokenizer)
    found: list[Any] = [
        words and words.encode(text, some) for text, some in zip(texts, spans, strict=True)
    ]
    left = [i for i, one in enumerate(found) if one is None]
    encoded = tokenizer.backend_tokenizer.encode_batch(
        [texts[i] for i in left], add_special_tokens=False
    )
    for i, encoding in zip(left, encoded, strict=True):
        start, stop = np.array(encoding.offsets, np.int64).reshape(-1, 2).T
        target = np.zeros(len(encoding.ids), bool)
        for begin, end in spans[i]:
            target |= (stop > begin) & (start < end)
        found[i] = np.array(encoding.ids, np.int32), target
    return found


@dataclass(slots=True)
class _Words:
    """The tokens of words seen so far."""

    split: Callable[[str], list[str] | None]
    added: re.Pattern[str]
    ids: dict[str, int]
    """Ids of added tokens."""
    model: Any
    bytes_of: Any
    tokens: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def encode(self, text: str, spans: Sequence[Span]) -> tuple[np.ndarray, np.ndarray] | None:
        """Returns ids and targets as `encode`; None where only the tokenizer can tell."""
        words: list[str] = []
        for number, part in enumerate(self.added.split(text)):
            if number % 2:
                words.append(part)
            elif (some := self.split(part)) is not None:
                words += some
            else:
                return None
        try:
            tokens = [self.tokens[word] for word in words]
        except KeyError:
            self._learn(words)
            tokens = [self.tokens[word] for word in words]
        ids = np.fromiter(chain.from_iterable(tokens), np.int32)
        ends = np.cumsum(np.fromiter(map(len, words), np.int64))
        counts = np.fromiter(map(len, tokens), np.int64)
        firsts = np.append(0, np.cumsum(counts))
        if (ends[-1] if words else 0) != len(text):
            return None  # the pattern leaves out characters
        target = np.zeros(len(ids), bool)
        for begin, end in spans:
            first, last = np.searchsorted(ends, (begin, end - 1), side="right")
            for word, cut in ((first, begin), (last, end)):
                inside = word < len(words) and ends[word] - len(words[word]) < cut < ends[word]
                if inside and counts[word] > 1:
                    return None  # between tokens of a word
            if end > begin:
                target[firsts[first] : firsts[last + 1]] = True
        return ids, target

    def _learn(self, words: list[str]) -> None:
        if len(self.tokens) > _MOST_WORDS:
            self.tokens.clear()
        for word in set(words) - self.tokens.keys():
            if word in self.ids:
                self.tokens[word] = (self.ids[word],)
            else:
                ((shown, _),) = self.bytes_of.pre_tokenize_str(word)
                self.tokens[word] = tuple(token.id for token in self.model.tokenize(shown))


@once_per_tokenizer
def _words_of(tokenizer: Any) -> _Words | None:
    """Returns the words of a byte-level BPE tokenizer; None for any other."""
    import regex
    from tokenizers.pre_tokenizers import ByteLevel

    tree = json.loads(tokenizer.backend_tokenizer.to_str())
    model, added = tree["model"], tree["added_tokens"]
    strips = any(token[key] for token in added for key in ("single_word", "lstrip", "rstrip"))
    plain = all(
        not model.get(key)
        for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
    )
    pattern = _pattern(tree["pre_tokenizer"])
    normal = tree["normalizer"] in (None, {"type": "NFC"})
    if model["type"] != "BPE" or strips or not plain or not normal or pattern is None or not added:
        return None
    ids = {token["content"]: token["id"] for token in added}
    names = map(re.escape, sorted(ids, key=len, reverse=True))
    alternatives = re.compile(f"({'|'.join(names)})")
    bytes_of = ByteLevel(add_prefix_space=False, use_regex=False)
    model = tokenizer.backend_tokenizer.model
    find = regex.compile(pattern).findall

    @lru_cache(maxsize=1024)  # of the parts that a chat template repeats
    def split(part: str) -> list[str] | None:
        return find(part) if _STABLE.fullmatch(part) else None

    return _Words(split, alternatives, ids, model, bytes_of)


def _pattern(tree: Any) -> str | None:
    """Returns the pattern of words of a pre-tokenizer that has one and then maps bytes."""
    steps = [] if tree is None else tree.get("pretokenizers", [tree])
    last = steps[-1] if steps else {}
    if last.get("type") != "ByteLevel" or last["add_prefix_space"]:
        return None
    if len(steps) == 1 and last.get("use_regex", True):
        return _GPT2
    first = steps[0]
    keys = {key: first.get(key) for key in ("type", "behavior", "invert")}
    isolated = {"type": "Split", "behavior": "Isolated", "invert": False}
    if len(steps) != 2 or keys != isolated or last.get("use_regex", True):
        return None
    return first["pattern"].get("Regex")
