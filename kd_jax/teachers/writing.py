"""Writes a part of a teacher's cache, a shard at a time; a killed writer goes on at its shard."""

import json
from typing import Any

import jax
import numpy as np
import xxhash

from kd_jax.data.store import Batch
from kd_jax.teachers.cost import COST
from kd_jax.teachers.manifest import INDEX, Cache, Part, index_bytes, part_folder
from kd_jax.teachers.storage import (
    list_files,
    metadata_key,
    numpy_dtype,
    open_array,
    read_file,
    shard_key,
    tokens_per_shard,
    write_json,
)

_PLAN = "plan.json"


class PartWriter:
    """Takes the values of a part's tokens in order, and writes whole shards.

    Of several processes, which all take all values, each writes its own shards.
    """

    def __init__(
        self, cache: Cache, keys: list[bytes], counts: np.ndarray, origin: str = ""
    ) -> None:
        """Begins the part; one of the same documents and origin is left for `go_on`.

        Args:
          origin: hash of the file that the values are from, if not from the teacher.
        """
        self.cache, self.store = cache, cache.store / part_folder(len(cache.parts))
        self.num_documents, self.num_tokens = len(keys), int(counts.sum())
        self.shard, self.chunk = tokens_per_shard(cache.fields, self.num_tokens)
        self._prepare(index_bytes(keys, counts), origin)
        self.arrays = {
            name: open_array(
                self.store, f"{name}/", field, self.num_tokens, (self.shard, self.chunk)
            )
            for name, field in cache.fields.items()
        }
        self.done = 0
        """Tokens that are on disk or waiting to be written."""
        self.waiting: list[Batch] = []
        self.num_waiting = 0
        """Tokens of `waiting`."""
        self.pending: list[Any] = []

    def _prepare(self, index: bytes, origin: str) -> None:
        """Deletes an unfinished part of other documents or another form, and writes the plan."""
        fields = sorted(self.cache.fields.items())
        recipe = [self.cache.kind, fields, sorted(self.cache.identity.items())]
        recipe += [origin] if origin else []
        plan = {"recipe": json.loads(json.dumps(recipe)), "index": xxhash.xxh3_128_hexdigest(index)}
        if jax.process_index() > 0:
            return
        if self._read_plan() == plan and read_file(self.store, INDEX) == index:
            for name in self.cache.fields:  # a damaged one would be an error
                self.store.write(metadata_key(name), None).result()
            return
        self.store.delete_range(type(self.store).KeyRange()).result()
        self.store.write(INDEX, index).result()
        write_json(self.store, _PLAN, plan)

    def _read_plan(self) -> Any:
        """Returns the plan of the unfinished part; None if there is none, or it is damaged."""
        try:
            return json.loads(read_file(self.store, _PLAN) or b"null")
        except ValueError:
            return None

    def count_whole(self) -> int:
        """Returns the number of shards before the first missing or damaged one of this process.

        Of several processes each reads its own shards.
        """
        found, num_shards = set(list_files(self.store)), -(-self.num_tokens // self.shard)
        for number in range(jax.process_index(), num_shards, jax.process_count()):
            if not all(
                shard_key(name, field, number) in found and self._is_whole(name, number)
                for name, field in self.cache.fields.items()
            ):
                return number
        return num_shards

    def go_on(self, num_whole: int) -> None:
        """Goes on after the first shards, which are there: the least `count_whole` of all."""
        self.done = min(num_whole * self.shard, self.num_tokens)

    def _is_whole(self, name: str, number: int) -> bool:
        """Reads a shard; returns False if a chunk has another CRC."""
        start = number * self.shard
        stop = min(start + self.shard, self.num_tokens)
        try:
            self.arrays[name][start:stop].read().result()
        except (ValueError, OSError):
            return False
        return True

    def append(self, values: Batch) -> None:
        """Takes the values of the next tokens, [n, ...] by field."""
        count = len(next(iter(values.values())))
        begun = (self.done - self.num_waiting) // self.shard
        self.waiting.append(values)
        self.num_waiting += count
        self.done += count
        while self.num_waiting >= self.shard or (self.done == self.num_tokens and self.waiting):
            self._write(begun, self._take(min(self.shard, self.num_waiting)))
            begun += 1

    def _take(self, count: int) -> Batch:
        """Returns the first waiting tokens, and leaves the others."""
        whole = {
            name: np.concatenate([values[name] for values in self.waiting])
            for name in self.cache.fields
        }
        rest = {name: x[count:] for name, x in whole.items()}
        self.num_waiting -= count
        self.waiting = [rest] if self.num_waiting else []
        return {name: x[:count] for name, x in whole.items()}

    def _write(self, number: int, values: Batch) -> None:
        """Starts to write a shard, after the one before is on disk."""
        if number % jax.process_count() != jax.process_index():
            return
        self._wait()
        start = number * self.shard
        for name, field in self.cache.fields.items():
            # TensorStore would read a damaged shard, to keep what lies past the last token.
            self.store.write(shard_key(name, field, number), None).result()
            x = values[name].astype(numpy_dtype(field.dtype), copy=False)
            self.pending.append(self.arrays[name][start : start + len(x)].write(x))

    def _wait(self) -> None:
        for future in self.pending:
            future.result()
        self.pending = []

    def flush(self) -> None:
        """Waits until every shard of this process is on disk."""
        assert self.done == self.num_tokens and not self.waiting
        self._wait()

    def describe(self) -> Part:
        """Returns the finished part, with the hash of every file, which it reads again.

        What it cost differs from run to run, and is not among them.
        """
        files = {}
        for name in (x for x in list_files(self.store) if x != COST):
            data = read_file(self.store, name) or b""
            files[name] = (len(data), xxhash.xxh3_128_hexdigest(data))
        return Part(self.num_documents, self.num_tokens, files)
