"""Reports over workdirs with known numbers."""

import base64
import dataclasses
import io
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tiny
from PIL import Image
from scipy import stats

from kd_jax import report
from kd_jax.config import (
    Config,
    DataConfig,
    EvalConfig,
    LogConfig,
    LossConfig,
    OptimConfig,
    StudentConfig,
    TeacherConfig,
)
from kd_jax.config.command import run_command
from kd_jax.config.record import dump
from kd_jax.reporting import curves, provenance, tables
from kd_jax.reporting import page as reporting_page
from kd_jax.reporting.arms import find_controls, make_arms
from kd_jax.reporting.teacher_cost import shared_table
from kd_jax.reporting.texts import samples_tables
from kd_jax.workdir import history

STEPS = 20
BASE = Config(
    workdir="unset",
    teacher=TeacherConfig(path="models/teacher"),
    student=StudentConfig(path="models/student"),
    data=DataConfig(path="data/train.json"),
    eval=EvalConfig(path="data/held_out.json", every_steps=5),
    steps=STEPS,
)


def write_run(folder, *, ratio=0.5, rate=1e-3, last=STEPS, inputs=None, record=None, **changes):
    """Writes a workdir with numbers determined by ratio, rate and seed."""
    config = dataclasses.replace(
        BASE,
        workdir=str(folder),
        loss=LossConfig(kd_ratio=ratio),
        optim=OptimConfig(learning_rate=rate),
        **changes,
    )
    distils = config.distils
    hashes = {"student.path": "s" * 64, "data.path": "d" * 20}
    hashes |= {"teacher.path": "t" * 64} if distils else {}
    folder.mkdir(parents=True)
    tree = {"config": dump(config), "inputs": hashes | (inputs or {}), "versions": {"jax": "0.10"}}
    (folder / "config.json").write_text(json.dumps(tree | (record or {})))
    rng = np.random.default_rng([config.seed, int(100 * ratio), int(rate * 1e6)])
    lines = []
    for step in range(1, last + 1):
        ce = 2 + 5 * np.exp(-step / 5) - ratio + 0.1 * rng.normal()
        kl = {"kd_loss": ce / 2, "top1_agreement": 1 - np.exp(-step / 9)} if distils else {}
        costs = {
            "step_seconds": 2.0 + step % 2,
            "tokens_per_second": 1000.0,
            "target_tokens_per_second": 500.0,
            "peak_memory_bytes": 2**30 + step,
        }
        if step % config.log.every_steps == 0:
            values = {"loss": ce, "ce_loss": ce, "learning_rate": rate, "grad_norm": 1.0}
            lines.append({"step": step, **values, **kl, **costs})
        if step % 5 == 0:
            kl = {"eval/kl_forward": ce / 2, "eval/top1_agreement": 0.5 + 0.01 * step}
            values = {"eval/loss": ce + (step == STEPS), "eval/ce": ce, "eval/target_tokens": 99}
            lines.append({"step": step, **values, **(kl if distils else {})})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def write_arms(root, ratios=(0, 0.5, 1), seeds=3, **options):
    return [
        write_run(root / f"{ratio}-{seed}", ratio=float(ratio), seed=seed, **options)
        for ratio in ratios
        for seed in range(seeds)
    ]


def last(folder, name):
    lines = tiny.read_lines(folder / "metrics.jsonl")
    return [line[name] for line in lines if name in line][-1]


def run(*argv):
    return run_command(report.main, [str(word) for word in argv])


def find(found, title):
    return next(table for table in found if title in table.title)


def numbers(cell):
    return [float(part.replace("−", "-").replace(",", "")) for part in cell.split(" ± ")]


def arms_of(folders):
    return make_arms(history.read_runs(folders))


@pytest.fixture
def one_figure(monkeypatch):
    """Draws one figure instead of eleven, to save seconds."""
    monkeypatch.setattr(curves, "FIGURES", curves.FIGURES[:1])


def tables_of(folders, control=None):
    arms = arms_of(folders)
    return tables.result_tables(arms, find_controls(arms, control)[0])


# The numbers.


def test_means_and_spreads_are_numpys(tmp_path):
    folders = write_arms(tmp_path)
    table = find(tables_of(folders), "by the last evaluation")
    for row, ratio in zip(table.rows, (0, 0.5, 1), strict=True):
        values = [last(tmp_path / f"{ratio}-{seed}", "eval/ce") for seed in range(3)]
        assert row[:2] == [f"{ratio:g}", "3"]
        assert numbers(row[2]) == pytest.approx([np.mean(values), np.std(values, ddof=1)], abs=5e-5)
    assert table.rows[0][3:] == ["–"] * (len(table.header) - 3)


