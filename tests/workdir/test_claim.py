"""A workdir belongs to one run and to one command at a time."""

import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from functools import reduce

import pytest
from paths import ROOT

from kd_jax.config import Config, DataConfig, StudentConfig, UserError
from kd_jax.weights import files
from kd_jax.workdir import claim
from kd_jax.workdir.history import is_workdir

CONFIG = Config(
    workdir="unused", teacher=None, student=StudentConfig(path="s"), data=DataConfig(path="d"),
    steps=1,
)  # fmt: skip

HOLD = """
import sys
from pathlib import Path
from kd_jax.workdir.claim import lock_workdir
with lock_workdir(Path(sys.argv[1])):
    print("locked", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock of tmp_path/run."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "run")],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    with process:
        assert process.stdout.readline() == "locked\n"
        yield process
        process.kill()


def test_a_lock_names_its_holder_and_ends_with_it(holder, tmp_path):
    workdir = tmp_path / "run"
    words = f"in use by process {holder.pid} on {socket.gethostname()}"
    with pytest.raises(UserError, match=words), claim.lock_workdir(workdir):
        pass
    holder.kill()  # leaves the file behind
    holder.wait()
    assert (workdir / "lock").is_file()
    with claim.lock_workdir(workdir):
        assert str(os.getpid()) in (workdir / "lock").read_text()


def test_a_lock_refuses_its_own_process_and_leaves_nothing(tmp_path):
    workdir = tmp_path / "run"
    with claim.lock_workdir(workdir):
        with pytest.raises(UserError, match="in use by"), claim.lock_workdir(workdir):
            pass
        assert (workdir / "lock").is_file()
    assert not workdir.exists()


def test_a_folder_that_was_there_stays(tmp_path):
    with claim.lock_workdir(tmp_path):
        pass
    assert tmp_path.is_dir() and not list(tmp_path.iterdir())


def test_a_file_system_without_locks_is_no_error(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(files.errno.ENOLCK, "No locks available")

    monkeypatch.setattr(files.fcntl, "flock", flock)
    with claim.lock_workdir(tmp_path / "run"):
        pass


def finished(workdir):
    """Makes a workdir with a record and a checkpoint."""
    claim.claim_workdir(CONFIG, workdir, {"student.path": "a"}, num_steps=1)
    (workdir / "checkpoints" / "1").mkdir(parents=True)


def test_other_content_is_refused_after_a_checkpoint(tmp_path):
    finished(tmp_path)
    claim.claim_workdir(CONFIG, tmp_path, {"student.path": "a"}, num_steps=1)
    with pytest.raises(UserError, match=r"student\.path: expected the content"):
        claim.claim_workdir(CONFIG, tmp_path, {"student.path": "b"}, num_steps=1)


def test_a_run_that_resumes_keeps_what_it_chose(tmp_path):
    chosen = replace(CONFIG, remat="dots", student=replace(CONFIG.student, dtype="float32"))
    assert claim.keep_choices(CONFIG, tmp_path) == CONFIG  # it has not begun
    claim.claim_workdir(chosen, tmp_path, {}, num_steps=1)
    (tmp_path / "checkpoints" / "1").mkdir(parents=True)
    assert claim.keep_choices(CONFIG, tmp_path) == chosen
    other = replace(CONFIG, remat="layer", student=replace(CONFIG.student, dtype="bfloat16"))
    assert claim.keep_choices(other, tmp_path) == other
    with pytest.raises(UserError, match=r"student\.dtype: 'float32' -> 'bfloat16'"):
        claim.check_config(other, tmp_path)
    claim.check_config(replace(chosen, remat="layer"), tmp_path)


def test_checkpoints_without_their_configuration_are_refused(tmp_path):
    finished(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(UserError, match=r"no config\.json"):
        claim.check_config(CONFIG, tmp_path)


@pytest.mark.parametrize(
    "content", [b"[]", b"\xff\xfe{}", b"{}", b'{"config": 3, "inputs": {}}', b"null"]
)
def test_a_record_of_something_else_is_one_error(content, tmp_path):
    finished(tmp_path)
    (tmp_path / "config.json").write_bytes(content)
    for use in (claim.read_run, lambda folder: claim.check_config(CONFIG, folder)):
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
        assert claim.read_run(tmp_path) == CONFIG  # the defaults
        return
    with pytest.raises(UserError, match=r"config\.json: not written by kd_jax"):
        claim.read_run(tmp_path)


FOREIGN = {
    "a model": ("config.json", '{"model_type": "llama"}'),
    "an adapter": ("adapter_config.json", "{}"),
    "data": ("train.jsonl", "{}"),
    "checkpoints alone": ("checkpoints/4/state/_METADATA", "{}"),
    "a home": (".bashrc", ""),
    "checkpoints of another program": ("checkpoints/best/weights.pt", ""),
    "a record that is damaged": ("config.json", ""),
    "a folder in a folder": ("more/file", ""),
}


@pytest.mark.parametrize("name, content", FOREIGN.values(), ids=FOREIGN)
def test_a_folder_with_other_content_is_never_claimed(name, content, tmp_path):
    folder = tmp_path / "mine"
    (folder / name).parent.mkdir(parents=True)
    (folder / name).write_text(content)
    before = [(x, x.stat().st_mtime_ns) for x in sorted(folder.rglob("*"))]
    message = r"mine.*Give another --workdir"
    with pytest.raises(UserError, match=message), claim.lock_workdir(folder):
        pass
    assert [(x, x.stat().st_mtime_ns) for x in sorted(folder.rglob("*"))] == before
    assert not is_workdir(folder)


def test_a_file_is_no_workdir(tmp_path):
    (tmp_path / "file").write_text("kept")
    with pytest.raises(UserError, match="which is a file"), claim.lock_workdir(tmp_path / "file"):
        pass
    assert (tmp_path / "file").read_text() == "kept"


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
    with claim.lock_workdir(tmp_path / "run", [cache]):
        claim.claim_workdir(CONFIG, tmp_path / "run", {}, num_steps=1)
    with claim.lock_workdir(tmp_path / "run"):
        assert is_workdir(tmp_path / "run")
