"""Many processes as one run: they join, agree on what they run, and none outlives another.

jax.distributed does the work. Text passes between the processes through the key-value store of its
coordinator, which needs no devices and reports the death of a process.
"""

import ctypes
import importlib.util
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from glob import glob
from typing import Any, TypeVar

from kd_jax.config import DistributedConfig, UserError
from kd_jax.config.command import report_error

T = TypeVar("T")


# A process that sends no heartbeat for so long is dead to the others.
HEARTBEAT_SECONDS = 30


# That the others may take to build what process 0 built; a process that dies ends the wait.
_PATIENCE_MS = 7 * 24 * 3600 * 1000


# For which process 0, whose end aborts the others, lets them end by themselves.
_LINGER_SECONDS = 3


# What a launcher tells each process of how many there are.
_COUNTS = {"Slurm": "SLURM_NTASKS", "Open MPI": "OMPI_COMM_WORLD_SIZE"}


@contextmanager
def joined(config: DistributedConfig) -> Iterator[None]:
    """Makes this process one of those that its launcher or the flags name; before jax is used.

    An error ends the process at once, so that it does not wait for the others to end well too.

    Raises:
      UserError: the coordinator does not answer, or the processes cannot be told apart.
    """
    if not start(config):
        yield
        return
    try:
        yield
    except BaseException as error:
        status = report_error(error)
        if status == 1:  # a collective without its peers ends so, and a checkpoint
            _say_that_another_ended()
        elif _state().process_id == 0:
            time.sleep(_LINGER_SECONDS)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def start(config: DistributedConfig) -> bool:
    """Joins the other processes; returns whether there are any."""
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
    _exit_on_abort()
    return jax.process_count() > 1


def find_launcher(config: DistributedConfig, environ: Any) -> str | None:
    """Returns what started several processes, of which this is one: "flags", "Slurm", ...; or None.

    Raises:
      UserError: a Kubernetes job does not tell how many pods it has.
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
            "--distributed.process-id (docs/clusters.md has them), or the package of "
            "pip install 'jax[k8s]', got neither in a Kubernetes job. "
            "--distributed.num-processes 1 runs this pod alone"
        )
    return None


def own_devices(environ: Any) -> list[int] | None:
    """Returns all of a node's GPUs for a Slurm task that is alone on it; None leaves it to jax.

    Which gives each task of a node one device, the first to a task that is alone.
    """
    alone = environ.get("SLURM_STEP_TASKS_PER_NODE", "").partition("(")[0] == "1"
    count = int(environ.get("SLURM_GPUS_ON_NODE", 0))
    return list(range(count)) if alone and count > 1 else None


def _wait_for(coordinator: str, seconds: int) -> None:
    """Returns once the coordinator accepts connections."""
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


def _exit_on_abort() -> None:
    """Makes jax's abort, when another process died, an exit with status 1 and a message.

    The coordination service aborts from a thread of its own, which a handler of Python's signal
    module, run by the main thread later, would not outlive; one of the C library's is called there.
    """

    @ctypes.CFUNCTYPE(None, ctypes.c_int)
    def end(_: int) -> None:
        _say_that_another_ended()
        os._exit(1)

    _keep.append(end)
    libc = ctypes.CDLL(None)
    libc.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
    libc.signal(signal.SIGABRT, ctypes.cast(end, ctypes.c_void_p))


def _say_that_another_ended() -> None:
    print(
        "error: this process ended. Where another process of the run ended first, its output says "
        "why. The same command on every host resumes",
        file=sys.stderr,
        flush=True,
    )


_keep: list[Any] = []  # callbacks, as long as the C library has them


@contextmanager
def stop_signal() -> Iterator[Callable[[int], bool]]:
    """Yields what tells, before each step, whether a SIGTERM asks to stop there.

    Of several processes that any of them received, at a step that all of them have yet to come to.
    """
    import jax
    from jax.experimental import multihost_utils

    if jax.process_count() > 1:  # whose runtime catches the signal
        yield multihost_utils.reached_preemption_sync_point
        return
    received: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: received.append(number))
    try:
        yield lambda step: bool(received)
    finally:
        signal.signal(signal.SIGTERM, before)


def is_first() -> bool:
    """Tells whether this is process 0, which alone writes and talks."""
    import jax

    return jax.process_index() == 0


def say(text: str) -> None:
    """Prints a line, once for all processes."""
    if is_first():
        print(text, flush=True)


def together(
    name: str,
    run: Callable[[], tuple[T, dict[str, Any]]],
    first_alone: bool = False,
) -> T:
    """Returns what `run` makes, on every process, once it succeeded on all with the same facts.

    Args:
      name: of this step of the run, another at each call.
      run: returns its result, and facts that must be the same everywhere, as JSON.
      first_alone: process 0 runs before the others, which may find what it wrote to disk.

    Raises:
      UserError: on every process, with what went wrong or differs on any of them.
    """
    import jax

    if jax.process_count() == 1:
        return run()[0]
    me, count = jax.process_index(), jax.process_count()
    result: T | None = None
    outcome: dict[str, Any] = {"error": "", "facts": {}}
    try:
        if me == 0 or not first_alone or not _receive(f"{name}/0")["error"]:
            result, outcome["facts"] = run()
    except UserError as error:
        outcome["error"] = str(error)
    _send(f"{name}/{me}", outcome)
    if me == 0:
        outcomes = [_receive(f"{name}/{i}") for i in range(count)]
        _send(f"{name}/verdict", {"problems": _problems(outcomes)})
    problems = _receive(f"{name}/verdict")["problems"]
    if problems:  # process 0 ends once the others know why
        if me > 0:
            _send(f"{name}/heard/{me}", {})
        else:
            for i in range(1, count):
                _receive(f"{name}/heard/{i}")
        raise UserError("\n".join(problems))
    return result  # type: ignore[return-value]


def _problems(outcomes: list[dict[str, Any]]) -> list[str]:
    """Returns the errors of all processes, one of a kind once; else how their facts differ."""
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
    from jax._src import distributed  # which has no public name; Orbax takes it from here too

    return distributed.global_state


def _send(key: str, value: dict[str, Any]) -> None:
    _state().client.key_value_set(f"kd_jax/{key}", json.dumps(value))


def _receive(key: str) -> dict[str, Any]:
    """Returns a value once it is there."""
    return json.loads(_state().client.blocking_key_value_get(f"kd_jax/{key}", _PATIENCE_MS))
