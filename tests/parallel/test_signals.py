"""Signals stop a loop at its next step, or at once; never with a traceback."""

import os
import signal
import subprocess
import sys

import pytest
from paths import ROOT

# A loop of five minutes; with BUSY it never reaches its second step.
LOOP = """
import sys, threading, time
from kd_jax.config.command import run_command
from kd_jax.parallel.signals import exit_status, stop_signal

def main(argv):
    with stop_signal() as should_stop:
        for step in range(3000):
            if stop := should_stop(step):
                print(f"stopped by {stop} at step {step}", flush=True)
                if "slow" in argv:
                    time.sleep(300)  # saves
                raise SystemExit(exit_status(stop))
            print(step, flush=True)
            time.sleep(300 if "compiles" in argv else 0.1)

sys.exit(run_command(main))
"""
STATUS = {"SIGTERM": 0, "SIGINT": 130, "SIGHUP": 129}


@pytest.fixture
def start():
    started = []

    def run(*argv, ignored=()):
        def restore():
            for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
                signal.signal(number, signal.SIG_DFL)
            for number in ignored:
                signal.signal(number, signal.SIG_IGN)

        process = subprocess.Popen(
            [sys.executable, "-c", LOOP, *argv],
            env={**os.environ, "PYTHONPATH": str(ROOT)}, preexec_fn=restore,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        started.append(process)
        return process

    yield run
    for process in started:
        process.kill()
        process.wait()


def read_until(process, line):
    for found in process.stdout:
        if found == f"{line}\n":
            return
    raise AssertionError(process.stderr.read())


@pytest.mark.parametrize("name", STATUS)
def test_the_first_signal_stops_at_the_next_step(name, start):
    process = start()
    read_until(process, 3)
    process.send_signal(signal.Signals[name])
    out, err = process.communicate(timeout=60)
    assert process.returncode == STATUS[name]
    assert f"stopped by {name} at step" in out
    assert err == f"{name}: saving after this step; a second signal ends the run at once\n"


def test_the_second_signal_ends_at_once(start):
    process = start("slow")
    read_until(process, 3)
    process.send_signal(signal.SIGINT)
    while "stopped" not in process.stdout.readline():
        pass
    process.send_signal(signal.SIGTERM)
    err = process.communicate(timeout=60)[1]
    assert process.returncode == 143
    assert err.splitlines()[1:] == ["ended by a second signal, SIGTERM; the same command resumes"]


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_before_the_first_step_is_done_ends_at_once(name, start):
    process = start("compiles")
    read_until(process, 0)
    process.send_signal(signal.Signals[name])
    err = process.communicate(timeout=60)[1]
    assert process.returncode == STATUS[name]
    assert err == f"stopped by {name} before the first step; nothing is lost\n"


def test_a_signal_that_nohup_ignores_stops_nothing(start):
    process = start(ignored=[signal.SIGHUP])
    read_until(process, 3)
    process.send_signal(signal.SIGHUP)
    read_until(process, 6)
    process.send_signal(signal.SIGTERM)
    assert "stopped by SIGTERM" in process.communicate(timeout=60)[0]
