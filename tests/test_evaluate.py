"""Evaluation reports against float64 NumPy, scipy and closed forms."""

import json
import os
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
import reference
import tiny
from samples import write_lines
from scipy.stats import bootstrap, norm
from tiny import logits

from kd_jax import evaluate
from kd_jax.config import DataConfig, MeshConfig
from kd_jax.config.command import run_command
from kd_jax.data import rows as data_rows
from kd_jax.data.chat import chat_template_of
from kd_jax.inference import comparison, scores
from kd_jax.inference.arguments import EvaluateArgs
from kd_jax.inference.load import load_model, open_model
from kd_jax.models.decoder import Decoder
from kd_jax.parallel.mesh import make_mesh
from kd_jax.parallel.processes import say
from kd_jax.setup.forward import targets
from kd_jax.setup.model_files import open_model_files


def make_values(count=500, seed=0):
    """Returns values of tokens and their documents, which have very different lengths."""
    rng = np.random.default_rng(seed)
    values = {
        "ce": rng.exponential(2, count),
        "confidence": rng.random(count),
        "correct": rng.integers(0, 2, count).astype(np.float64),
    }
    documents = np.unique(np.minimum(rng.geometric(0.1, count), 30), return_inverse=True)[1]
    values["ce"] += documents / 10  # shorter documents are harder
    return values, documents


def test_means_weigh_tokens_not_documents():
    values, documents = make_values()
    sums = scores.tally(values, documents, documents.max() + 1)
    got = scores.whole(sums)
    assert got["target_tokens"] == 500 and got["ce"] == pytest.approx(values["ce"].mean())
    assert got["perplexity"] == pytest.approx(np.exp(values["ce"].mean()))
    by_document = np.array([values["ce"][documents == d].mean() for d in np.unique(documents)])
    np.testing.assert_allclose(scores.means(sums)["ce"], by_document)
    assert got["ce"] != pytest.approx(by_document.mean(), rel=1e-2)


def test_the_accepted_length_is_that_of_drawn_drafts():
    rng = np.random.default_rng(0)
    rates, documents = rng.random(30), np.repeat([0, 1, 2], [4, 6, 20])
    got = scores.accepted_length(rates, documents, 4)
    for start in range(30):
        there = rates[start : start + 4][documents[start : start + 4] == documents[start]]
        assert got[start] == pytest.approx(1 + np.cumprod(there).sum())
    tries = rng.random((40_000, 4)) < rates[10:14]  # accepted until the first refusal
    assert got[10] == pytest.approx(1 + np.cumprod(tries, axis=1).sum(axis=1).mean(), abs=0.03)
    np.testing.assert_allclose(scores.accepted_length(np.ones(9), np.zeros(9, int), 8)[:2], [9, 9])


def test_the_calibration_error_is_that_of_the_definition():
    values, documents = make_values()
    want = reference.calibration_error(values["confidence"], values["correct"])
    for groups in (documents, np.zeros_like(documents)):
        sums = scores.tally(values, groups, groups.max() + 1)
        assert scores.whole(sums)["ece"] == pytest.approx(want, rel=1e-9)
    assert reference.calibration_error(values["confidence"], values["correct"], 14) != want


def test_certain_and_right_or_wrong_are_the_extremes_of_calibration():
    for correct, want in ((np.ones(7), 0.0), (np.zeros(7), 1.0)):
        values = {"ce": np.ones(7), "confidence": np.ones(7), "correct": correct}
        assert scores.whole(scores.tally(values, np.zeros(7, int), 1))["ece"] == want


def test_the_interval_is_scipys():
    """Compares paired percentile intervals of a ratio of sums, from the same resamples."""
    values, documents = make_values()
    others = {**values, "ce": values["ce"] + np.random.default_rng(1).normal(0.1, 0.5, 500)}
    size = documents.max() + 1
    ours, theirs = (scores.tally(x, documents, size) for x in (values, others))
    got = scores.compare(ours, theirs, 950, seed=4)["ce"]

    def difference(ours, theirs, tokens, axis):
        return (ours.sum(axis) - theirs.sum(axis)) / tokens.sum(axis)

    found = bootstrap(
        (ours["ce"], theirs["ce"], ours["target_tokens"]), difference, paired=True,
        vectorized=True, n_resamples=950, batch=100, method="percentile", rng=4,
    )  # fmt: skip
    assert got["difference"] == pytest.approx((values["ce"] - others["ce"]).mean())
    assert (got["low"], got["high"]) == pytest.approx(found.confidence_interval, rel=1e-9)


