"""Makes a teacher's cache, and opens it for a run."""

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import jax
from jax.sharding import Mesh

from kd_jax.config import Config, UserError
from kd_jax.config.errors import raise_all
from kd_jax.data.rows import Rows
from kd_jax.data.templates import Template
from kd_jax.inference.teacher_pass import TeacherPass, complete
from kd_jax.parallel.processes import say, together
from kd_jax.planning.choices import choose_dtypes
from kd_jax.setup.cached import (
    CachedTeacher,
    Found,
    check_complete,
    check_loss,
    find_all,
    loss_problems,
    make_identity,
    read_cached,
)
from kd_jax.setup.inputs import open_inputs, open_rows
from kd_jax.setup.model_files import ModelFiles, start_hashing
from kd_jax.teachers.lock import lock_cache
from kd_jax.teachers.manifest import SOURCE, Cache, check_identity, new_cache, read_cache
from kd_jax.teachers.storage import Fields, token_bytes
from kd_jax.teachers.stored import hidden_fields
from kd_jax.teachers.topk import MOST_ENTRIES, topk_fields

_TIMED_BATCHES = 4


class Storage(NamedTuple):
    """Form of the values in a cache, as the flags of kd_jax.cache."""

    kind: str = "hidden"
    dtype: str = "auto"
    k: int = 64


@dataclass(frozen=True, kw_only=True)
class Data:
    """The checked models and rows of a configuration whose teacher is to run."""

    student: ModelFiles
    teacher: ModelFiles
    mesh: Mesh
    vocab_size: int
    rows: tuple[Rows, Rows | None]
    """Training and held-out rows."""
    identity: dict[str, str]


def open_data(config: Config, devices: Sequence[jax.Device] | None = None) -> Data:
    """Returns the inputs of a configuration with a live teacher; raises if they do not fit."""
    assert config.teacher is not None
    student, teacher, mesh = together("config", lambda: open_inputs(config, devices))
    assert teacher is not None
    hashing = start_hashing(teacher)
    rows = open_rows(config, student, teacher)
    hashes = together("teacher", hashing.result, dict)
    identity = make_identity(config.teacher.dtype, hashes, teacher.tokenizer, rows.template)
    return Data(
        student=student,
        teacher=teacher,
        mesh=mesh,
        vocab_size=rows.vocab_size,
        rows=rows.both,
        identity=identity,
    )


