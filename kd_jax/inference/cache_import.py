"""A teacher's cache made of a file in which another system wrote log-probabilities."""

import json
from collections.abc import Iterator, Sequence

import jax
import numpy as np
import xxhash

from kd_jax.config import Config, UserError
from kd_jax.config.command import check_out_file
from kd_jax.data.documents import predicts_target
from kd_jax.data.rows import Rows
from kd_jax.data.store import Batch
from kd_jax.inference.cached import (
    Data,
    Storage,
    make_fields,
    open_cache,
    open_data,
    with_live_teacher,
)
from kd_jax.inference.teacher_pass import finish
from kd_jax.parallel.processes import say
from kd_jax.setup.cached import Found, missing_documents
from kd_jax.teachers.lock import lock_cache
from kd_jax.teachers.manifest import SOURCE, new_cache
from kd_jax.teachers.records import (
    Record,
    check_alignment,
    difference,
    make_values,
    read_records,
    source_files,
)
from kd_jax.teachers.storage import storing
from kd_jax.teachers.writing import PartWriter
from kd_jax.weights.files import write_whole
from kd_jax.weights.hashes import hash_files


def import_cache(
    config: Config, out: str, source: str, k: int, devices: Sequence[jax.Device] | None = None
) -> Data:
    """Writes a cache of the k most likely entries of each target token, from the file `source`.

    teacher.path names any model with the teacher's tokenizer, such as the student; of it only the
    tokenizer and the vocabulary are used.

    Raises:
      UserError: a document has no record of its very tokens, or a record is wrong. Nothing is
        written then.
    """
    if jax.process_count() > 1:
        raise UserError(f"--source: expected one process, got {jax.process_count()}")
    data = open_data(with_live_teacher(config), devices)
    fields = make_fields(Storage("topk", k=k), "auto", data)
    records = _read_by_tokens(source)
    check_alignment(records.values(), source)
    identity = {n: x for n, x in data.identity.items() if not n.startswith("teacher.")}
    identity |= {SOURCE: "records", "vocabulary": str(data.vocab_size)}
    with lock_cache(out, "--out"):
        new = new_cache(out, "topk", fields, identity)
        cache, found = open_cache(new, "--out", data.rows)
        values = [x for one in found for x in _values(one, records, source, k, data.vocab_size)]
        keys, counts = missing_documents(found)
        if keys:
            with storing(out):
                hashes = "".join(hash_files(source_files(source)))
                origin = xxhash.xxh3_128_hexdigest(hashes.encode())
                writer = PartWriter(cache, keys, counts, origin)
                writer.go_on(writer.count_whole())
                skip = writer.done
                for some in values:
                    count = len(some["rest"])
                    if skip < count:
                        writer.append({name: x[skip:] for name, x in some.items()})
                    skip = max(0, skip - count)
            finish(writer)
    documents = {tokens.tobytes() for one in found for tokens, _ in _documents(one.teacher_rows)}
    if unused := len(records.keys() - documents):
        records_are = "record is" if unused == 1 else "records are"
        say(f"{source}: {unused:,} {records_are} of no document of this run and not used")
    say(f"{len(keys):,} documents of {source} added: --teacher.cache {out} trains from them")
    return data


def _read_by_tokens(source: str) -> dict[bytes, Record]:
    """Returns the records by their tokens' bytes; says where one takes the place of another."""
    records: dict[bytes, Record] = {}
    again: list[str] = []
    for record in read_records(source):
        before = records.setdefault(record.tokens.tobytes(), record)
        if before is not record:
            again.append(f"{before.place} and {record.place}")
            records[record.tokens.tobytes()] = record
    if again:
        say(
            f"warning: --source: {len(again):,} records have the tokens of an earlier one, such as "
            f"{again[0]}; the last one counts"
        )
    return records


def write_documents(config: Config, path: str, devices: Sequence[jax.Device] | None = None) -> None:
    """Writes the tokens of each different document, a line of JSON each, for another system.

    Raises:
      UserError: the file is another one, or cannot be written.
    """
    file = check_out_file(path, "--out", "prompt_token_ids", lines=True)
    data = open_data(with_live_teacher(config), devices)
    seen: set[bytes] = set()

    def lines() -> Iterator[str]:
        for rows in [some.teacher or some for some in data.rows if some is not None]:
            for tokens, _ in _documents(rows):
                if (key := xxhash.xxh3_128_digest(tokens)) not in seen:
                    seen.add(key)
                    yield json.dumps({"prompt_token_ids": tokens.tolist()}) + "\n"

    with storing(path):
        write_whole(file, lines())
    say(f"{path}: {len(seen):,} documents")


def _documents(rows: Rows) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields each document's tokens, [n] int32, and its target tokens' positions, in order."""
    for row in range(len(rows)):
        tokens, segments, mask = (
            np.asarray(x[np.array([row])])[0]
            for x in (rows.tokens, rows.segment_ids, rows.loss_mask)
        )
        predicts = predicts_target(segments, mask)
        for number in range(1, int(segments.max()) + 1):
            own = segments == number
            yield tokens[own].astype(np.int32), np.flatnonzero(predicts[own]) + 1


def _values(
    found: Found, records: dict[bytes, Record], source: str, k: int, num_entries: int
) -> Iterator[Batch]:
    """Yields the values of each missing document's target tokens."""
    for (tokens, positions), place in zip(
        _documents(found.teacher_rows), found.places, strict=True
    ):
        if place >= 0:
            continue
        record = records.get(tokens.tobytes())
        if record is None:
            raise UserError(
                f"{source}: expected a record with the tokens of each document; of one of "
                f"{len(tokens)} tokens in {found.name} there is none: "
                f"{difference(tokens, records)}. Make the file from the tokens that "
                "--documents writes"
            )
        yield make_values(record, positions, k, num_entries)