def test_differences_are_the_paired_t_test_of_scipy(tmp_path):
    folders = write_arms(tmp_path)
    table = find(tables_of(folders), "Differences from the control (0), by the last evaluation")
    assert table.header[2:] == ["CE,\N{NO-BREAK SPACE}nats", "t"]  # the control has no KL
    for row, ratio in zip(table.rows, (0.5, 1), strict=True):
        ours, theirs = (
            [last(tmp_path / f"{r}-{seed}", "eval/ce") for seed in range(3)] for r in (ratio, 0)
        )
        test = stats.ttest_rel(ours, theirs)
        mean = np.mean(np.subtract(ours, theirs))
        assert numbers(row[2]) == pytest.approx([mean, mean / test.statistic], abs=5e-5)
        assert numbers(row[3]) == pytest.approx([test.statistic], abs=0.05)
    assert "n = 3: beyond ±4.3" in table.note  # Student's t, two degrees of freedom


def test_pairs_are_of_the_same_seed(tmp_path):
    folders = write_arms(tmp_path, ratios=(0, 1), seeds=2)
    folders.append(write_run(tmp_path / "more", ratio=1.0, seed=7))
    table = find(tables_of(folders), "Differences")
    deltas = [
        last(tmp_path / f"1-{s}", "eval/ce") - last(tmp_path / f"0-{s}", "eval/ce") for s in (0, 1)
    ]
    assert table.rows[0][1] == "2"
    assert numbers(table.rows[0][2])[0] == pytest.approx(np.mean(deltas), abs=5e-5)


def test_one_seed_has_no_spread_and_no_error(tmp_path):
    found = tables_of(write_arms(tmp_path, seeds=1))
    assert all("±" not in cell for table in found for row in table.rows for cell in row)
    assert "run more seeds" in find(found, "Differences").note


def test_the_best_evaluation_is_the_one_of_lowest_loss(tmp_path):
    found = tables_of(write_arms(tmp_path, seeds=1))  # in which the last step has a higher loss
    table = find(found, "Held-out text, by each run’s best")
    lines = (tmp_path / "1-0" / "metrics.jsonl").read_text().splitlines()
    evaluations = [line for line in map(json.loads, lines) if "eval/ce" in line]
    best = min(evaluations, key=lambda line: line["eval/loss"])
    assert numbers(table.rows[2][2]) == pytest.approx([best["eval/ce"]], abs=5e-5)
    assert best["step"] != STEPS


def test_a_later_evaluation_is_a_source_of_its_own(tmp_path):
    folders = write_arms(tmp_path, ratios=(0, 1), seeds=2)
    for number, folder in enumerate(folders):
        values = {"ce": 1.0 + number, "kl_forward": 2.0, "target_tokens": 9}
        (folder / "evaluation.json").write_text(json.dumps(values))
    found = tables_of(folders)
    means = find(found, "Held-out text, by kd_jax.evaluate")
    assert [numbers(row[2])[0] for row in means.rows] == [1.5, 3.5]
    deltas = find(found, "Differences from the control (0), by kd_jax.evaluate")
    assert deltas.rows[0][2:] == ["+2.0000 ± 0.0000", "–", "+0.0000 ± 0.0000", "–"]
    assert "Careful" not in means.note
    values = {"ce": 1.0, "arguments": {"data": "other.json", "model": "x"}}
    (folders[0] / "evaluation.json").write_text(json.dumps(values))
    values["arguments"]["data"] = "held_out.json"
    (folders[1] / "evaluation.json").write_text(json.dumps(values))
    means = find(tables_of(folders), "Held-out text, by kd_jax.evaluate")
    assert means.note.endswith("Careful: these evaluations differ in data.")
    for step, prompt in ((None, "Be brief."), (3, None)):
        values["arguments"] |= {"step": step, "teacher_system": prompt, "teacher_messages": False}
        (folders[step is None] / "evaluation.json").write_text(json.dumps(values))
    means = find(tables_of(folders), "Held-out text, by kd_jax.evaluate")
    assert means.note.endswith(
        "Careful: these evaluations differ in teacher_system."
        " Careful: of an earlier step than the last: 0-0."
    )
    (folders[0] / "evaluation.json").unlink()
    found = tables_of(folders)
    assert [row[1] for row in find(found, "Held-out text, by kd_jax.evaluate").rows] == ["1", "2"]
    assert find(found, "Differences from the control (0), by kd_jax.evaluate").rows[0][1] == "1"


