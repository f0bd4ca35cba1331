"""Laws of the cache of words: it gives what the tokenizer gives."""

import json
import random
import unicodedata

import numpy as np
import pytest

from kd_jax.data import chat, encode

PIECES = [
    "a", " the", "Don't", "I'LL", "'s", " ", "  ", "\n", "\r\n", "\t", "12345", " 7", "...", "--",
    "é", "naïve", "“", "”", "…", "Straße", "\u00a0", "_x", "{}", "<|eot_id|>", "<|eot|>", "<|",
    "日本", "🙂",
]  # fmt: skip


def texts(count: int) -> list[str]:
    draw = random.Random(0)
    return ["".join(draw.choices(PIECES, k=draw.randrange(0, 40))) for _ in range(count)]


@pytest.fixture(params=["tiny", "llama3"])
def any_tokenizer(request, real_data, tokenizer):
    if request.param == "tiny":
        return tokenizer
    return chat.load_tokenizer(real_data / "llama3_tokenizer")


def test_ids_and_targets_are_the_tokenizers(any_tokenizer, monkeypatch):
    draw = random.Random(1)
    given = texts(300)
    spans = [sorted(draw.sample(range(len(x) + 1), 2)) for x in given if len(x) > 1]
    given = [x for x in given if len(x) > 1]
    ours = encode.encode(any_tokenizer, given, [[pair] for pair in spans])
    words = encode._words_of(any_tokenizer)
    alone = [words and words.encode(x, []) is not None for x in given]
    monkeypatch.setattr(encode, "_words_of", lambda _: None)
    theirs = encode.encode(any_tokenizer, given, [[pair] for pair in spans])
    for mine, other, text in zip(ours, theirs, given, strict=True):
        assert np.array_equal(mine[0], other[0]) and np.array_equal(mine[1], other[1]), text
    assert words is None or 0.1 < np.mean(alone) < 0.9


def test_stable_characters_are_in_normal_form():
    every = "".join(map(chr, range(0x3000)))
    stable = "".join(encode._STABLE.findall(every))
    assert unicodedata.is_normalized("NFC", stable) and not any(map(unicodedata.combining, stable))


@pytest.mark.parametrize(
    "changes",
    [
        {"normalizer": {"type": "Lowercase"}},
        {"pre_tokenizer": {"type": "Whitespace"}},
        {"pre_tokenizer": None},
    ],
)
def test_other_tokenizers_have_no_cache(changes, tokenizer):
    import copy

    from tokenizers import Tokenizer

    other = copy.deepcopy(tokenizer)
    tree = json.loads(other.backend_tokenizer.to_str()) | changes
    other._tokenizer = Tokenizer.from_str(json.dumps(tree))
    assert encode._words_of(other) is None
