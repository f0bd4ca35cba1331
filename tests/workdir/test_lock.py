"""A workdir is of one command at a time, and never of something else."""

import os
import socket
import subprocess
import sys

import pytest
from paths import ROOT

from kd_jax.config import UserError
from kd_jax.weights import files
from kd_jax.workdir.history import is_workdir
from kd_jax.workdir.lock import lock_workdir

HOLD = """
import sys
from pathlib import Path
from kd_jax.workdir.lock import lock_workdir
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
    with pytest.raises(UserError, match=words), lock_workdir(workdir):
        pass
    holder.kill()  # leaves the file behind
    holder.wait()
    assert (workdir / "lock").is_file()
    with lock_workdir(workdir):
        assert str(os.getpid()) in (workdir / "lock").read_text()


def test_a_lock_refuses_its_own_process_and_leaves_nothing(tmp_path):
    workdir = tmp_path / "runs" / "run"
    with lock_workdir(workdir):
        with pytest.raises(UserError, match="in use by"), lock_workdir(workdir):
            pass
        assert (workdir / "lock").is_file()
    assert not workdir.parent.exists()


def test_a_folder_that_was_there_stays(tmp_path):
    with lock_workdir(tmp_path):
        pass
    assert tmp_path.is_dir() and not list(tmp_path.iterdir())


def test_a_file_system_without_locks_is_no_error(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(files.errno.ENOLCK, "No locks available")

    monkeypatch.setattr(files.fcntl, "flock", flock)
    with lock_workdir(tmp_path / "run"):
        pass


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
    with pytest.raises(UserError, match=message), lock_workdir(folder):
        pass
    assert [(x, x.stat().st_mtime_ns) for x in sorted(folder.rglob("*"))] == before
    assert not is_workdir(folder)


def test_a_file_is_no_workdir(tmp_path):
    (tmp_path / "file").write_text("kept")
    with pytest.raises(UserError, match="which is a file"), lock_workdir(tmp_path / "file"):
        pass
    assert (tmp_path / "file").read_text() == "kept"
