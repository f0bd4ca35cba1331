"""A workdir belongs to one run, whose record says what it began with."""

import json
from dataclasses import replace
from functools import reduce

import pytest

from kd_jax.config import Config, DataConfig, StudentConfig, UserError
from kd_jax.workdir import history, resume
from kd_jax.workdir.lock import lock_workdir

CONFIG = Config(
    workdir="unused", teacher=None, student=StudentConfig(path="s"), data=DataConfig(path="d"),
    steps=1,
)  # fmt: skip


def finished(workdir):
    """Makes a workdir with a record and a checkpoint."""
    resume.write_record(CONFIG, workdir, {"student.path": "a"}, num_steps=1)
    (workdir / "checkpoints" / "1").mkdir(parents=True)


def test_other_content_is_refused_after_a_checkpoint(tmp_path):
    finished(tmp_path)
    resume.write_record(CONFIG, tmp_path, {"student.path": "a"}, num_steps=1)
    for inputs, message in (
        ({"student.path": "b"}, r"student\.path: expected the content .*, got other content"),
        ({}, r"student\.path: expected the content .*, got none"),
        ({"student.path": "a", "teacher.cache": "b"}, r"teacher\.cache: expected none, since"),
    ):
        with pytest.raises(UserError, match=message):
            resume.write_record(CONFIG, tmp_path, inputs, num_steps=1)


def test_a_run_that_resumes_keeps_what_it_chose(tmp_path):
    chosen = replace(CONFIG, remat="dots", student=replace(CONFIG.student, dtype="float32"))
    assert resume.reuse_choices(CONFIG, tmp_path) == CONFIG  # it has not begun
    resume.write_record(chosen, tmp_path, {}, num_steps=1)
    (tmp_path / "checkpoints" / "1").mkdir(parents=True)
    assert resume.reuse_choices(CONFIG, tmp_path) == chosen
    other = replace(CONFIG, remat="layer", student=replace(CONFIG.student, dtype="bfloat16"))
    assert resume.reuse_choices(other, tmp_path) == other
    with pytest.raises(UserError, match=r"student\.dtype: 'float32' -> 'bfloat16'"):
        resume.check_same_config(other, tmp_path)
    resume.check_same_config(replace(chosen, remat="layer"), tmp_path)


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Starts a run of 8 steps after `step` updates, on a version of jax; returns its record."""

    def start(step, version):
        known = {"step": step, "versions": {"jax": version}, "devices": "1 x A", "git_commit": None}
        monkeypatch.setattr(resume, "describe_start", lambda _: known)
        (tmp_path / "checkpoints" / str(step)).mkdir(parents=True, exist_ok=True)
        resume.write_record(CONFIG, tmp_path, {}, num_steps=8, step=step)
        return json.loads((tmp_path / "config.json").read_text())

    resume.write_record(CONFIG, tmp_path, {}, num_steps=8)
    return start


def steps_and_versions(record):
    return [(x["step"], x["versions"]["jax"]) for x in history.list_starts(record)]


def test_a_record_has_the_versions_of_each_start_and_is_headed_by_the_first(start):
    start(0, "a")
    start(4, "b")
    assert start(4, "c")["versions"] == {"jax": "a"}  # the steps of b are taken again
    record = start(6, "d")
    assert steps_and_versions(record) == [(0, "a"), (4, "c"), (6, "d")]
    assert (record["versions"], record["devices"]) == ({"jax": "a"}, "1 x A")
    assert start(8, "e")["starts"] == record["starts"]  # it is finished


def test_a_record_of_an_earlier_version_has_one_start_at_an_unknown_step(start, tmp_path):
    record = start(0, "a")
    del record["starts"]
    (tmp_path / "config.json").write_text(json.dumps(record))
    assert steps_and_versions(history.read_record(tmp_path / "config.json")) == [(None, "a")]
    assert steps_and_versions(record | {"starts": []}) == [(None, "a")]
    record = start(6, "b")
    assert steps_and_versions(record) == [(None, "a"), (6, "b")]
    assert record["versions"] == {"jax": "a"}
    last = record["starts"][-1]
    for wrong in (None, [3], [{"step": 0}], [last | {"step": "x"}], [last | {"versions": "x"}]):
        (tmp_path / "config.json").write_text(json.dumps(record | {"starts": wrong}))
        with pytest.raises(UserError, match=r"config\.json: not written by kd_jax"):
            history.read_record(tmp_path / "config.json")


def test_checkpoints_without_their_configuration_are_refused(tmp_path):
    finished(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(UserError, match=r"no config\.json"):
        resume.check_same_config(CONFIG, tmp_path)


@pytest.mark.parametrize(
    "content", [b"[]", b"\xff\xfe{}", b"{}", b'{"config": 3, "inputs": {}}', b"null"]
)
def test_a_record_of_something_else_is_one_error(content, tmp_path):
    finished(tmp_path)
    (tmp_path / "config.json").write_bytes(content)
    for use in (history.read_config, lambda folder: resume.check_same_config(CONFIG, folder)):
        with pytest.raises(UserError, match=r"config\.json: "):
            use(tmp_path)


@pytest.mark.parametrize("name", ["seed", "loss", "data", "log", "log.every_steps", "steps"])
@pytest.mark.parametrize("value", [None, -3, "x", [], {}, {"a": {}}], ids=str)
def test_a_record_with_a_field_of_another_kind_is_one_error(name, value, tmp_path):
    finished(tmp_path)
    file = tmp_path / "config.json"
    record = json.loads(file.read_text())
    *outer, last = name.split(".")
    place = reduce(dict.__getitem__, outer, record["config"])
    place[last] = value
    file.write_text(json.dumps(record))
    if value == {} and name in ("log", "loss"):
        assert history.read_config(tmp_path) == CONFIG  # the defaults
        return
    with pytest.raises(UserError, match=r"config\.json: not written by kd_jax"):
        history.read_config(tmp_path)


def test_what_a_kill_before_the_first_step_leaves_is_claimed_again(tmp_path):
    cache = tmp_path / "run" / "caches" / "rows"
    for name in (
        "checkpoints/2.orbax-checkpoint-tmp/x",
        "lock",
        ".config.json.7.tmp",
        "caches/rows/x",
    ):
        (tmp_path / "run" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "run" / name).write_text("")
    with lock_workdir(tmp_path / "run", [cache]):
        resume.write_record(CONFIG, tmp_path / "run", {}, num_steps=1)
    with lock_workdir(tmp_path / "run"):
        assert history.is_workdir(tmp_path / "run")