def test_evaluations_on_different_tokens_are_said(tmp_path):
    folders = write_arms(tmp_path, ratios=(0, 1), seeds=1)
    notes = [table.note for table in tables_of(folders) if table.title.startswith("Held-out")]
    assert notes and not any("Careful" in note for note in notes)
    file = folders[0] / "metrics.jsonl"
    file.write_text(
        file.read_text().replace('"eval/target_tokens": 99', '"eval/target_tokens": 98')
    )
    notes = [table.note for table in tables_of(folders) if table.title.startswith("Held-out")]
    assert all(note.endswith("these evaluations differ in target_tokens.") for note in notes)


@pytest.mark.parametrize("kind", ["hidden", "topk", "sampled"])
def test_metrics_of_a_part_of_the_teachers_distribution_are_said_to_be_that(kind, tmp_path):
    (tmp_path / "manifest.json").write_text(json.dumps({"kind": kind}))
    teacher = dataclasses.replace(BASE.teacher, cache=str(tmp_path))
    found = tables_of(write_arms(tmp_path / "runs", (0, 0.5), seeds=1, teacher=teacher))
    note = find(found, "Held-out text, by the last").note
    assert (f"with a {kind} cache KL" in note) == (kind != "hidden")


def test_unfinished_runs_take_no_part_in_means(tmp_path, one_figure):
    folders = write_arms(tmp_path, ratios=(0, 1), seeds=2)
    whole = tables_of(folders)
    folders.append(write_run(tmp_path / "cut", ratio=1.0, seed=2, last=11))
    assert [table.rows for table in tables_of(folders)] == [table.rows for table in whole]
    arms = arms_of(folders)
    assert find([tables.arms_table(arms, {})], "Arms").rows[1][2] == "1 of 3 unfinished"
    assert ["cut", "2", "unfinished at step 11 of 20"] in [
        list(row[:3]) for row in tables.runs_table(arms).rows
    ]
    assert run(*folders, "--out", tmp_path / "out") == 0
    assert "1 unfinished" in (tmp_path / "out" / "index.html").read_text()


def test_a_report_of_unfinished_runs_alone_is_possible(tmp_path, one_figure):
    folder = write_run(tmp_path / "cut", last=3)
    assert run(folder, "--out", tmp_path / "out") == 0


def test_costs_count_every_step_logged_or_not(tmp_path):
    whole = write_run(tmp_path / "whole", seed=0)
    sparse = write_run(tmp_path / "sparse", seed=1, log=LogConfig(every_steps=10))
    for folder, seconds in ((whole, 50.0), (sparse, 40.0)):  # even steps take 2 s, odd ones 3 s
        found = history.read_run(folder)
        assert found.finished
        costs = tables.costs(found)
        assert costs["seconds"] == pytest.approx(seconds)
        assert costs["tokens"] == pytest.approx(1000 * seconds)
    table = tables.cost_table(arms_of([whole, sparse]))
    assert table.rows[0][2] == "45.0 ± 7.1" and "not logged" in table.note
    assert "not logged" not in tables.cost_table(arms_of([whole])).note


def test_runs_of_a_cache_pay_for_the_teacher_once(tmp_path, one_figure):
    """Three runs of 50 s and 50,000 tokens, and a teacher that took 2 ms a token and 30 s."""
    cache = tmp_path / "cache"
    parts = [
        {"tokens": 8000, "seconds": 20.0, "warm_tokens": 7000, "warm_seconds": 14.0},
        {"tokens": 1000, "seconds": 10.0, "warm_tokens": 1000, "warm_seconds": 2.0},
    ]
    for number, cost in enumerate(parts):
        (cache / f"part000{number}").mkdir(parents=True)
        (cache / f"part000{number}" / "cost.json").write_text(json.dumps(cost))
    (tmp_path / "link").symlink_to(cache)
    by_link, teacher = (
        dataclasses.replace(BASE.teacher, cache=str(tmp_path / name)) for name in ("link", "cache")
    )
    folders = write_arms(tmp_path / "runs", (0, 0.5), 2, teacher=teacher)
    folders += [write_run(tmp_path / "again", seed=2, teacher=by_link)]
    cut = write_run(tmp_path / "cut", ratio=1.0, last=3, teacher=teacher)
    (row,) = shared_table(history.read_runs([*folders, cut]))[0].rows
    assert row == [str(cache), "3", "30.0", "150.0", "180.0", "450.0", "40.0"]
    elsewhere = dataclasses.replace(BASE.teacher, cache=f"{cache}/../elsewhere")
    away = write_run(tmp_path / "away", ratio=1.0, teacher=elsewhere)
    (row,) = shared_table(history.read_runs([away]))[0].rows
    assert row == [str(tmp_path / "elsewhere"), "1", "–", "50.0", "–", "–", "–"]
    assert not shared_table(history.read_runs(write_arms(tmp_path / "live")))
    assert run(*folders, "--out", tmp_path / "out") == 0
    assert "share a teacher" in (tmp_path / "out" / "index.html").read_text()


