"""benchmarks/quality.py: the student, the arms, the table. Runs are stand-ins, models are tiny."""

import json
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import tiny

from benchmarks import quality
from kd_jax.config import UserError
from kd_jax.config.command import parse_config
from kd_jax.inference import scores
from kd_jax.inference.comparison import Measured

RATES = {1e-3: 3.0, 1e-2: 2.0, 1e-1: 5.0}
NUM_DOCUMENTS = 12


def make_sums(seed, offset=0.0):
    rng = np.random.default_rng(seed)
    count = rng.integers(5, 30, NUM_DOCUMENTS).astype(np.float64)
    names = ("ce", "kl_forward", "top1_agreement", "acceptance", "teacher_ce")
    return {"target_tokens": count} | {
        n: count * (rng.random(NUM_DOCUMENTS) + offset) for n in names
    }


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """The benchmark on tiny folders, whose runs and measurements are stand-ins that are counted."""
    for name, layers in (("teacher", 4), ("student", 2)):
        (tmp_path / name).mkdir()
        config = tiny.make_config(num_hidden_layers=layers)
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    records = [{"instruction": f"{i}?", "input": "", "output": f"{i}"} for i in range(40)]
    (tmp_path / "data.json").write_text(json.dumps([*records, records[0]]))
    words = [str(tmp_path / name) for name in ("teacher", "student", "data.json", "out")]
    words += ["--steps", "20", "--full-seeds", "2", "--lora-seeds", "1", "--examples", "0"]
    words += ["--held-out", "5", "--validation", "3", "--data.seq-len", "64"]
    for kind in ("full", "lora"):
        words += [f"--{kind}-rates", *map(str, RATES)]
    args, flags = quality.parse(words)
    runs, measured, done = [], [], set()

    def main(words):
        config = parse_config(words)
        runs.append(config)
        done.add(config.workdir)

    def read_run(workdir):
        config = next(c for c in runs if c.workdir == str(workdir))
        ce = RATES[config.optim.learning_rate]
        ce = -ce if config.distils else ce  # then another rate is the best
        return SimpleNamespace(held_out=pd.DataFrame({"ce": [9.0, ce]}), last_step=4)

    def measure(options):
        measured.append(options)
        return Measured(make_sums(len(options.model)), {})

    monkeypatch.setattr("kd_jax.train.main", main)
    monkeypatch.setattr(quality, "completion", lambda workdir: str(workdir) in done)
    monkeypatch.setattr(quality, "read_run", read_run)
    monkeypatch.setattr(quality, "costs", lambda run: {"target_tokens": 800.0})
    monkeypatch.setattr(quality, "measure", measure)
    monkeypatch.setattr(quality, "summarise", lambda options, found: scores.whole(found.documents))
    return SimpleNamespace(args=args, flags=flags, runs=runs, measured=measured, out=args.out)


def test_results_of_other_records_and_flags_that_arms_set_are_refused(bench):
    quality.claim(bench.args)
    quality.claim(bench.args)
    bench.args.held_out += 1
    with pytest.raises(UserError, match=r"OUT: expected .* held_out 6, got results of 5"):
        quality.claim(bench.args)
    with pytest.raises(UserError, match=r"--loss.kd-ratio: expected the value of each arm"):
        quality.make_arms(bench.args, [*bench.flags, "--loss.kd_ratio", "0.3"], "full")


def test_parts_are_disjoint_and_a_question_stands_once(bench):
    quality.claim(bench.args)
    quality.split_records(bench.args)
    parts = [
        [x["instruction"] for x in json.loads((bench.out / f"{name}.json").read_text())]
        for name in ("held_out", "validation", "train")
    ]
    assert list(map(len, parts)) == [5, 3, 32]
    assert len({question for part in parts for question in part}) == 40
    before = [(bench.out / "train.json").read_bytes()]
    quality.split_records(bench.args)
    assert before == [(bench.out / "train.json").read_bytes()]


def test_each_loss_has_the_rate_that_its_search_found_and_one_budget_of_flops(bench):
    highest = max(RATES, key=RATES.get)
    for kind in ("full", "lora"):
        arms = {arm.name: arm for arm in quality.make_arms(bench.args, bench.flags, kind)}
        assert [arm.learning_rate for arm in arms.values()] == [1e-2, 1e-2, highest, highest]
        plain, control, half, whole = arms.values()
        assert [arm.kd_ratio for arm in arms.values()] == [0, 0, 0.5, 1]
        assert plain.steps == half.steps == whole.steps == 20 and control.name == quality.CONTROL
        assert half.flops == whole.flops > plain.flops == control.flops
        assert control.steps * control.flops == pytest.approx(20 * half.flops, abs=plain.flops / 2)
    searches = [run for run in bench.runs if "search" in run.workdir]
    assert {run.loss.kd_ratio for run in searches} == {0, 0.5}
    assert all(run.eval.path.endswith("validation.json") for run in searches)


