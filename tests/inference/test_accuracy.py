"""Exact-answer accuracy: final numbers, and the share over greedy answers."""

import dataclasses
import json

import numpy as np
import pytest
import tiny

from kd_jax import evaluate
from kd_jax.config import UserError
from kd_jax.config.command import run_command
from kd_jax.data.questions import Question
from kd_jax.inference import exam
from kd_jax.inference.accuracy import final_number, is_correct
from kd_jax.inference.arguments import EvaluateArgs
from kd_jax.inference.comparison import open_setup
from kd_jax.inference.sampling import Sampled

pytestmark = pytest.mark.fast


@pytest.mark.parametrize(
    "text, number",
    [
        ("48/2 = 24.\n#### 72", 72),
        ("#### 1 #### $1,234,567.50.", 1234567.5),
        ("#### -3 apples", -3),
        ("#### .5", 0.5),
        ("the answer is 72", None),
        ("####", None),
    ],
)
def test_the_number_after_the_last_mark_counts(text, number):
    assert final_number(text, marked=True) == number


def test_without_marks_the_last_number_counts():
    assert final_number("Weng earns 12/60 = $0.2. She earned 0.2 x 50 = $10.", False) == 10
    assert is_correct("so it is 1,000.", "She has 1000 left.")
    assert not is_correct("12 then 13", "12")
    assert not is_correct("the answer is 72", "#### 72")  # unmarked
    assert is_correct("24 + 48 = 72\n#### 72.0", "48\n#### 72")


@pytest.mark.parametrize(
    "text, number",
    [
        ("The total is:\n- 12", 12),
        ("between 3-4", 4),
        ("pages 3 to 5-", 5),
        ("x = -5", -5),
        ("a loss of -$1,200.5.", -1200.5),
        ("(-.5)", -0.5),
        ("1,2,3,4", 4),
        ("in 1,000,000", 1e6),
    ],
)
def test_a_dash_is_a_sign_only_at_its_number(text, number):
    assert final_number(text, marked=False) == number


def test_the_share_is_over_the_questions_asked(monkeypatch):
    questions = [Question(i, f"line {i}", [i] * i, f"#### {i + 3}", []) for i in (1, 2)]
    asked = []

    def sample(spec, arrays, prompts, *, max_new_tokens, **options):
        asked.extend(zip(prompts, max_new_tokens, strict=True))
        assert options["stop_tokens"] == {7}
        return Sampled([np.array([4]), np.array([4])], [], np.array([True, False]))

    monkeypatch.setattr(exam, "sample", sample)
    given = exam.Exam(
        questions=questions,
        decode=lambda tokens: f"#### {tokens[0]}",
        stops=frozenset({7}),
        context=7,
        max_new_tokens=6,
    )
    found = exam.take_exam(given, None, {}, 300)
    assert asked == [([1], 6), ([2, 2], 5)]
    assert found == (1, 2, 1) and found.scores["accuracy"] == 0.5
    assert found.scores["accuracy_standard_error"] == pytest.approx((0.25 / 2) ** 0.5)


def test_evaluate_reports_the_accuracy(tmp_path, tmp_path_factory, capsys):
    model = tiny.write_plain_model(tmp_path_factory.mktemp("model"), seed=1)
    data = tmp_path / "data.jsonl"
    records = [{"instruction": f"What is {i}?", "output": f"It is #### {i}"} for i in range(3)]
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    argv = ["--model", model, "--data", data, "--seq-len", 64, "--dtype", "float32"]
    argv = [str(word) for word in [*argv, "--json", "--accuracy", 2, "--max-new-tokens", 4]]
    assert run_command(evaluate.main, argv) == 0, capsys.readouterr().err
    result = json.loads(capsys.readouterr().out)
    assert result["accuracy_questions"] == 2 and result["accuracy"] == 0
    data.write_text(json.dumps({"instruction": "Say a word.", "output": "blue"}) + "\n")
    assert run_command(evaluate.main, argv) == 2
    assert "--accuracy: expected data whose answers have a final number" in capsys.readouterr().err


def test_a_model_without_a_template_is_asked_with_the_teachers(tmp_path, tmp_path_factory):
    teacher = tiny.write_plain_model(tmp_path_factory.mktemp("teacher"), seed=1)
    model = tiny.write_plain_model(tmp_path_factory.mktemp("model"), seed=1)
    for file in model.glob("chat_template*"):
        file.unlink()
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"instruction": "What is 1?", "output": "#### 1"}) + "\n")
    args = EvaluateArgs(
        model=str(model), teacher=str(teacher), data=str(data), accuracy=2, dtype="float32"
    )
    setup = open_setup(args)
    whole = open_setup(dataclasses.replace(args, model=str(teacher)))
    assert setup.student.files.tokenizer.chat_template is None
    assert str(setup.exam.questions) == str(whole.exam.questions)
    assert len(setup.exam.questions) == 1
    with pytest.raises(UserError, match="no tokenizer has a template"):
        open_setup(dataclasses.replace(args, teacher=None))