def open_cached(
    config: Config,
    teacher: ModelFiles,
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
        with lock_cache(path, "teacher.cache"):
            new = new_cache(path, "hidden", fields, identity)
            cache, found = open_cache(new, "teacher.cache", rows)
            complete(config, cache, teacher, mesh, found)
    return open_finished(config, path, identity, rows)


def open_finished(
    config: Config, path: str, identity: dict[str, str], rows: tuple[Rows, Rows | None]
) -> CachedTeacher:
    """Returns the values of a configuration's rows from a cache that is there."""

    def read() -> CachedTeacher:
        cache = read_cache(path)
        if cache is None:
            raise UserError(
                f"teacher.cache: expected a cache that kd_jax.cache finished, got none in {path}. "
                "The same kd_jax.cache command goes on with one that was interrupted"
            )
        check_identity(cache, identity)
        check_loss(cache, config)
        found = find_all(cache, *rows)
        check_complete(cache, found)
        return read_cached(cache, found)

    return together("cache/read", read, lambda cached: {"teacher.cache": cached.key})


def open_cache(new: Cache, flag: str, rows: tuple[Rows, Rows | None]) -> tuple[Cache, list[Found]]:
    """Returns the cache to which documents of the rows are added, and these.

    Args:
      new: taken where there is none. One that is there must be of the same teacher; with the flag
        --out it must also have the same arrays.
    """

    def read() -> tuple[Cache, list[Found]]:
        cache = read_cache(new.path, flag) or new
        if (SOURCE in cache.identity) != (SOURCE in new.identity):
            wanted = "was made of a file" if SOURCE in cache.identity else "a teacher made"
            raise UserError(
                f"{flag}: expected a cache that one teacher fills, got {new.path}, which {wanted}. "
                + "Add to it with "
                + ("--source alone" if SOURCE in cache.identity else "a teacher, not --source")
            )
        if flag == "--out":
            _check_fields(cache, new)
        check_identity(cache, new.identity, flag)
        return cache, find_all(cache, *rows)

    return together("cache/open", read, lambda opened: {"parts": len(opened[0].parts)})


def make_cache(
    config: Config,
    out: str,
    how: Storage = Storage(),  # noqa: B008
    *,
    dry_run: bool = False,
    check: bool = False,
    devices: Sequence[jax.Device] | None = None,
) -> Data:
    """Runs the teacher on all documents of a configuration, and stores its target tokens' values.

    Returns the configuration's inputs.

    Args:
      how: what a new cache stores.
      dry_run: print tokens, bytes and time, and write nothing.
      check: the configuration's loss must be one that the cache serves, since it is measured next.
      devices: of the mesh; None: all.

    Raises:
      UserError: the configuration has no teacher, or the folder has something else.
    """
    config = with_live_teacher(config)
    assert config.teacher is not None
    data = open_data(config, devices)
    fields = make_fields(how, config.teacher.dtype, data)
    # Log-probabilities depend on the vocabulary that the models share; hidden states do not.
    size = {} if how.kind == "hidden" else {"vocabulary": str(data.vocab_size)}
    new = new_cache(out, how.kind, fields, data.identity | size)
    if check:
        raise_all(loss_problems(new, config))
    if dry_run:
        cache, found = open_cache(new, "--out", data.rows)
        _estimate(config, cache, data, found)
        return data
    with lock_cache(out, "--out"):
        cache, found = open_cache(new, "--out", data.rows)
        say(_describe(cache, found))
        complete(config, cache, data.teacher, data.mesh, found)
    say(f"done: --teacher.cache {out} trains from it")
    return data


def make_fields(how: Storage, dtype: str, data: Data) -> Fields:
    """Returns the arrays of a new cache; raises UserError if k does not fit the vocabulary."""
    if how.kind == "hidden":
        form = dtype if how.dtype == "auto" else how.dtype
        return hidden_fields(data.teacher.arch.hidden_size, form)
    if how.dtype != "auto":
        raise UserError(f"--dtype: expected auto with --kind {how.kind}, got {how.dtype}")
    if how.k % 2 or how.k > data.vocab_size:
        raise UserError(
            f"--k: expected an even number up to {data.vocab_size:,}, the vocabulary, got {how.k}"
        )
    if data.vocab_size > MOST_ENTRIES:
        raise UserError(f"--kind: expected at most {MOST_ENTRIES:,} vocabulary entries")
    return topk_fields(how.k)


def with_live_teacher(config: Config) -> Config:
    """Returns the configuration without teacher.cache, and with its dtypes chosen.

    Raises:
      UserError: there is no teacher.
    """
    if config.teacher is None or not config.distils:
        raise UserError("teacher: expected a teacher and loss.kd-ratio above 0, got none")
    if config.teacher.kind == "ema":
        raise UserError(
            "teacher.kind: expected model or base, got ema, which has no stored outputs"
        )
    teacher = dataclasses.replace(config.teacher, cache=None, cache_missing="error")
    config = choose_dtypes(dataclasses.replace(config, teacher=teacher), jax.devices()[0].platform)
    if config.teacher is None or not config.teacher.is_student:
        return config
    own = dataclasses.replace(config.teacher, kind="model", path=config.student.path)
    return dataclasses.replace(config, teacher=own)


def _check_fields(cache: Cache, new: Cache) -> None:
    """Raises UserError if a cache that is there stores its values in another form."""
    wanted, got = (
        f"{some.kind}: "
        + ", ".join(f"{n} {x.dtype}{list(x.shape)}" for n, x in sorted(some.fields.items()))
        for some in (cache, new)
    )
    if wanted != got:
        raise UserError(
            f"--kind, --k, --dtype: expected those of the cache {cache.path} ({wanted}), got "
            f"{got}. Give another --out"
        )


def _describe(cache: Cache, found: Sequence[Found]) -> str:
    """Returns lines about documents, tokens and bytes that the cache lacks."""
    lines = []
    for one in found:
        tokens = int(one.documents.counts[one.missing].sum())
        lines.append(
            f"{one.name}: {len(one.places):,} documents, {one.num_missing:,} to compute: "
            f"{tokens:,} tokens with a loss, {tokens * token_bytes(cache.fields) / 1e9:.4g} GB"
        )
    return "\n".join([*lines, f"{token_bytes(cache.fields):,} bytes a token in {cache.path}"])


def _estimate(config: Config, cache: Cache, data: Data, found: Sequence[Found]) -> None:
    """Prints what the cache would cost, at the rate of the first batches."""
    say(_describe(cache, found))
    if not any(one.num_missing for one in found):
        return
    run = TeacherPass(config, cache, data.teacher, data.mesh, found)
    total, counts, began = int(run.counts.sum()), list[int](), 0.0
    for values in islice(run.values(), _TIMED_BATCHES):
        began = began or time.perf_counter()  # the first batch compiles
        counts.append(len(next(iter(values.values()))))
    seconds = time.perf_counter() - began
    if len(counts) > 1:
        rate = sum(counts[1:]) / seconds
        say(f"{rate:,.0f} tokens/s: {total / rate / 60:,.1f} min. Nothing was written")
    else:
        say("less than two batches of rows: no rate was measured. Nothing was written")
