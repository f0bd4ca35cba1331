"""The demo: its language's probabilities are exact, and distillation beats fine-tuning."""

import dataclasses
import json
import math
import statistics
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from children import environment
from paths import ROOT

from kd_jax import demo
from kd_jax.config import DataConfig
from kd_jax.config.command import load_config, run_command
from kd_jax.data.rows import make_rows
from kd_jax.toy import grammar, outcome
from kd_jax.toy.models import TEMPLATE, make_tokenizer, write_llama

SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.fixture(scope="module")
def small_tokenizer():
    drawn = grammar.draw(2000, "tokenizer")
    return make_tokenizer([(question.instruction, answer) for question, answer in drawn], 640)


@pytest.fixture(scope="module")
def num_tokens(small_tokenizer):
    return lambda answer: len(small_tokenizer.encode(answer, add_special_tokens=False)) + 1


def test_the_odds_of_questions_and_of_answers_sum_to_one():
    questions = grammar.make_questions()
    assert math.fsum(q.probability for q in questions) == pytest.approx(1, abs=1e-12)
    for question in questions:
        assert math.fsum(question.answers.values()) == pytest.approx(1, abs=1e-12)
    assert len({q.instruction for q in questions}) == len(questions)


def test_an_answer_derived_in_two_ways_is_one_answer(monkeypatch):
    rules = {"a": {"x": 0.5, "xy": 0.5}, "b": {"yz": 0.5, "z": 0.5}}
    monkeypatch.setattr(grammar, "RULES", rules)
    assert grammar.expand("<a><b>") == {"xyz": 0.5, "xz": 0.25, "xyyz": 0.25}


@pytest.mark.parametrize(
    "instruction, right",
    [
        ("What is three plus four?", "It is seven."),
        ("Add six and six.", "It is twelve."),
        ("Name the capital of Ireland.", "It is Dublin."),
        ("What is the opposite of poor?", "It is rich."),
    ],
)
def test_the_right_answer_is_the_only_likeliest(instruction, right):
    (question,) = (q for q in grammar.make_questions() if q.instruction == instruction)
    first, second, *_ = sorted(question.answers.values(), reverse=True)
    assert question.exact and question.likeliest == right and first > second


def test_drawn_answers_follow_the_odds():
    drawn = grammar.draw(60_000, "odds")
    asked = Counter(question.instruction for question, _ in drawn)
    given = Counter((question.instruction, answer) for question, answer in drawn)
    for question in {q.instruction: q for q, _ in drawn}.values():
        for answer, p in question.answers.items():
            n = asked[question.instruction]
            # 1,500 answers: six deviations occur by chance once in 300,000 tests
            margin = 6 * math.sqrt(p * (1 - p) / n) + 1 / n
            assert abs(given[question.instruction, answer] / n - p) < margin


def test_the_floor_is_what_the_true_odds_cost(num_tokens):
    """Compares the floor, a closed-form sum, with the mean over a large sample."""
    drawn = grammar.draw(40_000, "floor")
    nats = [-math.log(question.answers[answer]) for question, answer in drawn]
    tokens = statistics.fmean(num_tokens(answer) for _, answer in drawn)
    floor = grammar.expected_floor(num_tokens)
    error = statistics.stdev(nats) / math.sqrt(len(nats)) / tokens
    assert abs(statistics.fmean(nats) / tokens - floor) < 5 * error
    assert grammar.realised_floor(drawn, num_tokens) == pytest.approx(floor, abs=5 * error)
    assert error < 0.01 * floor  # so that a wrong formula is seen


def test_the_floor_counts_the_tokens_that_have_a_loss(small_tokenizer, num_tokens, tmp_path):
    drawn = grammar.draw(100, "rows")
    (tmp_path / "data.jsonl").write_text(grammar.to_lines(drawn))
    data = DataConfig(path=str(tmp_path / "data.jsonl"), seq_len=96, cache_dir=str(tmp_path))
    rows = make_rows(data, small_tokenizer, TEMPLATE)
    assert rows.counts["target_tokens"] == sum(num_tokens(answer) for _, answer in drawn)


