"""Which vocabulary entries of a pair are compared, and which rows that allows."""

import copy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny

from kd_jax.config import UserError
from kd_jax.models.architecture import read_architecture
from kd_jax.setup.model_files import (
    ModelFiles,
    check_shared,
    open_model_files,
    shared_vocab,
)


def model(tokenizer, vocab_size=320, extra=()):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_tokens(list(extra))
    arch = read_architecture(tiny.make_config(vocab_size=vocab_size), "config")
    return ModelFiles(folder=Path("x"), arch=arch, tokenizer=tokenizer, adapter=None, folders={})


@pytest.mark.parametrize(
    "student, teacher, compared",
    [
        ((320, ()), None, 320),
        ((320, ()), (320, ()), 320),
        ((320, ()), (344, ()), 300),
        ((320, ("<|x|>",)), (320, ()), 300),
        ((320, ()), (344, ("<|x|>", "<|y|>")), 300),
        ((301, ("<|x|>",)), (300, ()), 300),
    ],
)
def test_entries_that_both_tokenizers_have_are_compared(
    student, teacher, compared, tokenizer, capsys
):
    ours, theirs = (one and model(tokenizer, *one) for one in (student, teacher))
    assert shared_vocab(ours, theirs).size == compared
    assert ("do not share these tokens" in capsys.readouterr().err) == (
        teacher is not None and student[1] != teacher[1]
    )


def test_an_adapter_beside_the_model_is_said(tmp_path, capsys):
    folder = str(tiny.write_plain_model(tmp_path / "x"))
    open_model_files(folder, None, "student")
    assert capsys.readouterr().err == ""
    (tmp_path / "x" / "adapter_config.json").write_text("{}")
    open_model_files(folder, None, "student")
    assert "x has a PEFT adapter too, which is not used" in capsys.readouterr().err


def test_a_head_without_all_shared_entries_is_refused(tokenizer):
    for student, teacher in ((model(tokenizer, 298), None), (model(tokenizer, 298),) * 2):
        with pytest.raises(UserError, match="expected at least 300 vocabulary entries"):
            shared_vocab(student, teacher)


def test_rows_whose_answers_have_a_token_of_one_model_alone_are_refused(tokenizer, capsys):
    student, teacher = model(tokenizer, extra=("<|x|>",)), model(tokenizer)
    tokens, mask = np.array([[1, 300, 7, 8]]), np.array([[False, False, True, True]])
    rows = SimpleNamespace(tokens=tokens, loss_mask=mask, teacher=None)
    shared, alone = shared_vocab(student, teacher), shared_vocab(student, None)
    capsys.readouterr()
    check_shared(shared, student, teacher, rows, "data.path")
    assert "data.path: prompts have tokens that are not shared: 300" in capsys.readouterr().err
    check_shared(alone, student, None, rows, "data.path")
    answers = SimpleNamespace(tokens=tokens, loss_mask=~mask, teacher=None)
    check_shared(shared_vocab(student, student), student, student, answers, "data.path")
    with pytest.raises(UserError, match=r"eval.path: has tokens that .* 300 is '<\|x\|>' and None"):
        check_shared(shared, student, teacher, answers, "eval.path")