def test_the_interval_of_many_like_documents_is_the_normal_one():
    rng = np.random.default_rng(0)
    count = 4000
    values = {"ce": rng.normal(2, 1, count)}
    others = {"ce": values["ce"] + rng.normal(0.2, 0.3, count)}
    groups = np.arange(count)
    pair = (scores.tally(x, groups, count) for x in (values, others))
    got = scores.compare(*pair, 4000, seed=3)["ce"]
    half = norm.ppf(0.975) * (values["ce"] - others["ce"]).std() / count**0.5
    # With unpaired resamples the interval would be five times as wide.
    assert got["high"] - got["low"] == pytest.approx(2 * half, rel=0.06)
    assert got["low"] < -0.2 < got["high"]


def test_intervals_follow_the_seed_alone():
    values, documents = make_values()
    size = documents.max() + 1
    pair = [scores.tally(v, documents, size) for v in (values, make_values(seed=1)[0])]
    first, again, other = (scores.compare(*pair, 250, seed) for seed in (0, 0, 1))
    assert first == again != other
    assert first["ce"]["difference"] == other["ce"]["difference"]
    assert first["ece"]["low"] < first["ece"]["difference"] < first["ece"]["high"]


# The command.


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("evaluate")
    tiny.write_plain_model(root / "student", seed=1)
    tiny.write_plain_model(root / "teacher", seed=2, hidden_size=96, num_hidden_layers=2)
    tiny.write_plain_model(root / "other", seed=3)
    tiny.write_plain_model(root / "foreign", seed=1)
    tiny.write_tokenizer(root / "foreign", words=["completely different words"])
    tiny.write_data(root / "data.jsonl")
    return root


def command(root, *flags, model="student"):
    argv = ["--model", root / model, "--data", root / "data.jsonl", "--seq-len", 192, *flags]
    return run_command(evaluate.main, [*map(str, argv), "--dtype", "float32"])


def evaluated(capsys, root, *flags, **options):
    capsys.readouterr()
    assert command(root, "--json", *flags, **options) == 0
    return json.loads(capsys.readouterr().out)


def expected_values(root, top_k):
    """Returns each target token's values, document and position, from full logits."""
    config = DataConfig(path=str(root / "data.jsonl"), seq_len=192, cache_dir=str(root / "rows"))
    files = open_model_files(str(root / "student"), None, "student")
    rows = data_rows.make_rows(config, files.tokenizer, chat_template_of(config, files.tokenizer))
    batch = {name: np.array(getattr(rows, name)) for name in data_rows.COLUMNS}
    labels, mask = map(np.asarray, targets(batch)[:2])
    mesh = make_mesh(MeshConfig(), 8)
    both = []
    for name in ("student", "teacher"):
        models = load_model(open_model(str(root / name), "float32"), mesh)
        model = Decoder(models.student, models.frozen)
        inputs = (batch["tokens"], batch["positions"], batch["segment_ids"])
        both.append(np.asarray(jax.jit(logits)(model, *inputs))[mask])
    document = (np.arange(len(mask))[:, None] * 1000 + batch["segment_ids"])[mask]
    values = reference.evaluate(*both, labels[mask], top_k=top_k)
    return values, document, batch["positions"][mask] + 1