def test_the_tokenizer_gives_the_text_back(small_tokenizer):
    for question in grammar.make_questions():
        for text in (question.instruction, *question.answers, "Größe 🙂"):
            tokens = small_tokenizer.encode(text, add_special_tokens=False)
            assert small_tokenizer.decode(tokens) == text


def test_random_weights_load_in_transformers_and_know_nothing(small_tokenizer, tmp_path):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    write_llama(tmp_path / "model", small_tokenizer, seed=0, **SHAPE, **HEADS)
    model, found = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", output_loading_info=True
    )
    assert not any(found.values())
    turns = [{"role": "user", "content": "What is one plus one?"}]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    ids = tokenizer.apply_chat_template(turns, return_tensors="pt", return_dict=False)
    with torch.no_grad():
        loss = model(ids, labels=ids).loss.item()
    # nothing known costs log V; unit logits add half a nat, and 12 tokens vary by about a third
    assert abs(loss - math.log(len(tokenizer))) < 2


def test_the_arms_differ_by_the_teacher_alone():
    distil, control = (load_config(demo.CONFIGS / f"{n}.py") for n in ("distil", "finetune"))
    loss = dataclasses.replace(distil.loss, kd_ratio=control.loss.kd_ratio)
    same = dataclasses.replace(distil, teacher=None, workdir=control.workdir, loss=loss)
    assert same == control and distil.distils and not control.distils


def test_in_its_own_folder_the_demo_needs_no_flags(monkeypatch, tmp_path):
    """The config files have the paths that the demo writes."""
    monkeypatch.setattr(demo, "completion", lambda folder: True)
    shown = []
    monkeypatch.setattr(
        demo, "run", lambda stage, command, main, words, done: shown.append(words) or 0.0
    )
    monkeypatch.setattr(demo, "measure", lambda *args, **kwargs: {})
    monkeypatch.setattr(demo, "write", lambda *args: None)
    monkeypatch.setattr("kd_jax.toy.models.write_llama", lambda *args, **kwargs: 0)
    stage = demo.Stage(out=Path(demo.DemoArgs().out), console=None, log=sys.stderr, on_policy=True)
    demo.teach(stage, None)
    demo.learn(stage, None, seed=0)
    commands = [words for words in shown if words[0] == "--config"]
    stems = [Path(words[1]).stem for words in commands]
    assert stems == ["teacher", "finetune", "distil", "on_policy"]
    assert all(len(words) == 2 for words in commands)
    shown.clear()
    demo.learn(stage, None, seed=1)
    assert any("--seed" in words and "1" in words for words in shown)


def test_possible_answers_are_those_of_the_language(monkeypatch, tmp_path):
    questions = grammar.make_questions()
    said = {q.instruction: next(iter(q.answers)) for q in questions} | {"Add one and one.": "Two."}
    assert said.keys() == {q.instruction for q in questions}
    (tmp_path / "model_samples.json").write_text(json.dumps(said))
    assert demo.share_possible(tmp_path / "model") == 1 - 1 / len(questions)


def test_a_foreign_folder_is_refused_and_left_alone(tmp_path, capsys):
    (tmp_path / "letter.txt").write_text("mine")
    assert run_command(demo.main, ["--out", str(tmp_path)]) == 2
    assert "--out: expected a new folder" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]
    assert run_command(demo.main, ["--out", str(tmp_path / "letter.txt")]) == 2
    assert run_command(demo.main, ["--out", str(tmp_path / "letter.txt" / "run")]) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_the_folder_of_another_version_is_refused(tmp_path, capsys):
    demo.claim(tmp_path / "run")
    demo.claim(tmp_path / "run")
    (tmp_path / "run" / demo.MARK).write_text('{"recipe": "older"}')
    assert run_command(demo.main, ["--out", str(tmp_path / "run")]) == 2
    assert "another version" in capsys.readouterr().err


def test_no_students_are_refused(tmp_path, capsys):
    assert run_command(demo.main, ["--out", str(tmp_path / "run"), "--seeds", "0"]) == 2
    assert "--seeds: expected at least 1" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_the_readme_gives_the_reason_that_the_demo_gives():
    assert outcome.WHY in " ".join((ROOT / "README.md").read_text().split())


