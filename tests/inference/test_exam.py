"""Questions of the held-out data that a run answers in its evaluations."""

import dataclasses

import pytest
import tiny
from samples import chat, write_lines

from kd_jax.config import Config, DataConfig, EvalConfig, StudentConfig, UserError
from kd_jax.inference import exam
from kd_jax.setup.model_files import open_model_files


@pytest.fixture
def student(tmp_path):
    return open_model_files(str(tiny.write_plain_model(tmp_path / "student")), None, "student")


def config_for(path, **options):
    return Config(
        workdir="w",
        teacher=None,
        student=StudentConfig(path="unused"),
        data=DataConfig(path="unused"),
        eval=EvalConfig(path=str(path), **options),
        steps=1,
    )


def test_the_exam_has_the_first_questions_that_have_a_final_number(
    student, tmp_path, monkeypatch, capsys
):
    pairs = [("How many legs has a cat?", "Four.\n#### 4"), ("Why?", "So."), ("Two?", "#### 2")]
    pairs.append(("word " * student.arch.max_position_embeddings, "#### 3"))  # leaves no room
    path = write_lines(tmp_path / "data.jsonl", [{"messages": chat(*pair)} for pair in pairs])
    config = config_for(path, accuracy=9, max_new_tokens=5)
    found = exam.make_exam(config, student, tiny.TEMPLATE)
    assert "eval.accuracy: 2 of 4 records of " in capsys.readouterr().err
    prompts = [student.tokenizer.decode(x.tokens) for x in found.questions]
    assert [pairs[i][0] in text for i, text in zip((0, 2), prompts, strict=True)] == [True] * 2
    assert all(text.endswith("assistant<|end|>\n\n") for text in prompts)
    assert found.stops == {student.tokenizer.eos_token_id} and found.max_new_tokens == 5
    assert found.decode([student.tokenizer.eos_token_id]) == ""
    one = dataclasses.replace(config, eval=dataclasses.replace(config.eval, accuracy=1))
    assert str(exam.make_exam(one, student, tiny.TEMPLATE).questions) == str(found.questions[:1])
    monkeypatch.setattr(exam, "take_exam", lambda *_: exam.Accuracy(1, 4, 3))
    assert exam.grade(found, None, {}, 300) == {"accuracy": 0.25, "answers_ended": 0.75}
    assert exam.make_exam(config_for(path), student, tiny.TEMPLATE) is None


def test_data_without_final_numbers_are_refused(student, tmp_path):
    path = write_lines(tmp_path / "data.jsonl", [{"messages": chat("Why?", "So.")}])
    with pytest.raises(UserError, match=r"eval\.accuracy: expected data .* final number"):
        exam.make_exam(config_for(path, accuracy=2), student, tiny.TEMPLATE)
    with pytest.raises(UserError, match=r"eval\.accuracy: expected 0 without eval\.path, got 2"):
        dataclasses.replace(config_for(path), eval=EvalConfig(accuracy=2))
