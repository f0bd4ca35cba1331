"""Prompts of data, and the records that answers to them make."""

import pytest
import tiny
from samples import chat, write_lines

from kd_jax.config import DataConfig
from kd_jax.data import questions
from kd_jax.data.questions import read_questions
from kd_jax.data.records import make_record

ANSWERED = [*chat("Add 1.", "One."), *chat("Add 2.", roles="u")]


@pytest.mark.parametrize(
    "raw",
    [
        {"messages": [ANSWERED[0], ANSWERED[1] | {"weight": 0}, ANSWERED[2]]},
        {"prompt": ANSWERED, "completion": "Three."},
        {"prompt": ANSWERED},
    ],
    ids=["a weight", "a completion", "a prompt alone"],
)
def test_an_answer_before_has_no_loss_in_the_new_record_either(raw, tokenizer, tmp_path):
    data = DataConfig(path=str(write_lines(tmp_path / "a.jsonl", [raw])))
    (question,), _ = read_questions(data, tokenizer, tiny.TEMPLATE)
    record = make_record("d:1", question.answered("Four."))
    answers = [(x["content"], y) for x, y in zip(record.messages, record.learn, strict=True)]
    assert answers[1] == ("One.", False)
    assert answers[3] == ("Four.", True)


@pytest.mark.parametrize("roles", ["u", "su"])
def test_the_new_record_may_leave_out_the_message_that_the_model_saw(roles, tokenizer, tmp_path):
    own = chat(*["Add 1.", "Add 2."][-len(roles) :], roles=roles)
    data = DataConfig(path=str(write_lines(tmp_path / "a.jsonl", [{"messages": own}])))
    kept, left = (
        read_questions(data, tokenizer, tiny.TEMPLATE, "Count.", keep_system=keep)[0][0]
        for keep in (True, False)
    )
    assert kept.tokens.tolist() == left.tokens.tolist()  # the model sees it
    seen = [{"role": "system", "content": "Count."}, own[-1]]
    assert kept.answered("4")["messages"][:-1] == seen
    assert left.answered("4")["messages"][:-1] == own


def test_a_million_prompts_take_four_bytes_a_token_and_one_rendering(
    tokenizer, tmp_path, monkeypatch
):
    rendered, render = [], questions.apply_template
    file = write_lines(tmp_path / "a.jsonl", [{"messages": ANSWERED}] * 3)
    monkeypatch.setattr(
        questions, "apply_template", lambda *x, **y: rendered.append(x) or render(*x, **y)
    )
    found, _ = read_questions(DataConfig(path=str(file)), tokenizer, tiny.TEMPLATE)
    assert len(rendered) == len(found) == 3
    assert all(x.tokens.nbytes == 4 * len(x.tokens) for x in found)


def test_an_answer_before_keeps_its_loss(tokenizer, tmp_path):
    data = DataConfig(path=str(write_lines(tmp_path / "a.jsonl", [{"messages": ANSWERED}])))
    (question,), _ = read_questions(data, tokenizer, tiny.TEMPLATE)
    assert make_record("d:1", question.answered("Four.")).learn == (True,) * 4


def test_a_bad_record_is_not_counted_as_one_without_a_prompt(tokenizer, tmp_path):
    file = write_lines(tmp_path / "a.jsonl", [{"messages": ANSWERED}, {"text": "Hi."}, {"x": 1}])
    data = DataConfig(path=str(file), on_bad_record="skip")
    found, left_out = read_questions(data, tokenizer, tiny.TEMPLATE)
    assert len(found) == 1 and ": 1 records have no prompt" in left_out
