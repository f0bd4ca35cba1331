"""A reader that ends early never makes a traceback; a run goes on without it."""

import os
import subprocess
import sys

import pytest
from paths import ROOT

PRINTS = """
import sys, time
from pathlib import Path
from kd_jax.config.command import run_command
from kd_jax.config.errors import UserError
from kd_jax.config.streams import outlive_readers

def talk(file):
    for number in range(200):
        print(number, flush=True)
        print(number, file=sys.stderr, flush=True)
        time.sleep(0.002)
    Path(file).write_text("all")

def main(argv):
    if argv[1] == "short":
        Path(argv[0]).write_text("all")
        print("one line")  # still in the buffer at the end
    elif argv[1] == "fails":
        raise UserError("a mistake")
    elif argv[1] == "outlives":
        with outlive_readers():
            talk(argv[0])
    else:
        talk(argv[0])

sys.exit(run_command(main))
"""


def run(kind, file, shell):
    """Returns the status of the command, and what shows on the shell's stderr."""
    command = f'"$PYTHON" -c "$CODE" "{file}" {kind}'
    done = subprocess.run(
        ["bash", "-c", shell.format(command)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHON": sys.executable, "CODE": PRINTS},
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("shell", ["{} 2>/dev/null | true", "{} 2>&1 | head -n 1", "{} >&- 2>&-"])
def test_a_run_outlives_the_readers_of_its_output(shell, tmp_path):
    status, out, err = run("outlives", tmp_path / "file", f"set -o pipefail; {shell}")
    assert status == 0 and err == "" and out in ("", "0\n")
    assert (tmp_path / "file").read_text() == "all"


@pytest.mark.parametrize("shell", ["{} | true", "{} > /dev/full"])
@pytest.mark.parametrize("kind", ["short", "talks"])
def test_other_commands_end_quietly(kind, shell, tmp_path):
    status, _, err = run(kind, tmp_path / "file", f"set -o pipefail; {shell}")
    assert status == 1 and "Traceback" not in err and "Exception ignored" not in err


@pytest.mark.parametrize("kind, status", [("fails", 2), ("talks", 0), ("short", 0)])
def test_a_command_needs_no_standard_streams(kind, status, tmp_path):
    assert run(kind, tmp_path / "file", "{} <&- >&- 2>&-")[0] == status
    if status == 0:
        assert (tmp_path / "file").read_text() == "all"