def test_the_command_reports_what_float64_says(root, capsys):
    values, document, position = expected_values(root, 4)
    for length in (4, 8):
        expected = scores.accepted_length(values["acceptance"], document, length)
        values[f"accepted_length_{length}"] = expected
    got = evaluated(capsys, root, "--teacher", root / "teacher", "--top-k", 4, "--draft")

    def reported(keep):
        of = {name: value[keep].astype(np.float64) for name, value in values.items()}
        out = {name: value.mean() for name, value in of.items()}
        for who in ("", "teacher_"):
            pair = (of[f"{who}confidence"], of[f"{who}correct"])
            out[f"{who}ece"] = reference.calibration_error(*pair)
            del out[f"{who}confidence"], out[f"{who}correct"]
        gap = out["entropy"] - out["teacher_entropy"]
        counted = {"perplexity": np.exp(out["ce"]), "target_tokens": keep.sum()}
        return {**out, **counted, "entropy_gap": gap}

    rows, named = got.pop("by_position"), got.pop("arguments")
    assert got.keys() == set(scores.NAMES)
    # The gap is a small difference of entropies, each with a relative error of 1e-7.
    assert got == pytest.approx(reported(position > 0), rel=1e-5, abs=1e-6)
    assert sum(row["target_tokens"] for row in rows) == got["target_tokens"] and len(rows) > 1
    for row in rows:
        start, stop = row.pop("start"), row.pop("stop")
        assert stop == 2 * start
        want = reported((position >= start) & (position < stop))
        assert row == pytest.approx(want, rel=1e-4, abs=1e-6)
    assert named["teacher"] == str(root / "teacher") and named["against"] is None