def test_the_same_command_repeats_nothing(bench):
    rows = quality.compare_arms(bench.args, bench.flags)
    assert [len(row.sums) for row in rows] == [1, *[2] * 4, *[1] * 4, 1]
    assert len(bench.runs) == 2 * 2 * len(RATES) + 2 * 4 + 4
    assert len({run.workdir for run in bench.runs}) == len(bench.runs)
    assert len(bench.measured) == 1 + 2 * 4 + 4
    assert {x.data for x in bench.measured} == {str(bench.out / "held_out.json")}
    counts = len(bench.runs), len(bench.measured)
    again = quality.compare_arms(bench.args, bench.flags)
    assert (len(bench.runs), len(bench.measured)) == counts
    assert quality.make_table(again) == quality.make_table(rows)
    (bench.out / "runs" / "full-distilled-kd_ratio-1-seed1" / quality.DOCUMENTS).unlink()
    bench.args.finished_only = True
    some = {row.name: len(row.sums) for row in quality.compare_arms(bench.args, bench.flags)[:5]}
    assert list(some.values()) == [1, 2, 2, 2, 1] and len(bench.measured) == counts[1]


def test_cells_are_means_over_seeds_and_intervals_of_the_paired_bootstrap():
    options = {"kind": "full", "steps": 2, "learning_rate": 1e-3, "flops": 5e11}
    sums = {0: make_sums(0), 1: {**make_sums(1), "target_tokens": make_sums(0)["target_tokens"]}}
    low, high = ({s: {**x, "ce": x["ce"] + d} for s, x in sums.items()} for d in (0.0, 7.0))
    rows = [
        quality.Row(arm=quality.Arm(name=name, kd_ratio=r, **options), name=name, sums=found)
        for name, r, found in ((quality.CONTROL, 0.0, high), ("distilled", 1.0, low))
    ]
    table = quality.make_table(rows)
    control, distilled = (dict(zip(table.header, row, strict=True)) for row in table.rows)
    by_seed = [scores.whole(x)["ce"] for x in low.values()]
    assert distilled["CE, nats".replace(", ", ",\N{NO-BREAK SPACE}")] == f"{np.mean(by_seed):.4f}"
    pooled = [{n: some[0][n] + some[1][n] for n in some[0]} for some in (low, high)]
    want = scores.compare(*pooled, 2000, 0)["ce"]
    got = distilled["CE less control"].replace("\N{MINUS SIGN}", "-")
    assert got == f"{want['difference']:+.4f} [{want['low']:+.4f}, {want['high']:+.4f}]"
    assert control["CE less control"] == "–" and distilled["TFLOP"] == "1.0"
    bare = quality.make_table([quality.Row(name="untouched", sums={0: make_sums(0)})])
    assert quality.shorten(bare).header[0] == "student" and len(quality.shorten(bare).rows) == 1
    text = quality.markdown(table)
    assert text.count("\n| ") == len(rows) + 1 and "\N{NO-BREAK SPACE}" not in text


def test_the_teacher_agrees_with_itself():
    values = scores.whole(quality.as_teacher(make_sums(0)))
    assert (values["kl_forward"], values["top1_agreement"], values["acceptance"]) == (0, 1, 1)
    assert values["ce"] == pytest.approx(scores.whole(make_sums(0))["teacher_ce"])


@pytest.mark.parametrize("layers", [None, [1, 4]])
def test_the_student_is_transformers_model_with_the_kept_layers_alone(layers, tmp_path):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    teacher = tiny.write_model(tmp_path / "teacher", num_hidden_layers=5, dtype="bfloat16")
    quality.keep_layers(teacher, tmp_path / "student", layers)
    want, got = (AutoModelForCausalLM.from_pretrained(tmp_path / n) for n in ("teacher", "student"))
    kept = [want.model.layers[i] for i in layers or (0, 2, 4)]
    want.model.layers = torch.nn.ModuleList(kept)
    want, got = want.state_dict(), got.state_dict()
    assert want.keys() == got.keys() and any("layers.1." in name for name in got)
    assert all(torch.equal(want[name], got[name]) for name in want)
    assert (tmp_path / "student" / "tokenizer.json").is_file()