# The demo's code with fewer held-out examples and fewer steps.
SMALL = """
import sys
from pathlib import Path
from kd_jax import demo

demo.CONFIGS, demo.NUM_HELD_OUT = Path(sys.argv.pop(1)), 300
sys.exit(demo.run_command(demo.main))
"""
STEPS = {"teacher": (500, 300), "finetune": (150, 100), "distil": (150, 100)}


def start(root):
    """Starts the small demo as a user does: one CPU device, its own caches."""
    alone = {**environment(1), "HOME": str(root)}
    del alone["NPROC"]
    # Less time to compile, at the cost of slower steps.
    alone["XLA_FLAGS"] = "--xla_backend_optimization_level=1"
    words = ["--out", str(root / "run"), "--json"]
    return subprocess.Popen(
        [sys.executable, "-c", SMALL, str(root / "configs"), *words],
        cwd=ROOT, env=alone, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def finish(process):
    said, told = process.communicate(timeout=600)
    assert process.returncode == 0, told
    return json.loads(said)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The small demo's folder and result."""
    root = tmp_path_factory.mktemp("demo")
    (root / "configs").mkdir()
    for name, (steps, fewer) in STEPS.items():
        text = (demo.CONFIGS / f"{name}.py").read_text()
        assert name == "distil" or f" steps={steps}," in text
        text = text.replace(f" steps={steps},", f" steps={fewer},")
        (root / "configs" / f"{name}.py").write_text(text)
    return root, finish(start(root))


@pytest.mark.slow
def test_distillation_beats_fine_tuning_even_where_that_is_at_its_best(finished):
    root, result = finished
    lines = (root / "run" / "seed0" / "finetune" / "metrics.jsonl").read_text()
    records = map(json.loads, lines.splitlines())
    best = min(record["eval/ce"] for record in records if "eval/ce" in record)
    [distilled] = result["models"]["distil"]
    assert distilled["ce"] < best - 0.02


@pytest.mark.slow
def test_the_demo_ranks_its_models_and_none_knows_more_than_there_is(finished):
    models = finished[1]["models"]
    (teacher,) = models["teacher"]
    assert 0 < teacher["excess"] < 0.02 and teacher["right"] == 1
    for untouched, tuned, distilled in zip(
        models["untouched"], models["finetune"], models["distil"], strict=True
    ):
        assert untouched["excess"] > tuned["excess"] > distilled["excess"] > teacher["excess"]
        assert untouched["kl_forward"] > tuned["kl_forward"] > distilled["kl_forward"]
        assert untouched["right"] < 0.05 < tuned["right"] < distilled["right"]
        assert distilled["top1_agreement"] > 0.95


@pytest.mark.slow
def test_the_demo_is_small(finished):
    assert finished[1]["peak_memory_bytes"] < 4e9


@pytest.mark.slow
def test_the_report_holds_the_table(finished):
    page = Path(finished[1]["report"]).read_text()
    table = outcome.make_table(finished[1])
    assert all(cell in page for row in table.rows for cell in row)


@pytest.mark.slow
def test_several_seeds_give_errors_and_a_paired_gain(finished):
    result = finished[1]
    models = {
        name: [{"ce": x["ce"] + shift} for x in values for shift in (0, 0.25)]
        for name, values in result["models"].items()
    }
    models["distil"][1]["ce"] -= 0.5
    note = outcome.make_table(result | {"seeds": 2, "models": models}).note
    ((distilled,), (tuned,)) = (result["models"][name] for name in ("distil", "finetune"))
    gain = distilled["ce"] - tuned["ce"] - 0.25  # of two pairs that are half a nat apart
    assert f"in pairs: {gain:.3f} ± 0.250" in note.replace("−", "-")


@pytest.mark.slow
def test_the_same_command_does_nothing_twice(finished):
    root, result = finished
    log = root / "run" / demo.LOG
    before = log.read_text()
    again = finish(start(root))
    assert again["models"] == result["models"]
    new = log.read_text().removeprefix(before)
    assert new.count("$ ") == 1 and "kd_jax.generate" in new
