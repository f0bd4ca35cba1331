"""Tokenizers that differ in added tokens alone share the others' ids."""

import copy
import json

import numpy as np
import pytest
import tiny
from samples import edited, swap_merges

from kd_jax.config import UserError
from kd_jax.data.chat import load_tokenizer
from kd_jax.data.vocabulary import SharedVocab, check_tokens, share_vocab


def swap_ids(tree):
    vocab = tree["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]


def more_merges(tree):
    """Adds a token that ordinary text uses."""
    tree["model"]["vocab"]["zq"] = max(tree["model"]["vocab"].values()) + 1
    tree["model"]["merges"].append(["z", "q"])


def with_tokens(tokenizer, *names):
    other = copy.deepcopy(tokenizer)
    other.add_tokens(list(names))
    return other


def rename(name):
    def change(tree):
        tree["added_tokens"][2]["content"] = name
        vocab = tree["model"]["vocab"]
        vocab[name] = vocab.pop("<|start|>")

    return change


@pytest.mark.parametrize("largest", [100_000, 2**31, 2**62])
def test_huge_ids_are_refused_before_memory_is_taken(largest, tmp_path):
    tiny.write_tokenizer(tmp_path)
    file = tmp_path / "tokenizer.json"
    tree = json.loads(file.read_text())
    tree["model"]["vocab"]["a"] = largest
    file.write_text(json.dumps(tree))
    with pytest.raises(UserError, match=r"expected token ids (without gaps|below 10,000,000), got"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_without_tokens_is_refused(tmp_path):
    tiny.write_tokenizer(tmp_path)
    file = tmp_path / "tokenizer.json"
    tree = json.loads(file.read_text())
    tree |= {"added_tokens": [], "model": {"type": "BPE", "vocab": {}, "merges": []}}
    file.write_text(json.dumps(tree))
    plain = {"tokenizer_class": "PreTrainedTokenizerFast"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(plain))
    with pytest.raises(UserError, match="expected token ids without gaps, got 0"):
        load_tokenizer(tmp_path)


def test_tokenizers_may_differ_in_the_template(tokenizer):
    other = copy.deepcopy(tokenizer)
    other.chat_template = "another"
    assert share_vocab(tokenizer, other, "s", "t", "models") == SharedVocab(len(tokenizer), {})


@pytest.mark.parametrize(
    "change, said",
    [
        (swap_merges, "s and t, which differ in the merges"),
        (swap_ids, "s and t, which differ in 2 tokens ("),
        (more_merges, "s and t, which differ in 1 tokens (300 is None and 'zq')"),
    ],
)
def test_other_tokens_and_merges_are_refused(change, said, tokenizer, tmp_path):
    with pytest.raises(UserError) as caught:
        share_vocab(tokenizer, edited(tmp_path, change), "s", "t", "models")
    assert said in str(caught.value)


def test_the_ids_that_both_have_are_shared(tokenizer, tmp_path):
    size = len(tokenizer)
    more = with_tokens(tokenizer, "<|PAD_TOKEN|>", "<|more|>")
    differ = {size: ("<|PAD_TOKEN|>", None), size + 1: ("<|more|>", None)}
    assert share_vocab(more, tokenizer, "s", "t", "models") == SharedVocab(size, differ)
    swapped = {i: (theirs, ours) for i, (ours, theirs) in differ.items()}
    assert share_vocab(tokenizer, more, "s", "t", "models") == SharedVocab(size, swapped)
    renamed = edited(tmp_path, rename("<|im_end|>"))
    shared = share_vocab(renamed, tokenizer, "s", "t", "models")
    assert shared == SharedVocab(size, {2: ("<|im_end|>", "<|start|>")})
    assert shared.describe() == "2 is '<|im_end|>' and '<|start|>'"


def test_a_text_without_added_tokens_has_the_same_ids_in_both(tokenizer, tmp_path):
    text = "the cat sat on the mat, 42 times."
    for other in (with_tokens(tokenizer, "<|x|>"), edited(tmp_path, rename("<|im_end|>"))):
        share_vocab(tokenizer, other, "s", "t", "models")
        assert other(text)["input_ids"] == tokenizer(text)["input_ids"]


SHARED = SharedVocab(10, {4: ("<|a|>", "<|b|>"), 12: ("<|c|>", None)})
PLAIN = np.array([[1, 2, 3, 5], [6, 7, 8, 9]])
MASK = np.array([[False, True, True, True], [False, False, True, True]])


def changed(row, column, value):
    tokens = PLAIN.copy()
    tokens[row, column] = value
    return tokens


def test_tokens_that_are_not_shared_may_stand_in_prompts_only():
    assert check_tokens(SHARED, PLAIN, MASK, 20, "data.path") == ""
    assert check_tokens(SharedVocab(10, {}), changed(0, 1, 4), MASK, 20, "data.path") == ""
    said = check_tokens(SHARED, changed(1, 1, 4), MASK, 20, "data.path")
    assert said == ("data.path: prompts have tokens that are not shared: 4 is '<|a|>' and '<|b|>'")
    for tokens, rows in ((changed(0, 1, 4), 20), (changed(1, 3, 12), 20), (changed(1, 0, 12), 12)):
        with pytest.raises(UserError, match=r"data.path: has tokens that the student and the"):
            check_tokens(SHARED, tokens, MASK, rows, "data.path")
