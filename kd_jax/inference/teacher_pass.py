"""The teacher's forward pass over rows, into a cache."""

from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from kd_jax.config import Config, UserError
from kd_jax.data.batches import eval_batches
from kd_jax.data.documents import predicts_target
from kd_jax.data.store import Batch
from kd_jax.models.decoder import DecoderSpec
from kd_jax.parallel.mesh import compiler_options, replicated
from kd_jax.parallel.placement import Arrays, one_late, put_batch
from kd_jax.parallel.processes import gather, on_first, say, together
from kd_jax.parallel.progress import Progress
from kd_jax.setup.cached import Found, missing_documents
from kd_jax.setup.model_files import ModelFiles
from kd_jax.setup.models import load_frozen
from kd_jax.teachers.cost import Cost, cost_of, write_cost
from kd_jax.teachers.live import LiveModel
from kd_jax.teachers.manifest import Cache, commit, read_cache
from kd_jax.teachers.storage import storing, token_bytes
from kd_jax.teachers.stored import encode
from kd_jax.teachers.topk import Selection
from kd_jax.teachers.writing import PartWriter

_FINITE = "finite"


class _Work:
    """Rows of one data set with documents to compute."""

    def __init__(self, found: Found) -> None:
        self.found = found
        counts = np.where(found.missing, found.documents.counts, 0)
        before = np.concatenate([[0], np.cumsum(counts)])
        tokens = np.diff(before[found.documents.first])
        self.numbers = np.flatnonzero(tokens)
        """[R] of rows with such documents, in order."""
        self.tokens = tokens[self.numbers]
        """[R] int64: target tokens of such documents in each of these rows."""

    def select(self, batch: Batch, row_ids: np.ndarray) -> np.ndarray:
        """Returns [B, S] bool: tokens of a batch whose values are wanted."""
        segments, first = batch["segment_ids"], self.found.documents.first
        document = np.where(segments > 0, first[row_ids][:, None] + segments - 1, 0)
        wanted = predicts_target(segments, batch["loss_mask"]) & (segments > 0)
        return wanted & (self.found.places[document] < 0)


class TeacherPass:
    """The teacher on a mesh, and the documents that it has to run on."""

    def __init__(
        self, config: Config, cache: Cache, teacher: ModelFiles, mesh: Mesh, found: Sequence[Found]
    ) -> None:
        """Loads the teacher; `found` are the documents of all data sets."""
        assert config.teacher is not None
        self.mesh = mesh
        self.work = [_Work(one) for one in found]
        self.keys, self.counts = missing_documents(found)
        self.batch_rows = config.data.batch_size // config.optim.accumulation_steps
        self.spec, self.arrays = load_frozen(config, config.teacher, teacher, mesh)
        self.stored = _what_is_stored(cache)
        several = jax.process_count() > 1
        self.run = jax.jit(
            teacher_values,
            static_argnums=(0, 1),
            out_shardings=replicated(mesh) if several else None,
            compiler_options=compiler_options(mesh),
        )

    @property
    def batch_tokens(self) -> int:
        return self.batch_rows * self.work[0].found.teacher_rows.tokens.shape[1]

    def values(self, skip: int = 0) -> Iterator[Batch]:
        """Yields the values of the tokens from number `skip` on, a batch of rows at a time."""
        for out, mask, before in one_late(self._started(skip)):
            yield _selected(out, mask, before)

    def _started(self, skip: int) -> Iterator[tuple[Arrays, np.ndarray, int]]:
        """Yields the outputs of each batch, its wanted tokens, and how many of them to skip."""
        for work, numbers, before in self._batches(skip):
            (batch,) = eval_batches(work.found.teacher_rows, self.batch_rows, numbers)
            row_ids = np.pad(numbers, (0, self.batch_rows - len(numbers)))
            yield self.forward(batch), work.select(batch, row_ids), before

    def forward(self, batch: Batch) -> Arrays:
        """Starts the pass over rows, and returns their values as stored, [B, S, ...]."""
        return self.run(self.spec, self.stored, self.arrays, put_batch(batch, self.mesh))

    def _batches(self, skip: int) -> Iterator[tuple[_Work, np.ndarray, int]]:
        """Yields the rows of each batch with tokens from `skip` on, and how many come before it."""
        for work in self.work:
            for first in range(0, len(work.numbers), self.batch_rows):
                some = slice(first, first + self.batch_rows)
                count = int(work.tokens[some].sum())
                if skip < count:
                    yield work, work.numbers[some], skip
                skip = max(0, skip - count)


