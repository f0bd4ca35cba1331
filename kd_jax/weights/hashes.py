"""Content hashes of files: xxh3 of every byte, cached per file for the next start."""

import json
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path

import xxhash

from kd_jax.weights.files import locked, write_whole

CACHE = Path("~/.cache/kd_jax/hashes")

# Bytes that one job hashes; part of what a hash means.
_PART_BYTES = 2**28
_BUFFER_BYTES = 2**18

# Smaller files are hashed in less time than a cache entry is worth.
_CACHED_BYTES = 2**26

# A file changed later than this before it was read may change again with the same time stamp.
_SETTLED_SECONDS = 2.0


def hash_files(files: Sequence[Path]) -> list[str]:
    """Returns a hash of each file's bytes, 32 hexadecimal digits."""
    with ThreadPoolExecutor(4) as pool:
        return [_cached(file, pool) for file in files]


def _cached(file: Path, pool: ThreadPoolExecutor) -> str:
    """Returns the hash of a file, from the cache where size, times and inode are the same.

    Of several processes on a host the first computes it, and the others wait.
    """
    file = file.resolve()
    if file.stat().st_size < _CACHED_BYTES:
        return _hash_file(file, pool)
    entry = CACHE.expanduser() / f"{xxhash.xxh3_128_hexdigest(str(file).encode())}.json"
    if found := _read_entry(entry, file):
        return found
    with ExitStack() as stack:
        with suppress(OSError):  # of a folder that cannot be written: no cache
            entry.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(entry.with_suffix(".lock"), wait=True))
        if found := _read_entry(entry, file):
            return found
        start, before = time.time(), _stat(file)
        value = _hash_file(file, pool)
        settled = max(before[1:3]) / 1e9 + _SETTLED_SECONDS < start
        if settled and before == _stat(file):
            with suppress(OSError):
                write_whole(entry, json.dumps({"file": str(file), "stat": before, "xxh3": value}))
    return value


def _read_entry(entry: Path, file: Path) -> str | None:
    try:
        tree = json.loads(entry.read_text(encoding="utf-8"))
        return str(tree["xxh3"]) if tree["stat"] == _stat(file) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _stat(file: Path) -> list[int]:
    """Returns size, times of the last changes in ns, and inode."""
    stat = file.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


def _hash_file(file: Path, pool: ThreadPoolExecutor) -> str:
    size = file.stat().st_size
    parts = pool.map(lambda start: _hash_part(file, start), range(0, size, _PART_BYTES))
    return xxhash.xxh3_128_hexdigest(b"".join(parts))


def _hash_part(file: Path, start: int) -> bytes:
    """Returns the digest of at most _PART_BYTES from `start`."""
    digest = xxhash.xxh3_128()
    buffer = memoryview(bytearray(_BUFFER_BYTES))
    left = _PART_BYTES
    with open(file, "rb", buffering=0) as stream:
        stream.seek(start)
        while left and (count := stream.readinto(buffer[:left])):
            digest.update(buffer[:count])
            left -= count
    return digest.digest()
