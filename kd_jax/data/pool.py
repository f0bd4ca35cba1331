"""Chunks of records prepared in several processes, in order."""

import os
import pickle
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from itertools import islice
from typing import Any

from kd_jax.config import UserError
from kd_jax.data.prepare import Chunk, Job, Prepared, prepare

Process = subprocess.Popen[bytes]

# This process alone prepares them in less time than others take to start.
_ALONE_CHUNKS = 24
_MOST_PROCESSES = 16


def prepare_all(job: Job, chunks: Iterable[Chunk]) -> Iterator[Prepared]:
    """Yields the documents of each chunk, in order; the number of processes changes nothing.

    Raises:
      UserError: the template or the tokenizer cannot be used.
    """
    chunks, count = iter(chunks), job.data.num_processes
    if count is None:
        own = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        count = min(own or 1, _MOST_PROCESSES)
    yield from (
        prepare(job, chunk) for chunk in islice(chunks, _ALONE_CHUNKS if count > 1 else None)
    )
    if (first := next(chunks, None)) is None:
        return
    workers = [_start() for _ in range(count)]
    threads = [ThreadPoolExecutor(1) for _ in workers]
    pending: deque[Future[Prepared]] = deque()
    try:
        for worker, thread in zip(workers, threads, strict=True):
            thread.submit(_send, worker.stdin, job)
        pending.append(threads[0].submit(_ask, workers[0], first))
        for number, chunk in enumerate(chunks, start=1):
            if len(pending) == 3 * count:
                yield pending.popleft().result()
            worker, thread = workers[number % count], threads[number % count]
            pending.append(thread.submit(_ask, worker, chunk))
        while pending:
            yield pending.popleft().result()
    finally:
        for worker in workers:
            worker.kill()
        for thread in threads:
            thread.shutdown(cancel_futures=True)
        for worker in workers:
            with suppress(OSError), worker:  # closes its pipes and waits
                pass


def _start() -> Process:
    """Returns a process that runs `serve`; it ends when this one does."""
    code = "from kd_jax.data.pool import serve; serve()"
    path = os.pathsep.join(filter(None, sys.path))
    env = {**os.environ, "PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false"}
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, "-c", code], stdin=pipe, stdout=pipe, env=env)


def _send(stream: Any, value: Any) -> None:
    pickle.dump(value, stream, pickle.HIGHEST_PROTOCOL)
    stream.flush()


def _ask(worker: Process, chunk: Chunk) -> Prepared:
    """Returns a chunk's documents from another process; raises what it raised."""
    try:
        _send(worker.stdin, chunk)
        answer = pickle.load(worker.stdout)  # type: ignore[arg-type]
    except (OSError, EOFError):
        raise UserError(
            f"data.num-processes: a process that tokenizes ended (status {worker.wait()}). If "
            "memory ran out, set fewer processes"
        ) from None
    if isinstance(answer, Exception):
        raise answer
    return answer


def serve() -> None:
    """Answers each pickled chunk on stdin with its documents on stdout, until stdin closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process reports it
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print
    with suppress(EOFError, BrokenPipeError):
        job = pickle.load(sys.stdin.buffer)
        while True:
            chunk = pickle.load(sys.stdin.buffer)
            try:
                answer: Any = prepare(job, chunk)
            except Exception as error:
                answer = error
            _send(answers, answer)
