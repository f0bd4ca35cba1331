"""Several processes as one run: they join, agree on what they run, and end together.

jax.distributed does the work. Text passes between the processes through the key-value store of its
coordinator, which needs no devices and reports the death of a process.
"""

import importlib.util
import json
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from glob import glob
from typing import Any, TypeVar

from kd_jax.config import DistributedConfig, UserError
from kd_jax.config.command import exit_now, report_error
from kd_jax.parallel.experimental import experimental

T = TypeVar("T")

# A process without a heartbeat for this long counts as dead.
HEARTBEAT_SECONDS = 30

# Time for the others to build what process 0 built; the death of a process ends the wait.
_PATIENCE_MS = 7 * 24 * 3600 * 1000

# Process 0 exits last, because its exit kills the others.
_LINGER_SECONDS = 3

# Environment variables in which launchers give the number of processes.
_COUNTS = {"Slurm": "SLURM_NTASKS", "Open MPI": "OMPI_COMM_WORLD_SIZE"}


@contextmanager
def joined(config: DistributedConfig) -> Iterator[None]:
    """Joins this process to the others of its launcher or flags; before jax is used.

    An error ends the process at once: a regular exit would wait for the other processes.

    Raises:
      UserError: the coordinator does not answer, or the number of processes is unknown.
    """
    if not start(config):
        yield
        return
    try:
        yield
    except SystemExit:  # a signal, at which all processes stop together
        raise
    except BaseException as error:
        status = report_error(error)
        if status == 1:  # collectives and checkpoints fail so after the death of another process
            print(
                "error: this process ended. If another process of the run ended first, its output "
                "has the reason. The same command on every host resumes",
                file=sys.stderr,
            )
        elif _state().process_id == 0:
            time.sleep(_LINGER_SECONDS)
        exit_now(status)


def start(config: DistributedConfig) -> bool:
    """Joins the other processes; returns False if there are none."""
    launcher = find_launcher(config, os.environ)
    if launcher is None:
        return False
    import jax

    options: dict[str, Any] = {}
    if launcher == "flags":
        assert config.coordinator is not None and config.process_id is not None
        if config.process_id > 0:
            _wait_for(config.coordinator, config.timeout_seconds)
        options = {
            "coordinator_address": config.coordinator,
            "num_processes": config.num_processes,
            "process_id": config.process_id,
            "cluster_detection_method": "deactivate",
        }
    else:
        options = {"local_device_ids": own_devices(os.environ)}
    try:
        jax.distributed.initialize(
            **options,
            initialization_timeout=config.timeout_seconds,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        )
    except RuntimeError as error:
        raise UserError(
            f"distributed: {config.coordinator or launcher}: expected all processes within "
            f"{config.timeout_seconds} s, got {error}"
        ) from error
    return jax.process_count() > 1


def find_launcher(config: DistributedConfig, environ: Any) -> str | None:
    """Returns the launcher of several processes ("flags", "Slurm", ...); None for one process.

    jax's own detection would also start a coordinator for a single process, whose port two steps
    of one Slurm job share.

    Raises:
      UserError: a Kubernetes job gives no number of pods.
    """
    if config.num_processes is not None:
        return "flags" if config.num_processes > 1 else None
    for name, count in _COUNTS.items():
        if int(environ.get(count, 1)) > 1:
            return name
    if "," in environ.get("TPU_WORKER_HOSTNAMES", "") or "MEGASCALE_NUM_SLICES" in environ:
        return "Cloud TPU"
    if glob("/dev/accel*") + glob("/dev/vfio/*") and importlib.util.find_spec("libtpu"):
        return "Cloud TPU"
    if "KUBERNETES_SERVICE_HOST" in environ and "JOB_COMPLETION_INDEX" in environ:
        if importlib.util.find_spec("kubernetes"):
            return "Kubernetes"
        raise UserError(
            "distributed: expected --distributed.coordinator, --distributed.num-processes and "
            "--distributed.process-id (see docs/clusters.md), or pip install 'jax[k8s]', in a "
            "Kubernetes job. --distributed.num-processes 1 runs this pod alone"
        )
    return None


def own_devices(environ: Any) -> list[int] | None:
    """Returns all GPUs of the node for its only Slurm task; None: jax's choice.

    jax gives each task one device, even the only task of a node.
    """
    alone = environ.get("SLURM_STEP_TASKS_PER_NODE", "").partition("(")[0] == "1"
    count = int(environ.get("SLURM_GPUS_ON_NODE", 0))
    return list(range(count)) if alone and count > 1 else None


