"""Laws of ids: the cache of pieces gives the tokenizer's, and text has its begin and end."""

import copy
import json
import random

import numpy as np
import pytest
from samples import records_of, write_lines
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from kd_jax.config import DataConfig, UserError
from kd_jax.data import chat, encode
from kd_jax.data.questions import read_questions
from kd_jax.inference import prompts

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


def load_words(folder, unknown=None, **options):
    """Returns a tokenizer as Mistral's: a blank before the first word alone, and <s> before all."""
    tokens = ["<s>", "</s>", *"▁HioQ./s<>", "▁H"]
    vocab = {token: i for i, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocab, [("▁", "H")], unk_token=unknown))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.add_special_tokens(["<s>", "</s>"])
    backend.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 0)])
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=backend, **special, **options).save_pretrained(folder)
    return chat.load_tokenizer(folder)


def documents(tokenizer, file, *given):
    return chat.tokenize(
        tokenizer, records_of(write_lines(file, [*given])), None, DataConfig(path="")
    )[0]


@pytest.mark.parametrize("split_special", [False, True])
def test_begin_and_end_of_text_change_no_token_beside_them(split_special, tmp_path):
    words = load_words(tmp_path, split_special_tokens=split_special)
    (document,) = documents(words, tmp_path / "d.jsonl", {"text": "Hi. Ho."})
    assert document.tokens.tolist() == [*words("Hi. Ho.")["input_ids"], words.eos_token_id]
    assert document.target.tolist() == [False] + [True] * (len(document.tokens) - 1)


@pytest.mark.parametrize("prompt", ["Hi.", "<s>Hi."])
def test_a_prompt_of_text_begins_as_in_training(prompt, tmp_path):
    words, file = load_words(tmp_path), tmp_path / "d.jsonl"
    (document,) = documents(words, file, {"prompt": prompt, "completion": " Ho."})
    (question,), _ = read_questions(DataConfig(path=str(file)), words, None)
    assert document.tokens[: len(question.tokens)].tolist() == question.tokens.tolist()
    raw = prompts.encode(words, [prompt], raw=True, system=None, template=None, date="")
    assert raw == [question.tokens.tolist()] and raw[0].count(words.bos_token_id) == 1


def test_a_tokenizer_that_rejects_a_text_is_the_users_mistake(tmp_path):
    words = load_words(tmp_path, unknown="<unk>")
    with pytest.raises(UserError, match=r"rejects a text of the data .*<unk>"):
        documents(words, tmp_path / "d.jsonl", {"text": "x"})
    with pytest.raises(UserError, match="rejects a text"):
        prompts.encode(words, ["x"], raw=True, system=None, template=None, date="")
