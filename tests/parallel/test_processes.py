"""Real processes as one run: the same losses, the same data, the same end."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import tiny
import yaml
from children import environment
from paths import ROOT

from kd_jax import train
from kd_jax.config import (
    CheckpointConfig,
    DistributedConfig,
    LogConfig,
    MeshConfig,
    OptimConfig,
    UserError,
)
from kd_jax.config.command import parse_config, run_command
from kd_jax.parallel import processes as parallel_processes
from kd_jax.workdir.lock import lock_workdir

pytestmark = [pytest.mark.devices(8), pytest.mark.timeout(400)]  # pairs of processes on two cores

STEPS = 20
SHAPE = {
    "num_attention_heads": 8, "num_key_value_heads": 2, "vocab_size": 328, "num_hidden_layers": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A configuration of tiny models, laid out over all axes of eight devices."""
    root = tmp_path_factory.mktemp("models")
    tiny.write_plain_model(root / "student", seed=1, **SHAPE)
    tiny.write_plain_model(root / "teacher", seed=2, **SHAPE | {"hidden_size": 96})
    tiny.write_data(root / "train.jsonl")
    mesh = MeshConfig(data=2, fsdp=2, tensor=2)
    fields = {"mesh": mesh, "checkpoint": CheckpointConfig(every_steps=5), "steps": STEPS}
    fields |= {"optim": OptimConfig(warmup_steps=0), "log": LogConfig(tensorboard=False)}
    rows = {"seq_len": 96, "batch_size": 4}
    return tiny.write_config(root, dtype="float32", rows=rows, **fields)


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def start(file, workdir, *flags, num_devices=4, program=("-m", "kd_jax.train")):
    """Returns a process of a training run, its output captured."""
    return subprocess.Popen(
        [sys.executable, *program, "--config", str(file), "--workdir", str(workdir), *flags],
        env=environment(num_devices), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def start_two(file, workdir, *flags, of_second=(), **second):
    """Returns two processes of one run, four devices each."""
    common = (
        "--distributed.coordinator", f"127.0.0.1:{free_port()}", "--distributed.num-processes", "2",
    )  # fmt: skip
    return [
        start(file, workdir, *common, "--distributed.process-id", str(i), *flags, *more, **options)
        for i, (more, options) in enumerate([((), {}), (of_second, second)])
    ]


def finish(processes, timeout=600):
    """Returns statuses and outputs of processes, which are killed after `timeout` seconds."""
    try:
        outputs = [process.communicate(timeout=timeout)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], outputs


def lines(workdir):
    return tiny.read_lines(workdir / "metrics.jsonl")


def losses(workdir):
    return [line["loss"] for line in lines(workdir)]


def wait_for_step(workdir, step, processes, timeout=300):
    end = time.monotonic() + timeout
    while time.monotonic() < end and all(x.poll() is None for x in processes):
        if (workdir / "metrics.jsonl").is_file() and len(lines(workdir)) >= step:
            return
        time.sleep(0.05)
    raise TimeoutError(finish(processes, timeout=10))


@pytest.fixture(scope="module")
def alone(file, tmp_path_factory):
    """The workdir of the run in one process with eight devices."""
    workdir = tmp_path_factory.mktemp("alone") / "run"
    assert run_command(train.main, ["--config", str(file), "--workdir", str(workdir)]) == 0
    return workdir


@pytest.fixture(scope="module")
def stopped(file, tmp_path_factory):
    """The workdir of the run in two processes, stopped by SIGTERM on one; and their outputs."""
    workdir = tmp_path_factory.mktemp("stopped") / "run"
    processes = start_two(file, workdir)
    wait_for_step(workdir, 6, processes)
    processes[1].send_signal(signal.SIGTERM)
    statuses, outputs = finish(processes)
    assert statuses == [0, 0], outputs
    return workdir, outputs


@pytest.mark.slow
def test_two_processes_train_as_one_does(alone, stopped):
    got = losses(stopped[0])
    assert 6 <= len(got) < STEPS
    np.testing.assert_allclose(got, losses(alone)[: len(got)], rtol=1e-6)
    assert all(line["tokens_per_second"] > 0 for line in lines(stopped[0]))


ON_POLICY = (
    "--on-policy.fraction", "0.5", "--on-policy.max-new-tokens", "8", "--on-policy.every-steps",
    "2", "--on-policy.log-samples", "1", "--steps", "5", "--checkpoint.every-steps", "3",
)  # fmt: skip


@pytest.mark.slow
def test_two_processes_draw_and_train_on_the_samples_of_one(file, tmp_path):
    (status,), output = finish([start(file, tmp_path / "alone", *ON_POLICY, num_devices=8)])
    assert status == 0, output
    statuses, outputs = finish(start_two(file, tmp_path / "pair", *ON_POLICY))
    assert statuses == [0, 0], "".join(outputs)
    ours, theirs = (tiny.read_lines(tmp_path / x / "samples.jsonl") for x in ("pair", "alone"))
    assert [x["answer"] for x in ours] == [x["answer"] for x in theirs] and len(ours) > 3
    gaps = [abs(x["log_prob"] - y["log_prob"]) for x, y in zip(ours, theirs, strict=True)]
    assert max(gaps) < 1e-4
    np.testing.assert_allclose(*(losses(tmp_path / x) for x in ("pair", "alone")), rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_other_and_losses_repeat(file, stopped, tmp_path, victim):
    workdir = tmp_path / "run"
    processes = start_two(file, workdir)
    wait_for_step(workdir, 7, processes)
    processes[victim].kill()
    killed = time.monotonic()
    statuses, outputs = finish(processes, timeout=60)
    assert time.monotonic() - killed < 60
    assert statuses[1 - victim] not in (None, 0), outputs
    common = min(len(lines(workdir)), len(lines(stopped[0])))
    assert common >= 6 and losses(workdir)[:common] == losses(stopped[0])[:common]  # every bit


@pytest.mark.slow
def test_a_stop_of_any_process_saves_the_same_step_and_one_process_resumes(
    file, alone, stopped, tmp_path, capsys
):
    assert "stopped by SIGTERM at step" in stopped[1][0]
    assert "stopped by SIGTERM at step" not in stopped[1][1]
    workdir = tmp_path / "run"
    shutil.copytree(stopped[0], workdir)
    last = len(lines(workdir))
    assert run_command(train.main, ["--config", str(file), "--workdir", str(workdir)]) == 0
    assert f"resumed at step {last}" in capsys.readouterr().out
    assert [line["step"] for line in lines(workdir)] == list(range(1, STEPS + 1))
    np.testing.assert_allclose(losses(workdir), losses(alone), rtol=1e-5)
    assert len({line["target_tokens"] for line in lines(workdir)}) > 1


# Reads the verdict later than process 0 lingers.
SLOW = """
import sys, time
from kd_jax import train
from kd_jax.config.command import run_command
from kd_jax.parallel import processes
receive = processes._receive
def late(key):
    slow = key.endswith("/verdict") and key.startswith("config")
    time.sleep(slow * (processes._LINGER_SECONDS + 2))
    return receive(key)
processes._receive = late
sys.exit(run_command(train.main))
"""


def test_processes_that_disagree_stop_and_all_name_the_difference(file, tmp_path):
    words = "seed: expected the same on every process, got 0 on process 0 and 3"
    flags, program = ("--seed", "3"), ("-c", SLOW)
    processes = start_two(file, tmp_path / "run", of_second=flags, program=program)
    statuses, outputs = finish(processes, timeout=240)
    assert statuses == [2, 2], outputs
    assert all(words in output for output in outputs)
    assert not (tmp_path / "run").exists()


def test_a_second_command_in_a_workdir_is_refused_on_all_of_its_processes(file, tmp_path):
    workdir = tmp_path / "run"
    with lock_workdir(workdir):
        statuses, outputs = finish(start_two(file, workdir), timeout=240)
    assert statuses == [2, 2], outputs
    assert all(f"in use by process {os.getpid()} on" in output for output in outputs)


def test_a_coordinator_that_is_not_there_is_named(file, tmp_path):
    address = f"127.0.0.1:{free_port()}"
    flags = ("--distributed.coordinator", address, "--distributed.num-processes", "2")
    more = ("--distributed.process-id", "1", "--distributed.timeout-seconds", "2")
    statuses, outputs = finish([start(file, tmp_path / "run", *flags, *more)], timeout=60)
    assert statuses == [2] and address in outputs[0] and "Traceback" not in outputs[0]


def test_a_launcher_is_known_by_its_variables():
    def found(config=None, **environment):
        return parallel_processes.find_launcher(config or DistributedConfig(), environment)

    assert found() is None
    assert found(SLURM_NTASKS="1") is None and found(SLURM_NTASKS="16") == "Slurm"
    assert found(OMPI_COMM_WORLD_SIZE="2") == "Open MPI"
    assert found(TPU_WORKER_HOSTNAMES="a,b") == "Cloud TPU"
    assert found(TPU_WORKER_HOSTNAMES="a") is None
    flags = DistributedConfig(coordinator="a:1", num_processes=2, process_id=0)
    assert found(flags, SLURM_NTASKS="16") == "flags"
    assert found(DistributedConfig(num_processes=1), SLURM_NTASKS="16") is None
    pod = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}
    with pytest.raises(UserError, match=r"distributed\.process-id"):
        found(**pod)
    assert found(DistributedConfig(num_processes=1), **pod) is None


def test_a_task_alone_on_its_node_takes_all_of_its_gpus():
    node = {"SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_GPUS_ON_NODE": "8"}
    assert parallel_processes.own_devices(node) == list(range(8))
    assert parallel_processes.own_devices(node | {"SLURM_STEP_TASKS_PER_NODE": "8(x2)"}) is None
    assert parallel_processes.own_devices({}) is None


def blocks(language):
    """Returns the code blocks of docs/clusters.md in a language."""
    text = (ROOT / "docs" / "clusters.md").read_text()
    return re.findall(rf"```{language}\n(.*?)```", text, re.S)


def test_the_slurm_script_is_one():
    [script] = blocks("bash")
    done = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert script.startswith("#!/bin/bash\n#SBATCH")


def test_the_jobset_starts_as_many_pods_as_its_flags_say():
    [text] = blocks("yaml")
    tree = yaml.safe_load(text)
    [job] = tree["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    [container] = spec["template"]["spec"]["containers"]
    flags = container["command"][3:]
    config = parse_config(
        [word.replace("$(JOB_COMPLETION_INDEX)", "1") for word in flags if "--config=" not in word]
        + ["--config", str(ROOT / "configs" / "70b_to_8b.py")],
    ).distributed  # fmt: skip
    assert config.num_processes == spec["parallelism"] == spec["completions"]
    name = tree["metadata"]["name"]
    assert config.coordinator == f"{name}-{job['name']}-0-0.{name}:29500"
    assert spec["completionMode"] == "Indexed" and config.process_id == 1


def test_differences_name_field_and_process():
    def outcome(**facts):
        return {"error": "", "facts": facts}

    assert parallel_processes._problems([outcome(a=1), outcome(a=1)]) == []
    [problem] = parallel_processes._problems(
        [outcome(a=1, b=2), outcome(a=1, b=2), outcome(a=1, b=3)]
    )
    assert problem.startswith("b: ") and "2 on process 0 and 3 on process 2" in problem
    failed = {"error": "no such file", "facts": {}}
    assert parallel_processes._problems([outcome(a=1), failed, failed]) == ["no such file"]