def test_rows_are_no_longer_than_their_documents_need(root, capsys, monkeypatch):
    widths, real = [], comparison.rows_at_once
    monkeypatch.setattr(
        comparison, "rows_at_once", lambda *args: widths.append(args[2]) or real(*args)
    )
    argv = ["--model", root / "student", "--data", root / "data.jsonl", "--dtype", "float32"]
    found = []
    for flags in (["--seq-len", 512], []):
        capsys.readouterr()
        assert run_command(evaluate.main, [*map(str, [*argv, *flags]), "--json"]) == 0
        found.append(json.loads(capsys.readouterr().out))
        del found[-1]["arguments"], found[-1]["by_position"]
    assert widths[0] == 512 and widths[1] <= 256
    assert found[0] == pytest.approx(found[1], rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("overlong", ["truncate", "drop", "error"])  # of the run
def test_conversations_that_are_truncated_are_counted(overlong, root, capsys, monkeypatch):
    def open_run(*args, **options):
        model = open_model(*args, **options)
        data = replace(model.config.data, overlong=overlong)
        return replace(model, config=replace(model.config, data=data))

    monkeypatch.setattr(comparison, "open_model", open_run)
    args = EvaluateArgs(model=str(root / "student"), data=str(root / "data.jsonl"), seq_len=90)
    comparison.open_setup(args)
    assert "24 conversations, 14 truncated" in capsys.readouterr().err


def test_a_model_beside_itself_is_no_distance_away(root, capsys):
    both = ("--teacher", root / "student", "--against", root / "student")
    got = evaluated(capsys, root, *both)
    for name in ("kl_forward", "kl_reverse", "entropy_gap"):
        assert got[name] == pytest.approx(0, abs=1e-6), name
    for name in ("top1_agreement", "topk_overlap", "acceptance"):
        assert got[name] == pytest.approx(1, rel=1e-6), name
    for name in ("ce", "ece"):
        # XLA may sum the two models' logits in another order.
        assert got[f"teacher_{name}"] == pytest.approx(got[name], rel=1e-6), name
    for name, row in got["against"].items():
        assert row == {"value": got[name], "difference": 0, "low": 0, "high": 0}


def test_differences_from_a_second_model_are_those_of_its_own_evaluation(root, capsys):
    teacher = ("--teacher", root / "teacher", "--draft")
    first = evaluated(capsys, root, *teacher, "--against", root / "other", "--seed", 5)
    second = evaluated(capsys, root, *teacher, model="other")
    against = first["against"]
    left_out = {"target_tokens", *scores.TEACHERS}
    assert against.keys() == set(scores.NAMES) - left_out
    for name, row in against.items():
        assert row["value"] == pytest.approx(second[name], rel=1e-6)
        assert row["difference"] == pytest.approx(first[name] - second[name], abs=1e-6)
        assert row["low"] <= row["high"]
    values, document, _ = expected_values(root, 10)
    assert len(np.unique(document)) == 24  # resampled: each conversation
    assert first["ce"] == pytest.approx(values["ce"].mean(), rel=1e-5)


def test_without_a_teacher_only_the_students_own_is_given(root, capsys):
    got = evaluated(capsys, root, "--against", root / "other")
    own = {"ce", "perplexity", "entropy", "ece"}
    assert got.keys() == {*own, "target_tokens", "by_position", "against", "arguments"}
    assert got["against"].keys() == own


def test_the_teachers_prompt_is_what_a_model_says_with_it(root, capsys, tmp_path):
    """The teacher's cross-entropy is the student's on data that have the system message."""
    lines = map(json.loads, (root / "data.jsonl").read_text().splitlines())
    prompted = write_lines(tmp_path / "data.jsonl", [{**x, "system": "Meow."} for x in lines])
    want = evaluated(capsys, root, "--data", prompted)
    flags = ("--teacher", root / "student", "--teacher.system")
    got = evaluated(capsys, root, *flags, "Meow.")
    assert got["teacher_ce"] == pytest.approx(want["ce"], rel=1e-6)
    assert got["ce"] != pytest.approx(want["ce"], rel=1e-3) and got["kl_forward"] > 1e-3


def test_json_is_alone_whatever_is_said(root, capsys, monkeypatch):
    monkeypatch.setattr(comparison, "evaluate", lambda _: say("6 documents added") or {"ce": 1.0})
    assert evaluated(capsys, root) == {"ce": 1.0}


def test_people_get_lines_and_tables(root, capsys):
    flags = ("--teacher", root / "teacher", "--against", root / "other", "--draft")
    capsys.readouterr()
    assert command(root, *flags, "--out", root / "out.json") == 0
    text, result = capsys.readouterr().out, json.loads((root / "out.json").read_text())
    words = [line.split() for line in text.splitlines()]
    assert all([name, f"{result[name]:.6g}"] in words for name in scores.NAMES)
    assert "95 % interval" in text
    assert f"{result['against']['ce']['low']:.6g}" in text
    assert result == evaluated(capsys, root, *flags)


@pytest.mark.parametrize("flag", ["--teacher", "--against"])
def test_models_of_different_tokenizers_are_refused(flag, root, capsys):
    assert command(root, flag, root / "foreign") == 2
    error = capsys.readouterr().err
    assert f"--model, {flag}: expected one tokenizer" in error and error.count("error:") == 1


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--top-k", 0, "--bootstrap-samples", 0), "--bootstrap-samples: expected at least 1"),
        (("--top-k", 1000), "--top-k: expected at most 320"),
        (("--seq-len", 8), "no token with a loss is left within --seq-len 8"),
        (("--save",), "--save: expected a workdir as --model"),
        (("--out", "/not/there/out.json"), "--out: expected a file in an existing folder"),
        (("--step", 3), "--step: expected a workdir as --model"),
        (("--teacher.cache_missing=compute",), "--teacher-cache-missing: expected error without"),
        (("--against", "nowhere"), "--against: expected a folder or a hub id, got nowhere"),
        (("--mesh.fsdp", 3), "got fsdp 3 x tensor 1, which leave data no whole number"),
    ],
)
def test_mistakes_are_answered(flags, said, root, capsys):
    assert command(root, "--teacher", root / "teacher", *flags) == 2
    assert said in capsys.readouterr().err


@pytest.mark.timeout(600)
@pytest.mark.skipif("KD_JAX_REAL_MODEL" not in os.environ, reason="KD_JAX_REAL_MODEL names no pair")
def test_a_trained_pair_has_torchs_values(real_data):
    """The pair and reference.json are those of shared/real_model/README.md."""
    pair = Path(os.environ["KD_JAX_REAL_MODEL"])
    want = json.loads((real_data.parent / "real_model" / "reference.json").read_text())
    args = EvaluateArgs(
        model=str(pair / "student"),
        teacher=str(pair / "teacher"),
        data=str(real_data / "gsm8k_alpaca.json"),
        dtype="float32",
        seq_len=512,
        max_conversations=100,
    )
    got = comparison.evaluate(args)
    assert got["target_tokens"] == want["target_tokens"]
    names = {"ce": "student_ce", "teacher_ce": "teacher_ce", "kl_forward": "kl_teacher_student"}
    for ours, theirs in names.items():
        assert got[ours] == pytest.approx(want[theirs], abs=0, rel=1e-6), ours