def _selected(out: Arrays, mask: np.ndarray, skip: int) -> Batch:
    values = {name: x[mask][skip:] for name, x in jax.device_get(out).items()}
    if not values.pop(_FINITE).all():
        raise UserError(
            "teacher.path: expected finite outputs, got NaN or infinity: its weights, or its "
            "adapter's, are damaged. Nothing of these rows was stored"
        )
    return values


def teacher_values(
    spec: DecoderSpec, stored: str | Selection, arrays: Arrays, batch: Arrays
) -> Arrays:
    """Returns what is stored of rows, [B, S, ...], and which tokens are finite, [B, S] bool.

    Args:
      stored: the dtype of hidden states, or which entries of the distribution.
    """
    side, _ = LiveModel(spec)(arrays, batch)
    finite = {_FINITE: jnp.all(jnp.isfinite(side.hidden), axis=-1)}
    if isinstance(stored, str):
        return encode(side.hidden, stored) | finite
    return stored(side.hidden, side.head, batch["tokens"]) | finite


def _what_is_stored(cache: Cache) -> str | Selection:
    if cache.kind == "hidden":
        return cache.fields["hidden"].dtype
    k, size = cache.fields["ids"].shape[0], int(cache.identity["vocabulary"])
    return Selection(kind=cache.kind, k=k, num_entries=size)


def complete(
    config: Config, cache: Cache, teacher: ModelFiles, mesh: Mesh, found: Sequence[Found]
) -> None:
    """Adds the missing documents to the cache, in a part of their own."""
    if not any(one.num_missing for one in found):
        return
    run = TeacherPass(config, cache, teacher, mesh, found)
    writer = _begin(cache, run.keys, run.counts)
    progress = Progress(cache.path, writer.num_tokens, "tokens with a loss", writer.done)
    share = 1 - writer.done / max(1, writer.num_tokens)
    for values in run.values(writer.done):
        with storing(cache.path):
            writer.append(values)
        progress.batch(writer.done, run.batch_tokens)
    finish(writer, cost_of(progress, share) if share else None)
    if read_cache(cache.path) is None:
        raise UserError(f"{cache.path}: what was written there cannot be read back")
    say(
        f"{cache.path}: {len(run.keys):,} documents added, {writer.num_tokens:,} tokens, "
        f"{writer.num_tokens * token_bytes(cache.fields) / 1e9:.3g} GB"
    )


def _begin(cache: Cache, keys: list[bytes], counts: np.ndarray) -> PartWriter:
    """Returns the writer of a new part, after what of it is whole on disk."""

    def open_part() -> PartWriter:
        with storing(cache.path):
            return PartWriter(cache, keys, counts)

    def count_whole() -> int:
        with storing(cache.path):
            return writer.count_whole()

    writer = together("cache/part", open_part, lambda x: {"tokens": x.num_tokens}, first_alone=True)
    writer.go_on(min(gather("cache/whole", count_whole)))
    return writer


def finish(writer: PartWriter, cost: Cost | None = None) -> None:
    """Waits until the part is on disk, and commits it; `cost` is the teacher's."""
    together("cache/written", lambda: _end(writer))
    on_first("cache/committed", lambda: _commit(writer, cost))


def _end(writer: PartWriter) -> None:
    with storing(writer.cache.path):
        writer.flush()


def _commit(writer: PartWriter, cost: Cost | None) -> None:
    with storing(writer.cache.path):
        if cost is not None:
            write_cost(writer.store, cost)
        commit(writer.cache, writer.describe())