def _wait_for(coordinator: str, seconds: int) -> None:
    """Waits until the coordinator accepts connections."""
    host, _, port = coordinator.rpartition(":")
    end = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > end:
                raise UserError(
                    f"distributed.coordinator: expected process 0 at {coordinator} within "
                    f"{seconds} s, got {error}. Start it, or correct the address"
                ) from None
        time.sleep(0.5)


def is_first() -> bool:
    """Returns True on process 0, the only one that writes and prints; looks for no devices."""
    return "jax" not in sys.modules or _state().process_id == 0


def say(text: str) -> None:
    """Prints a line, on process 0 only; a warning goes to stderr."""
    if is_first():
        stream = sys.stderr if text.startswith("warning: ") else sys.stdout
        print(text, file=stream, flush=True)


def together(
    name: str,
    run: Callable[[], T],
    facts: Callable[[T], dict[str, Any]] = lambda _: {},
    *,
    first_alone: bool = False,
) -> T:
    """Returns the result of `run` on every process, after it succeeded on all with equal facts.

    Args:
      name: key of this call, unique in the run.
      facts: maps the result to what must be equal on all processes, as JSON.
      first_alone: process 0 runs before the others, which may read the files it wrote.

    Raises:
      UserError: on every process, with the errors or the differing facts of all.
    """
    import jax

    if jax.process_count() == 1:
        return run()
    me, count = jax.process_index(), jax.process_count()
    result: T | None = None
    outcome: dict[str, Any] = {"error": "", "facts": {}}
    try:
        if me == 0 or not first_alone or not _receive(f"{name}/0")["error"]:
            result = run()
            outcome["facts"] = facts(result)
    except UserError as error:
        outcome["error"] = str(error)
    _send(f"{name}/{me}", outcome)
    if me == 0:
        outcomes = [_receive(f"{name}/{i}") for i in range(count)]
        _send(f"{name}/verdict", {"problems": _problems(outcomes)})
    problems = _receive(f"{name}/verdict")["problems"]
    if problems:  # process 0 ends after the others have read the reason
        if me > 0:
            _send(f"{name}/heard/{me}", {})
        else:
            for i in range(1, count):
                _receive(f"{name}/heard/{i}")
        raise UserError("\n".join(problems))
    return result  # type: ignore[return-value]


def on_first(name: str, run: Callable[[], T]) -> T | None:
    """Returns the result of `run` on process 0, None on the others; raises its errors on all."""
    return together(name, lambda: run() if is_first() else None)


def gather(name: str, run: Callable[[], T]) -> list[T]:
    """Returns the results of `run`, which are JSON, on all processes in their order.

    Args:
      name: key of this call, unique in the run.

    Raises:
      UserError: on every process, with the errors of all.
    """
    import jax

    value = together(name, run)
    me, count = jax.process_index(), jax.process_count()
    if count == 1:
        return [value]
    _send(f"{name}/value/{me}", {"value": value})
    return [_receive(f"{name}/value/{i}")["value"] for i in range(count)]


def _problems(outcomes: list[dict[str, Any]]) -> list[str]:
    """Returns the distinct errors of all processes, or else the differences of their facts."""
    errors = [outcome["error"] for outcome in outcomes if outcome["error"]]
    if errors:
        return list(dict.fromkeys(errors))
    found = []
    first = outcomes[0]["facts"]
    for number, outcome in enumerate(outcomes):
        facts = outcome["facts"]
        found += [
            f"{field}: expected the same on every process, got {first.get(field)!r} on process 0 "
            f"and {facts.get(field)!r} on process {number}"
            for field in sorted(first.keys() | facts.keys())
            if first.get(field) != facts.get(field)
        ]
    return found


def _state() -> Any:
    """Returns jax's client, process number and the like; it has no public name."""
    return experimental("jax._src.distributed", "global_state")


def _send(key: str, value: dict[str, Any]) -> None:
    _state().client.key_value_set(f"kd_jax/{key}", json.dumps(value))


def _receive(key: str) -> dict[str, Any]:
    """Waits for a value and returns it."""
    return json.loads(_state().client.blocking_key_value_get(f"kd_jax/{key}", _PATIENCE_MS))
