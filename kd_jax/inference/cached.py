"""Makes a teacher's cache, and opens it for a run."""

import dataclasses
import time
from collections.abc import Sequence

import jax
from jax.sharding import Mesh

from kd_jax.config import Config, UserError
from kd_jax.data.chat import chat_template_of
from kd_jax.data.rows import Rows
from kd_jax.data.templates import Template
from kd_jax.inference.teacher_pass import TeacherPass, complete
from kd_jax.parallel.processes import say, together
from kd_jax.setup.cached import (
    CachedTeacher,
    Found,
    check_complete,
    find_all,
    make_identity,
    read_cached,
)
from kd_jax.setup.inputs import open_inputs, read_rows
from kd_jax.setup.sources import Source, check_shared, shared_vocab, start_hashing
from kd_jax.teachers.claim import claimed
from kd_jax.teachers.manifest import Cache, check_identity, new_cache, read_cache
from kd_jax.teachers.storage import Fields, token_bytes
from kd_jax.teachers.stored import hidden_fields

_TIMED_BATCHES = 4


def open_cached(
    config: Config,
    teacher: Source,
    mesh: Mesh,
    hashes: dict[str, str],
    template: Template | None,
    rows: tuple[Rows, Rows | None],
) -> CachedTeacher:
    """Returns the values of training and held-out rows from teacher.cache.

    With teacher.cache-missing compute the teacher first runs on the documents that it lacks.

    Args:
      hashes: content hashes by config field, of the teacher and its adapter among them.

    Raises:
      UserError: there is no cache, it is damaged or of another teacher, or documents are missing.
    """
    assert config.teacher is not None and config.teacher.cache is not None
    path = config.teacher.cache
    identity = make_identity(config.teacher.dtype, hashes, teacher.tokenizer, template)
    if config.teacher.cache_missing == "compute":
        fields = hidden_fields(teacher.arch.hidden_size, config.teacher.dtype)
        with claimed(path, "teacher.cache"):
            cache, found = _open(path, "teacher.cache", "hidden", fields, identity, rows)
            cache = complete(config, cache, teacher, mesh, found)
    else:
        there = read_cache(path)
        if there is None:
            raise UserError(
                f"teacher.cache: expected a cache that kd_jax.cache finished, got none in {path}. "
                "The same kd_jax.cache command goes on with one that was interrupted"
            )
        cache = there
        check_identity(cache, identity)
    found = find_all(cache, *rows)
    check_complete(cache, found)
    return read_cached(cache, found)


def _open(
    path: str,
    flag: str,
    kind: str,
    fields: Fields,
    identity: dict[str, str],
    rows: tuple[Rows, Rows | None],
) -> tuple[Cache, list[Found]]:
    """Returns the cache in a folder, or a new one, and the documents of the rows."""
    cache = read_cache(path, flag)
    if cache is None:
        cache = new_cache(path, kind, fields, identity)
    check_identity(cache, identity, flag)
    return cache, find_all(cache, *rows)


def make_cache(
    config: Config,
    out: str,
    *,
    kind: str = "hidden",
    dtype: str = "auto",
    dry_run: bool = False,
    devices: Sequence[jax.Device] | None = None,
) -> None:
    """Writes the teacher's hidden states of all target tokens of a run's documents.

    Args:
      kind, dtype, dry_run: as in kd_jax.cache.
      devices: of the mesh; None: all.

    Raises:
      UserError: the configuration has no teacher, or the folder has something else.
    """
    config = _with_live_teacher(config)
    student, teacher, mesh = together("config", lambda: (open_inputs(config, devices), {}))
    assert teacher is not None and config.teacher is not None
    hashing = start_hashing(teacher)
    tokenizers = (student.tokenizer, teacher.tokenizer)
    shared = shared_vocab(student, teacher)
    rows = together("rows", lambda: read_rows(config, *tokenizers), first_alone=True)
    check_shared(shared, student, teacher, rows[0], "data.path")
    check_shared(shared, student, teacher, rows[1], "eval.path")
    hashes = together("teacher", lambda: (hashing.result(), hashing.result()))
    template = chat_template_of(config.data, *tokenizers)
    identity = make_identity(config.teacher.dtype, hashes, teacher.tokenizer, template)
    fields = hidden_fields(
        teacher.arch.hidden_size, config.teacher.dtype if dtype == "auto" else dtype
    )
    if dry_run:
        cache, found = _open(out, "--out", kind, fields, identity, rows)
        _estimate(config, cache, teacher, mesh, found)
        return
    with claimed(out, "--out"):
        cache, found = _open(out, "--out", kind, fields, identity, rows)
        _check_fields(cache, fields)
        say(_describe(cache, found))
        complete(config, cache, teacher, mesh, found)
    say(f"done: --teacher.cache {out} trains from it")


def _with_live_teacher(config: Config) -> Config:
    """Returns the configuration without teacher.cache; raises UserError without a teacher."""
    if config.teacher is None or not config.distils:
        raise UserError("teacher: expected a teacher and loss.kd-ratio above 0, got none")
    teacher = dataclasses.replace(config.teacher, cache=None, cache_missing="error")
    return dataclasses.replace(config, teacher=teacher)


def _check_fields(cache: Cache, fields: Fields) -> None:
    """Raises UserError if a cache that is there stores its values in another form."""
    ours, theirs = (
        ", ".join(f"{n} {x.dtype}" for n, x in sorted(some.items()))
        for some in (fields, cache.fields)
    )
    if fields != cache.fields:
        raise UserError(
            f"--dtype: expected that of the cache {cache.path} ({theirs}), got {ours}. Give "
            "another --out"
        )


def _describe(cache: Cache, found: Sequence[Found]) -> str:
    """Returns what is missing in the cache: documents, tokens and bytes."""
    lines = []
    for one in found:
        missing = one.places < 0
        tokens = int(one.documents.counts[missing].sum())
        lines.append(
            f"{one.name}: {len(missing):,} documents, {one.num_missing:,} to compute: {tokens:,} "
            f"tokens with a loss, {tokens * token_bytes(cache.fields) / 1e9:.4g} GB"
        )
    return "\n".join([*lines, f"{token_bytes(cache.fields):,} bytes a token in {cache.path}"])


def _estimate(
    config: Config, cache: Cache, teacher: Source, mesh: Mesh, found: Sequence[Found]
) -> None:
    """Prints what the cache would cost, at the rate of the first batches."""
    say(_describe(cache, found))
    if not any(one.num_missing for one in found):
        return
    run = TeacherPass(config, cache, teacher, mesh, found)
    total, counts, began = int(run.counts.sum()), list[int](), 0.0
    for values, _ in zip(run.values(), range(_TIMED_BATCHES), strict=False):
        began = began or time.perf_counter()  # the first batch compiles
        counts.append(len(next(iter(values.values()))))
    seconds = time.perf_counter() - began
    if len(counts) > 1:
        rate = sum(counts[1:]) / seconds
        say(f"{rate:,.0f} tokens/s: {total / rate / 60:,.1f} min. Nothing was written")
    else:
        say("less than two batches of rows: no rate was measured. Nothing was written")
