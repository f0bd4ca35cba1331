"""A model's fingerprint covers every byte; the cache of hashes never hides a change.

Files are written whole.
"""

import json
import os
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import pytest
import xxhash

from kd_jax.weights import hashes
from kd_jax.weights.files import write_whole
from kd_jax.weights.folder import fingerprint, same_path


@pytest.fixture
def folder(tmp_path):
    """Files of every kind that a model or adapter has."""
    folder = tmp_path / "model"
    shards = {"a": "model-1.safetensors", "b": "shards/model-2.safetensors"}
    for name in (
        *shards.values(), "adapter_model.safetensors", "orbax/d/0", "config.json",
        "adapter_config.json",
    ):  # fmt: skip
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(bytes(range(256)) * 40)
    index = {"weight_map": shards}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def flip(file, offset):
    """Changes one bit of a byte in place."""
    with open(file, "r+b") as stream:
        stream.seek(offset)
        byte = stream.read(1)[0]
        stream.seek(offset)
        stream.write(bytes([byte ^ 1]))


def test_the_fingerprint_covers_every_file(folder):
    seen = {fingerprint(folder)}
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    for file in files:
        if file.suffix == ".json" and "index" in file.name:
            file.write_text(file.read_text() + " ")
        else:
            flip(file, 5000)
        seen.add(fingerprint(folder))
    assert len(files) == 7 and len(seen) == 8


def test_every_byte_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(hashes, "_PART_BYTES", 400)
    monkeypatch.setattr(hashes, "_BUFFER_BYTES", 150)
    file = tmp_path / "file"
    file.write_bytes(bytes(1000))
    seen = set()
    for offset in range(1000):
        flip(file, offset)
        seen |= {*hashes.hash_files([file])}
    assert len(seen) == 1000


def test_a_hash_is_xxh3_of_the_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(hashes, "_PART_BYTES", 400)
    file = tmp_path / "file"
    file.write_bytes(os.urandom(1000))
    data = file.read_bytes()
    parts = [xxhash.xxh3_128_digest(data[i : i + 400]) for i in (0, 400, 800)]
    assert hashes.hash_files([file]) == [xxhash.xxh3_128_hexdigest(b"".join(parts))]


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """A file that is hashed with a cache; and the list of files that were read."""
    monkeypatch.setattr(hashes, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(hashes, "_CACHED_BYTES", 0)
    monkeypatch.setattr(hashes, "_SETTLED_SECONDS", 0.0)
    read = []
    hash_file = hashes._hash_file
    monkeypatch.setattr(
        hashes, "_hash_file", lambda file, pool: read.append(file) or hash_file(file, pool)
    )
    file = tmp_path / "file"
    file.write_bytes(bytes(5000))
    return file, read


def test_a_file_is_read_once_until_it_changes(cached):
    file, read = cached
    first = hashes.hash_files([file])
    assert hashes.hash_files([file]) == first and len(read) == 1
    before = file.stat()
    flip(file, 10)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))  # size and mtime as before
    assert hashes.hash_files([file]) != first and len(read) == 2
    for entry in hashes.CACHE.iterdir():
        entry.write_text("{")
    hashes.hash_files([file])
    assert len(read) == 3


def test_a_file_that_just_changed_is_not_cached(cached, monkeypatch):
    file, read = cached
    monkeypatch.setattr(hashes, "_SETTLED_SECONDS", 2.0)
    hashes.hash_files([file])
    hashes.hash_files([file])
    assert len(read) == 2 and not list(hashes.CACHE.glob("*.json"))


def test_a_cache_that_cannot_be_written_is_no_error(cached, monkeypatch, tmp_path):
    file, _ = cached
    (tmp_path / "cache").write_text("")
    assert len(hashes.hash_files([file])[0]) == 32


def test_several_starts_at_once_read_a_file_once(cached):
    file, read = cached
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: hashes.hash_files([file])[0], range(4)))
    assert len(set(found)) == 1 and len(read) == 1


def test_one_folder_has_many_spellings(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "t").mkdir()
    (tmp_path / "link").symlink_to("t")
    for spelled in ("t/", "./t", "x/../t", "~/t", "link", str(tmp_path / "t"), "t//"):
        assert same_path("t", spelled), spelled
    assert not same_path("t", "u") and not same_path("org/name", "org/other")


def test_lines_are_written_as_they_come_or_not_at_all(tmp_path):
    def lines(count, stop):
        for i in range(count):
            if i == stop:
                raise KeyboardInterrupt
            yield f"{i:0{2**18}}\n"

    tracemalloc.start()
    write_whole(tmp_path / "lines", lines(8, None))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    text = (tmp_path / "lines").read_text()
    assert text == "".join(lines(8, None)) and peak < len(text) / 2
    with pytest.raises(KeyboardInterrupt):
        write_whole(tmp_path / "lines", lines(8, 4))
    assert os.listdir(tmp_path) == ["lines"] and (tmp_path / "lines").read_text() == text
