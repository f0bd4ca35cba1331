"""Kills writers of a teacher's cache by SIGKILL at random instants, and compares their bytes.

python -m benchmarks.cache_kills [--kills 20] [--seed 0]

Shards of 8 KB in place of 256 MB make a tiny teacher's cache one of many. A killed command is
started again; once done, every file must equal that of a cache whose writer was left alone.
"""

import argparse
import multiprocessing
import random
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.kills import finish, make_inputs
from kd_jax.config.command import exit_now, run_command

SHARD_BYTES, CHUNK_BYTES = 2**13, 2**11


def run(root: str, name: str) -> None:
    """Writes ROOT/NAME as the command does; its output goes to a file."""
    import os

    from kd_jax.cache import main
    from kd_jax.teachers import storage

    storage.SHARD_BYTES, storage._CHUNK_BYTES = SHARD_BYTES, CHUNK_BYTES
    log = os.open(f"{root}/{name}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(log, stream)
    exit_now(run_command(main, ["--config", f"{root}/config.py", "--out", f"{root}/{name}"]))


def files_of(folder: Path) -> dict[str, bytes]:
    files = [x for x in folder.rglob("*") if x.is_file() and x.name != "cost.json"]  # of times
    return {str(x.relative_to(folder)): x.read_bytes() for x in files}


def num_shards(folder: Path) -> int:
    return sum("/c/" in name and not name.endswith("lock") for name in files_of(folder))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["kd_jax.inference.cached", "kd_jax.cache", "transformers"])
    rng, killed, parts, names = random.Random(args.seed), 0, set[int](), ["killed0"]
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make_inputs(root, steps=1)
        for name in ("warm", "whole"):  # the second finds compiled programs
            began = time.monotonic()
            process = context.Process(target=run, args=(str(root), name))
            process.start()
            finish(process, root, name)
        seconds = time.monotonic() - began
        while killed < args.kills:
            process = context.Process(target=run, args=(str(root), names[-1]))
            process.start()
            process.join(seconds * (0.5 + 0.6 * rng.random()))  # the first half loads the models
            process.kill()
            process.join()
            if process.exitcode == -9:
                killed += 1
                parts.add(num_shards(root / names[-1]))
            else:
                finish(process, root, names[-1])
                names.append(f"killed{len(names)}")
        process = context.Process(target=run, args=(str(root), names[-1]))
        process.start()
        finish(process, root, names[-1])
        whole = files_of(root / "whole")
        wrong = [name for name in names if files_of(root / name) != whole]
        shards = num_shards(root / "whole")
    verdict = f"differ: {', '.join(wrong)}" if wrong else "equal to the byte"
    print(
        f"{killed} SIGKILLs of {len(names)} writers, with {min(parts)} to {max(parts)} of {shards} "
        f"shards on disk: all files {verdict}"
    )
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
