"""Laws of the cache of pieces: it gives what the tokenizer gives."""

import copy
import json
import random

import numpy as np
import pytest
from tokenizers import Tokenizer

from kd_jax.data import chat, encode

PIECES = [
    "a", " the", "Don't", "I'LL", "'s", " ", "  ", "\n", "\r\n", "\t", "12345", " 7", "...", "--",
    "é", "naïve", "“", "”", "…", "Straße", "\u00a0", "_x", "{}", "<|eot_id|>", "<|eot|>", "<|",
    "日本", "🙂", "e\u0301", "\u2003", "\x1c",
]  # fmt: skip


def texts(count: int) -> list[str]:
    draw = random.Random(0)
    return ["".join(draw.choices(PIECES, k=draw.randrange(0, 40))) for _ in range(count)]


@pytest.fixture(params=["tiny", "llama3"])
def any_tokenizer(request, real_data, tokenizer):
    if request.param == "tiny":
        return tokenizer
    return chat.load_tokenizer(real_data / "llama3_tokenizer")


def patterned(tokenizer, pattern):
    """The tokenizer with words of another pattern, its digits apart if the pattern is GPT-2's."""
    other = copy.deepcopy(tokenizer)
    tree = json.loads(other.backend_tokenizer.to_str())
    to_bytes = {
        "type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False,
    }  # fmt: skip
    split = {
        "type": "Split",
        "pattern": {"Regex": pattern},
        "behavior": "Isolated",
        "invert": False,
    }
    steps = [split, to_bytes]
    if pattern == encode._GPT2:
        steps = [{"type": "Digits", "individual_digits": True}, {**to_bytes, "use_regex": True}]
    tree["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}
    tree["normalizer"] = {"type": "NFC"} if pattern == encode._QWEN2 else None
    other._tokenizer = Tokenizer.from_str(json.dumps(tree))
    return other


@pytest.mark.parametrize("pattern", [None, *sorted(encode._SPACED)], ids=lambda x: str(x)[:12])
def test_ids_and_targets_are_the_tokenizers(pattern, tokenizer, real_data, monkeypatch):
    if pattern is None:
        tokenizer = chat.load_tokenizer(real_data / "llama3_tokenizer")
    else:
        tokenizer = patterned(tokenizer, pattern)
    draw = random.Random(1)
    given = [x for x in texts(300) if len(x) > 1]
    spans = [[tuple(sorted(draw.choices(range(len(x) + 1), k=2))) for _ in range(2)] for x in given]
    assert encode._pieces_of(tokenizer) is not None
    for _ in range(2):  # the second time, every piece is known
        ours = encode.encode(tokenizer, given, spans)
    monkeypatch.setattr(encode, "_pieces_of", lambda _: None)
    theirs = encode.encode(tokenizer, given, spans)
    for mine, other, text in zip(ours, theirs, given, strict=True):
        assert np.array_equal(mine[0], other[0]) and np.array_equal(mine[1], other[1]), text


@pytest.mark.parametrize(
    "changes",
    [
        {"normalizer": {"type": "Lowercase"}},
        {"pre_tokenizer": {"type": "Whitespace"}},
        {"pre_tokenizer": None},
    ],
)
def test_other_tokenizers_have_no_cache(changes, tokenizer):
    other = copy.deepcopy(tokenizer)
    tree = json.loads(other.backend_tokenizer.to_str()) | changes
    other._tokenizer = Tokenizer.from_str(json.dumps(tree))
    assert encode._pieces_of(other) is None
