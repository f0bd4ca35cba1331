"""Batches of rows: shuffled and endless for training, in order and once for evaluation."""

import math
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction

import grain
import numpy as np

from kd_jax.config import Config
from kd_jax.data.documents import predicts_target
from kd_jax.data.rows import Rows
from kd_jax.data.store import COLUMNS, TEACHER, Batch

ReadTeacher = Callable[[np.ndarray, np.ndarray], Batch]
"""Maps row_ids [..., B] and a row_mask [B] to a cached teacher's arrays of these rows,
[..., B, S, ...], 0 outside the mask. It runs in a thread that reads ahead."""


def read_batch(
    rows: Rows, row_ids: np.ndarray, row_mask: np.ndarray, read_teacher: ReadTeacher | None
) -> Batch:
    """Returns the rows `row_ids`, [..., B], as [..., B, S] arrays, 0 outside `row_mask`, [B] bool.

    A teacher with rows of its own, and not from a cache, adds `teacher_NAME`. NAME is tokens,
    segment_ids or positions, [..., B, St], or places [..., B, S] int32: for each position that
    predicts a target token, the position in the teacher's row that does.
    """
    student = _columns(rows, row_ids, row_mask)
    if read_teacher is not None:
        return student | read_teacher(row_ids, row_mask)
    if rows.teacher is None:
        return student
    teacher = _columns(rows.teacher, row_ids, row_mask)
    places = {"places": align_targets(student, teacher)}  # checkpoints of samples have this name
    del teacher["loss_mask"]
    return student | {f"{TEACHER}{name}": x for name, x in (teacher | places).items()}


def _columns(rows: Rows, row_ids: np.ndarray, row_mask: np.ndarray) -> Batch:
    """Returns the columns of the rows `row_ids`, [..., B], 0 outside `row_mask`, [B] bool."""
    out: Batch = {}
    for name, dtype in COLUMNS.items():
        out[name] = np.zeros((*row_ids.shape, rows.tokens.shape[1]), dtype)
        out[name][..., row_mask, :] = getattr(rows, name)[row_ids[..., row_mask]]
    return out


def align_targets(student: Batch, teacher: Batch) -> np.ndarray:
    """Returns the teacher's position for each of the student's that predicts a target token.

    Args:
      student, teacher: columns [..., S] and [..., St] of rows with the same target tokens.

    Returns:
      [..., S] int32; 0 where no target token is predicted.
    """
    here, there = (predicts_target(x["segment_ids"], x["loss_mask"]) for x in (student, teacher))
    assert (here.sum(axis=-1) == there.sum(axis=-1)).all(), "rows with other target tokens"
    labels = (np.roll(x["tokens"], -1, axis=-1)[y] for x, y in ((student, here), (teacher, there)))
    assert np.array_equal(*labels), "other target tokens"
    positions = np.zeros(here.shape, np.int32)
    positions[here] = np.nonzero(there)[-1]
    return positions


def count_steps(rows: Rows, config: Config) -> int:
    """Returns the run's optimizer steps, from `steps` or from `epochs` over the rows."""
    if config.steps is not None:
        return config.steps
    assert config.epochs is not None
    epochs = Fraction(str(config.epochs))  # as written: 1.1 times 10 in floats is above 11
    return math.ceil(epochs * len(rows) / config.data.batch_size)


def train_batches(
    rows: Rows,
    *,
    seed: int,
    start_step: int,
    batch_size: int,
    accumulation_steps: int,
    row_mask: np.ndarray | None = None,
    read_teacher: ReadTeacher | None = None,
) -> Iterator[Batch]:
    """Yields [A, B / A, S] arrays for each step from `start_step` on, without end.

    A batch depends on seed and step alone. Each epoch has its own order.

    Args:
      row_mask: [B / A] bool, the rows of a micro-batch to read; the others are 0. None: all.
      read_teacher: adds a cached teacher's arrays.
    """
    if row_mask is None:
        row_mask = np.ones(batch_size // accumulation_steps, bool)
    order = _order(rows, seed)

    def take(step: int) -> Batch:
        row_ids = np.array([order[step * batch_size + i] for i in range(batch_size)])
        return read_batch(rows, row_ids.reshape(accumulation_steps, -1), row_mask, read_teacher)

    steps = grain.MapDataset.range(start_step, 2**31).map(take)
    yield from steps.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4))


def _order(rows: Rows, seed: int) -> grain.MapDataset:
    """Returns the endless order of row numbers; each source of a weighted blend has its own."""
    weights = [weight for _, weight, _ in rows.sources if weight]
    orders = shuffled([size for *_, size in rows.sources] if weights else [len(rows)], seed)
    return grain.MapDataset.mix(orders, weights) if weights else orders[0]


def shuffled(sizes: Sequence[int], seed: int) -> list[grain.MapDataset]:
    """Returns an endless order of each source's numbers, a new one in each pass.

    Args:
      sizes: of the sources, whose numbers follow each other.
    """
    starts = np.cumsum([0, *sizes]).tolist()
    return [
        grain.MapDataset.range(start, start + size).seed(seed).shuffle().repeat()
        for start, size in zip(starts, sizes, strict=False)
    ]


def eval_batches(
    rows: Rows,
    batch_size: int,
    numbers: np.ndarray | None = None,
    read_teacher: ReadTeacher | None = None,
) -> Iterator[Batch]:
    """Yields rows once, in order, as [B, S] arrays; zero rows pad the last batch.

    Args:
      numbers: of the rows; None: all.
      read_teacher: adds a cached teacher's arrays.
    """
    numbers = np.arange(len(rows)) if numbers is None else numbers
    for first in range(0, len(numbers), batch_size):
        some = numbers[first : first + batch_size]
        row_mask = np.arange(batch_size) < len(some)
        row_ids = np.pad(some, (0, batch_size - len(some)))
        yield read_batch(rows, row_ids, row_mask, read_teacher)