def test_where_runs_differ_hardware_and_versions_are_counted(tmp_path):
    folders = [
        write_run(tmp_path / f"{seed}", seed=seed, record={"devices": device, "git_commit": "c0"})
        for seed, device in enumerate(["1 x A", "8 x B", "1 x A"])
    ]
    arms = arms_of(folders)
    table = provenance.setup_table(arms)
    assert table.note == "" and table.rows == [
        ["devices", "1 x A (2 runs); 8 x B (1 run)"],
        ["commit", "c0"],
        ["jax", "0.10"],
    ]
    fields = dict(provenance.config_table(arms).rows)
    assert fields["loss.kd-ratio"] == "0.5" and not {"seed", "workdir"} & fields.keys()


def test_what_differed_when_a_run_resumed_is_named(tmp_path):
    first = {"step": 0, "versions": {"jax": "0.10"}, "devices": "1 x A", "git_commit": "c0"}
    starts = [first, first | {"step": 4}, first | {"step": 6, "versions": {"jax": "0.11"}}]
    starts.append(first | {"step": 8, "devices": "8 x B"})
    folders = [
        write_run(tmp_path / "plain", seed=1, record=first),
        write_run(tmp_path / "moved", record=first | {"starts": starts}),
    ]
    arms = arms_of(folders)
    table = provenance.setup_table(arms)
    assert table.rows[0] == ["devices", "1 x A"] and table.rows[2] == ["jax", "0.10"]
    moved = "moved from step 6 on: jax 0.11; moved from step 8 on: devices 8 x B"
    assert table.note == f"As each run began. Resumed on others: {moved}."
    assert [row[4] for row in tables.runs_table(arms).rows] == ["4", "–"]


def test_starts_of_an_earlier_versions_run_are_counted_by_the_event_files(tmp_path):
    folder = write_run(tmp_path / "run")
    assert tables.runs_table(arms_of([folder])).rows[0][4] == "–"
    (folder / "tensorboard").mkdir()
    for name in ("a", "b"):
        (folder / "tensorboard" / f"events.out.tfevents.{name}").touch()
    assert tables.runs_table(arms_of([folder])).rows[0][4] == "2"


def test_the_recorded_number_of_steps_tells_who_is_finished(tmp_path):
    epochs = {"steps": None, "epochs": 1.0}
    folder = write_run(tmp_path / "a", last=9, record={"num_steps": 12}, **epochs)
    assert history.read_run(folder).status == "unfinished at step 9 of 12"
    folder = write_run(tmp_path / "b", last=12, record={"num_steps": 12}, **epochs)
    assert history.read_run(folder).finished


# The arms.


def test_arms_are_named_by_what_differs(tmp_path):
    folders = [
        write_run(tmp_path / f"{ratio}-{rate}-{seed}", ratio=ratio, rate=rate, seed=seed)
        for ratio in (1.0, 0.25)
        for rate in (1e-4, 3e-3)
        for seed in (1, 0)
    ]
    arms = arms_of(folders)
    assert [arm.name for arm in arms] == [
        f"kd-ratio={ratio}, learning-rate={rate}"
        for ratio in ("0.25", "1")
        for rate in ("0.0001", "0.003")
    ]
    assert [arm.label for arm in arms][:2] == ["0.25 · 0.0001", "0.25 · 0.003"]
    assert all([run.config.seed for run in arm.runs] == [0, 1] for arm in arms)


def test_where_logging_or_folders_differ_arms_do_not(tmp_path):
    folders = [
        write_run(tmp_path / "a", seed=0),
        write_run(tmp_path / "b", seed=1, log=LogConfig(every_steps=2), compilation_cache=None),
        write_run(tmp_path / "c", seed=2, data=DataConfig(path="data/train.json", cache_dir="x")),
    ]
    assert len(arms_of(folders)) == 1


def test_of_paths_the_content_counts(tmp_path):
    same = [
        write_run(tmp_path / "a", seed=0),
        write_run(tmp_path / "b", seed=1, teacher=TeacherConfig(path="/elsewhere/teacher")),
    ]
    assert len(arms_of(same)) == 1
    other = write_run(tmp_path / "c", seed=2, inputs={"teacher.path": "abcdef0123"})
    arms = arms_of([same[0], other])
    assert sorted(arm.name for arm in arms) == [
        "teacher.path=teacher #abcdef",
        "teacher.path=teacher #tttttt",
    ]
    far = TeacherConfig(path="/far/teacher")
    far_away = write_run(tmp_path / "d", teacher=far, inputs={"teacher.path": "f" * 64})
    assert sorted(arm.label for arm in arms_of([same[0], far_away])) == [
        "far/teacher", "models/teacher",
    ]  # fmt: skip


