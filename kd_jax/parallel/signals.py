"""SIGTERM, SIGINT and SIGHUP: a run saves after its step and ends; a second one ends it at once."""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

from kd_jax.parallel.experimental import experimental


def stop_numbers() -> list[int]:
    """Returns the signals that stop a run, without those that nohup or a shell made it ignore."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    return [x for x in numbers if signal.getsignal(x) is not signal.SIG_IGN]


def exit_status(name: str) -> int:
    """Returns the status of a run that a signal stopped: 0 for SIGTERM, which schedulers send."""
    return 0 if name == "SIGTERM" else 128 + signal.Signals[name]


@contextmanager
def handled(numbers: Sequence[int], handler: Callable) -> Iterator[None]:
    """Sets a handler of signals, and restores the handlers before it."""
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


@contextmanager
def stop_signal() -> Iterator[Callable[[int], str]]:
    """Yields should_stop(step): the name of a signal that stops the run before that step, or "".

    A thread receives the signals, so that the second one, or one before the first step is done,
    ends the process also while the main thread compiles. With several processes, one signal stops
    all at the same future step.
    """
    import jax

    several = jax.process_count() > 1
    numbers = [x for x in stop_numbers() if not several or x != signal.SIGTERM]  # jax has that
    received: list[str] = []
    begun: set[int] = set()

    def should_stop(step: int) -> str:
        begun.add(step)
        if several:
            reached = experimental(
                "jax.experimental.multihost_utils", "reached_preemption_sync_point"
            )
            return "SIGTERM" if reached(step) else ""
        return received[0] if received else ""

    def receive(number: int) -> None:
        name = signal.Signals(number).name
        if received:
            _end(f"ended by a second signal, {name}; the same command resumes", 128 + number)
        if len(begun) < 2:
            _end(f"stopped by {name} before the first step; nothing is lost", exit_status(name))
        received.append(name)
        _tell(f"{name}: saving after this step; a second signal ends the run at once")
        if several:
            os.kill(os.getpid(), signal.SIGTERM)

    with handled(numbers, lambda *_: None), _in_a_thread(receive):
        yield should_stop


@contextmanager
def _in_a_thread(receive: Callable[[int], None]) -> Iterator[None]:
    """Calls `receive` with the number of each signal that has a handler, in a thread."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)

    def watch() -> None:
        while byte := os.read(reader, 1):
            if byte[0] in stop_numbers():
                receive(byte[0])
        os.close(reader)

    threading.Thread(target=watch, daemon=True).start()
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(writer)


def _tell(text: str) -> None:
    with suppress(OSError, ValueError):
        print(text, file=sys.stderr, flush=True)


def _end(text: str, status: int) -> None:
    _tell(text)
    os._exit(status)