def test_texts_sources_and_nothing_are_shown_as_such(tmp_path):
    blend = DataConfig(path="data/one.jsonl:0.5, data/two.jsonl:0.5")
    texts, caches = ("Say yes/no.", "Say yes/no.", "Say no.", "Say no."), ("a", "a", "b", None)
    folders = [
        write_run(
            tmp_path / str(seed),
            seed=seed,
            teacher=dataclasses.replace(BASE.teacher, system=text, cache=cache),
            data=blend if text == "Say no." else BASE.data,
            inputs={"data.path": text} | ({"teacher.cache": f"{key}" * 9} if cache else {}),
        )
        for seed, (text, cache, key) in enumerate(zip(texts, caches, "ijj-", strict=True))
    ]
    assert [list(arm.values.values()) for arm in arms_of(folders)] == [
        ["a #iiiiii", "Say yes/no.", "train.json"],
        ["a #jjjjjj", "Say no.", "one.jsonl:0.5, two.jsonl:0.5"],
        ["a #jjjjjj", "Say yes/no.", "train.json"],
        ["none", "Say no.", "one.jsonl:0.5, two.jsonl:0.5"],
    ]


def test_rows_made_with_other_options_are_named_by_these(tmp_path):
    longer = dataclasses.replace(BASE.data, seq_len=4096)
    folders = [
        write_run(tmp_path / "a"),
        write_run(tmp_path / "b", data=longer, inputs={"data.path": "e" * 20}),
    ]
    assert [arm.name for arm in arms_of(folders)] == ["data.seq-len=2048", "data.seq-len=4096"]


def test_a_run_without_a_teacher_differs_by_its_ratio_alone(tmp_path):
    folders = [write_run(tmp_path / "a", teacher=None), write_run(tmp_path / "b")]
    assert [arm.name for arm in arms_of(folders)] == ["kd-ratio=0", "kd-ratio=0.5"]


def test_many_differences_make_numbered_arms(tmp_path, one_figure):
    folders = [
        write_run(tmp_path / "a", remat="none", trainable="full", attention="xla"),
        write_run(tmp_path / "b", rate=1e-5, data=DataConfig(path="data/other.json", seq_len=999)),
    ]
    assert [arm.label for arm in arms_of(folders)] == ["arm 1", "arm 2"]
    assert run(*folders, "--out", tmp_path / "out") == 0


@pytest.mark.parametrize(
    "ratios, wanted, name",
    [
        ((0, 0.5, 1), None, "kd-ratio=0"),
        ((0.5, 1), None, None),
        ((0.5, 1), "kd-ratio=1", "kd-ratio=1"),
        ((0, 0.5, 1), "0.5", "kd-ratio=0.5"),
        ((0, 0.5, 1), "1-1", "kd-ratio=1"),
    ],
)
def test_the_control_has_no_teacher_or_is_chosen(tmp_path, monkeypatch, ratios, wanted, name):
    monkeypatch.chdir(tmp_path)
    arms = arms_of(write_arms(Path("."), ratios, seeds=2))
    controls, reason = find_controls(arms, wanted)
    others = {arm.name for arm in arms} - {name}
    assert {n: c.name for n, c in controls.items()} == (dict.fromkeys(others, name) if name else {})
    assert name is None or name in reason
    assert name is not None or "--control" in reason


def test_arms_without_a_teacher_alone_make_no_control(tmp_path):
    folders = [write_run(tmp_path / str(r), ratio=0.0, rate=r) for r in (1e-3, 1e-4)]
    assert find_controls(arms_of(folders), None)[0] == {}


def test_an_arms_control_is_like_it_but_for_the_teacher(tmp_path):
    ratios, rates = (0.0, 0.5, 1.0), (1e-3, 1e-4)
    folders = [
        write_run(tmp_path / f"{ratio}-{rate}-{seed}", ratio=ratio, rate=rate, seed=seed)
        for ratio in ratios
        for rate in rates
        for seed in range(2)
    ]
    controls, reason = find_controls(arms_of(folders), None)
    assert len(controls) == 4 and "otherwise like it" in reason
    for name, control in controls.items():
        assert control.name == f"kd-ratio=0, {name.split(', ')[1]}"
    table = find(tables_of(folders), "Differences from each arm's control, by the last evaluation")
    for row in table.rows:
        ratio, rate = row[0].split(" · ")
        assert row[1] == f"0 · {rate}" and row[2] == "2"
        deltas = [
            last(tmp_path / f"{float(ratio)}-{float(rate)}-{seed}", "eval/ce")
            - last(tmp_path / f"0.0-{float(rate)}-{seed}", "eval/ce")
            for seed in range(2)
        ]
        assert numbers(row[3])[0] == pytest.approx(np.mean(deltas), abs=5e-5)


# The page.


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A report on three arms with two seeds, and the folder of its runs. Read only."""
    root = tmp_path_factory.mktemp("made")
    folders = write_arms(root / "runs", seeds=2)
    return reporting_page.make_report(folders, root / "report"), root / "runs"


def test_the_page_needs_nothing_else(made):
    page = made[0].read_text()
    images = re.findall(r'<img src="data:image/png;base64,([^"]+)"', page)
    files = {path.read_bytes() for path in made[0].parent.glob("*.png")}
    assert {base64.b64decode(image) for image in images} == files
    rest = re.sub(r'"data:image/png;base64,[^"]+"', '""', page)
    assert not re.search(r"https?:|url\(|<script|<link|@import|src=\"[^\"]", rest)


def test_figures_are_drawn_for_what_was_measured(made, tmp_path):
    files = {path.stem for path in made[0].parent.glob("*.png")}
    assert files == {figure.file for figure in curves.FIGURES}
    for path in made[0].parent.glob("*.png"):
        image = np.asarray(Image.open(io.BytesIO(path.read_bytes())).convert("RGB"))
        assert image.shape[1] == 1000 and (image[0, 0] == 255).all() and image.std() > 10
    plain = write_run(tmp_path / "plain", ratio=0.0, last=4)
    page = reporting_page.make_report([plain], tmp_path / "out")
    files = {path.stem for path in page.parent.glob("*.png")}
    assert files == {"loss", "ce", "throughput", "grad_norm", "learning_rate"}


@pytest.mark.parametrize(
    "change",
    [
        {"temperature": 2.0},
        {"temperature_end": 2.0, "schedule": "linear"},
        {"divergence": "reverse_kl"},
        {"compat": "torchtune"},
    ],
    ids=str,
)
def test_a_divergence_that_is_not_the_kl_is_not_drawn_as_it(change, tmp_path):
    folder = write_run(tmp_path / "run")
    tree = json.loads((folder / "config.json").read_text())
    tree["config"]["loss"] |= change
    (folder / "config.json").write_text(json.dumps(tree))
    drawn = {f.file for f in curves.FIGURES if len(curves.curve(history.read_run(folder), f))}
    assert "kl_held_out" in drawn and "kl" not in drawn


def test_the_same_runs_make_the_same_bytes(made, tmp_path, one_figure):
    folders = sorted(made[1].iterdir())
    first, again = (
        reporting_page.make_report(some, tmp_path / name)
        for name, some in (("first", folders), ("again", folders[::-1]))
    )
    for path in first.parent.iterdir():
        assert path.read_bytes() == (again.parent / path.name).read_bytes(), path.name


def test_text_of_the_users_is_escaped(tmp_path, one_figure):
    evil = "<script>alert('&')</script>"
    folders = [
        write_run(tmp_path / "a", inputs={"teacher.path": "x"}, teacher=TeacherConfig(path=evil)),
        write_run(tmp_path / "b"),
    ]
    extra = tables.Table(title=evil, header=["a", "b"], rows=[[evil, "1"]])
    page = reporting_page.make_report(
        folders, tmp_path / "out", title=evil, extra=[extra]
    ).read_text()
    assert "<script" not in page and "&lt;script&gt;" in page


def test_extra_tables_stand_first(tmp_path, one_figure):
    extra = tables.Table(
        title="CE against the known entropy",
        header=["student", "CE, nats"],
        rows=[["untouched", "3.1"], ["distilled", "1.2 ± 0.1"]],
        note="The text has 1.1 nats a token.",
    )
    folder = write_run(tmp_path / "run")
    page = reporting_page.make_report([folder], tmp_path / "out", extra=[extra]).read_text()
    titles = re.findall(r"<h2>(.*?)</h2>", page)
    assert titles[:2] == ["CE against the known entropy", "Arms"]
    assert "The text has 1.1 nats a token." in page
    assert reporting_page.spread_widths(extra) == [None, 6]


def test_samples_of_a_run_are_shown_without_a_torn_line(tmp_path, one_figure):
    run_folder = write_run(tmp_path / "run")
    line = {"prompt": "Why <b>?", "answer": "1 ± 2 so", "ended": True, "log_prob": -0.5}
    lines = [json.dumps({"step": step, **line}) for step in range(1, 10)]
    damaged = ['{"step": 10}', '{"step": 10, "log_prob": "-1"}', '{"step": 10, "pro']
    (run_folder / "samples.jsonl").write_text("\n".join([*lines, *damaged]))
    (table,) = samples_tables(arms_of([run_folder, write_run(tmp_path / "other", ratio=0.0)]))
    assert [row[1] for row in table.rows] == ["1", "2", "6", "7", "8", "9"]
    assert run(run_folder, "--out", tmp_path / "out") == 0
    page = (tmp_path / "out" / "index.html").read_text()
    assert "<summary>Samples</summary>" in page and "Why &lt;b&gt;?" in page
    assert "1 ±\N{NO-BREAK SPACE}2 so" in page and "-0.500" in page


def test_an_earlier_report_is_replaced(tmp_path, monkeypatch):
    monkeypatch.setattr(curves, "FIGURES", [x for x in curves.FIGURES if x.file in ("loss", "kl")])
    folders = write_arms(tmp_path / "runs", seeds=1)
    page = reporting_page.make_report(folders, tmp_path / "out")
    old = page.read_text()
    assert (tmp_path / "out" / "kl.png").exists()
    plain = write_run(tmp_path / "plain", ratio=0.0, last=4)
    assert run(plain, "--out", tmp_path / "out") == 0
    assert page.read_text() != old and not (tmp_path / "out" / "kl.png").exists()


# Errors.


def refused(capsys, *argv):
    assert run(*argv) == 2
    streams = capsys.readouterr()
    assert streams.err.startswith("error: ") and streams.out == ""
    return streams.err


def test_all_problems_are_told_at_once_and_nothing_is_written(tmp_path, capsys):
    good = write_run(tmp_path / "good")
    foreign, model, empty = (tmp_path / name for name in ("foreign", "model", "empty"))
    for folder in (foreign, model, empty):
        folder.mkdir()
    (foreign / "notes.txt").write_text("mine")
    (model / "config.json").write_text('{"model_type": "llama"}')
    waiting = write_run(tmp_path / "waiting", seed=5)
    (waiting / "metrics.jsonl").write_text('{"step": 1, "lo')
    copy = shutil.copytree(good, tmp_path / "copy")
    logged = write_run(tmp_path / "logged", log=LogConfig(every_steps=2))
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    names = (good, tmp_path / "goood", foreign, model, empty, waiting, copy, logged, f"{good}/")
    error = refused(capsys, *names, "--out", out, "--smooth", 0)
    for words in (
        f"goood: expected a workdir of kd_jax.train, got no folder. Did you mean {good}?",
        f"{foreign}: expected a workdir of kd_jax.train, got no config.json",
        f"{model / 'config.json'}: not written by kd_jax.train",
        f"{empty}: expected a workdir of kd_jax.train, got an empty folder",
        f"{waiting}: expected metrics of at least one step, got none yet",
        f"{copy}: expected another configuration or seed than {good} has",
        f"{logged}: expected another configuration or seed than {good} has",
        f"{good}: given twice",
        f"--out: expected a new folder or an earlier report, got {out}",
        "--smooth: expected at least 1, got 0",
    ):
        assert words in error, words
    assert [path.name for path in out.iterdir()] == ["thesis.tex"]


def test_a_run_is_no_place_for_a_report(tmp_path, capsys):
    folder = write_run(tmp_path / "run")
    assert "which holds other files" in refused(capsys, folder, "--out", folder)


def test_a_file_is_no_folder(tmp_path, capsys):
    folder = write_run(tmp_path / "run")
    error = refused(capsys, folder / "metrics.jsonl", "--out", folder / "config.json")
    assert "got no folder" in error and "--out: expected a new folder" in error


def test_no_runs_at_all_are_refused(tmp_path, capsys):
    assert "--runs" in refused(capsys, "--out", tmp_path / "out")


def test_a_last_line_cut_by_a_kill_is_left_out(tmp_path, capsys):
    folder = write_run(tmp_path / "run", last=12)
    path = folder / "metrics.jsonl"
    whole = path.read_text()
    path.write_text(whole + '{"step": 13, "ce_lo')
    assert history.read_run(folder).last_step == 12
    lines = whole.splitlines()
    path.write_text("\n".join([lines[0], lines[1][:30], *lines[2:]]))
    assert "metrics.jsonl:2: expected a JSON object" in refused(capsys, folder)


@pytest.mark.parametrize("line", ["[1]", '{"loss": 1.0}', '{"step": 1, "loss": 1.0}', '"x"', "7"])
def test_metrics_of_others_are_refused(tmp_path, capsys, line):
    folder = write_run(tmp_path / "run")
    (folder / "metrics.jsonl").write_text(f"{line}\n{line}\n")
    assert "not written by kd_jax.train" in refused(capsys, folder)


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"ce": "1"},
        {"ce": 1.0, "kl_forward": "0.1"},
        {"ce": 1.0, "arguments": []},
        {"ce": 1, "arguments": {"teacher_cache": 5}},
    ],
)
def test_an_evaluation_of_others_is_refused(tmp_path, capsys, values):
    folder = write_run(tmp_path / "run")
    (folder / "evaluation.json").write_text(json.dumps(values))
    assert "evaluation.json: not written by kd_jax.evaluate" in refused(capsys, folder)


def test_an_unknown_control_is_told_the_arms(tmp_path, capsys):
    folders = write_arms(tmp_path, seeds=1)
    error = refused(capsys, *folders, "--control", "kd-ratio=7", "--out", tmp_path / "out")
    assert "kd-ratio=0.5" in error and "kd-ratio=1" in error
    assert not (tmp_path / "out").exists()


def test_folders_may_stand_before_and_after_the_flags(tmp_path, one_figure):
    a, b = write_arms(tmp_path, ratios=(0, 1), seeds=1)
    assert report._name_runs([str(a), "--out", "x", str(b)]) == [
        "--runs", str(a), str(b), "--out", "x",
    ]  # fmt: skip
    assert run(a, "--out", tmp_path / "x", b) == 0
    assert run("--out", tmp_path / "y", "--runs", a, b) == 0
    assert (tmp_path / "x" / "index.html").read_bytes() == (
        tmp_path / "y" / "index.html"
    ).read_bytes()


# The curves.


def test_the_moving_average_is_the_mean_of_its_window():
    steps = np.arange(1.0, 31)
    values = pd.Series(np.random.default_rng(0).normal(size=30), index=steps)
    found = curves.moving_average(values, 7).to_numpy()
    for i in range(30):
        before = min(3, i)
        after = min(before, 3, 29 - i)  # as few as before, so that a steep start is not bent
        assert found[i] == pytest.approx(values.iloc[i - before : i + after + 1].mean())
    assert np.allclose(curves.moving_average(values, 1), values)
    line = pd.Series(2 * steps + 1, index=steps)
    assert np.allclose(curves.moving_average(line, 9)[:-4], line[:-4])


def test_a_steep_beginning_does_not_flatten_the_rest():
    steps = np.arange(1.0, 101)
    steep = pd.Series(np.where(steps < 4, 12.0, 2 + np.sin(steps) / 2), index=steps)
    gentle = pd.Series(12 - steps / 10, index=steps)
    low, high = curves.limits([steep], 100)
    assert 1.2 < low < 1.5 and 2.5 < high < 2.8
    for shown in ([gentle], [steep, gentle]):
        low, high = curves.limits(shown, 100)
        assert low < min(y.min() for y in shown) and high > max(y.max() for y in shown)
    assert curves.limits([steep * 0], 100) == (-1, 1)


def test_a_mean_over_seeds_is_taken_where_all_are():
    one = pd.Series([1.0, 2, 3], index=[1, 2, 3])
    other = pd.Series([4.0, 6, 8], index=[2, 3, 4])
    assert curves.mean_of([one, other]).to_dict() == {2: 3, 3: 4.5}
    elsewhere = pd.Series([7.0], index=[9])
    assert curves.mean_of([one, elsewhere]).to_dict() == one.to_dict()


@pytest.mark.parametrize("seed", range(5))
def test_labels_never_overlap_nor_change_order(seed):
    rng = np.random.default_rng(seed)
    wanted = list(rng.choice([0.0, 0.1, 0.5, 0.52, 1.0], size=10) + 0.01 * rng.random(10))
    found = curves.spread(wanted, 0.08)
    order = np.argsort(wanted)
    assert (np.diff(np.array(found)[order]) >= 0.08 - 1e-9).all()
    assert min(found) >= 0 and max(found) <= 1 + 1e-9
    assert curves.spread([0.2, 0.9], 0.08) == pytest.approx([0.2, 0.9])


def test_every_arm_has_a_look_of_its_own(tmp_path, one_figure):
    folders = [
        write_run(tmp_path / f"{ratio}-{rate}", ratio=ratio, rate=rate)
        for ratio in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
        for rate in (1e-4, 1e-3)
    ]
    arms = arms_of(folders)
    styles = curves.make_styles(arms)
    assert len(set(styles)) == len(arms) == 12
    by_ratio = {
        (arm.values["loss.kd_ratio"], style.colour) for arm, style in zip(arms, styles, strict=True)
    }
    assert len(by_ratio) == 6
    many = [dataclasses.replace(arm, values={"x": arm.label}) for arm in arms]
    assert len(set(curves.make_styles(many))) == 12
    assert reporting_page.make_report(folders, tmp_path / "out").is_file()
