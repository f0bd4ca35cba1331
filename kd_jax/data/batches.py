"""Batches of rows: shuffled and endless for training, in order and once for evaluation."""

import math
from collections.abc import Callable, Iterator, Sequence

import grain
import numpy as np

from kd_jax.config import Config
from kd_jax.data.documents import predicts_target
from kd_jax.data.rows import Rows
from kd_jax.data.store import COLUMNS, TEACHER, Batch

Extra = Callable[[np.ndarray, np.ndarray], Batch]
"""Maps row numbers [..., B] and which of the B to read, bool, to more arrays of a batch,
[..., B, S, ...], zero where not wanted. It runs in a thread that reads ahead."""


def read_batch(rows: Rows, picked: np.ndarray, wanted: np.ndarray, extra: Extra | None) -> Batch:
    """Returns row numbers `picked`, [..., B], as [..., B, S] arrays, zero where not wanted.

    A teacher with rows of its own adds `teacher_NAME`, unless `extra` has its values. NAME is
    tokens, segment_ids or positions, [..., B, T], or places [..., B, S] int32: for each position
    that predicts a target token, the position in the teacher's row that does.

    Args:
      wanted: [B] bool.
    """
    ours = _columns(rows, picked, wanted)
    if extra is not None:
        return ours | extra(picked, wanted)
    if rows.teacher is None:
        return ours
    theirs = _columns(rows.teacher, picked, wanted)
    places = {"places": find_places(ours, theirs)}
    del theirs["loss_mask"]
    return ours | {f"{TEACHER}{name}": x for name, x in (theirs | places).items()}


def _columns(rows: Rows, picked: np.ndarray, wanted: np.ndarray) -> Batch:
    """Returns the columns of row numbers `picked`, [..., B], zero where not wanted, [B] bool."""
    out: Batch = {}
    for name, dtype in COLUMNS.items():
        out[name] = np.zeros((*picked.shape, rows.tokens.shape[1]), dtype)
        out[name][..., wanted, :] = getattr(rows, name)[picked[..., wanted]]
    return out


def find_places(ours: Batch, theirs: Batch) -> np.ndarray:
    """Returns the teacher's position for each of the student's that predicts a target token.

    Args:
      ours, theirs: columns [..., S] and [..., T] of rows with the same target tokens.

    Returns:
      [..., S] int32; 0 where no target token is predicted.
    """
    here, there = (predicts_target(x["segment_ids"], x["loss_mask"]) for x in (ours, theirs))
    assert (here.sum(axis=-1) == there.sum(axis=-1)).all(), "rows with other target tokens"
    labels = (np.roll(x["tokens"], -1, axis=-1)[y] for x, y in ((ours, here), (theirs, there)))
    assert np.array_equal(*labels), "other target tokens"
    places = np.zeros(here.shape, np.int32)
    places[here] = np.nonzero(there)[-1]
    return places


def count_steps(rows: Rows, config: Config) -> int:
    """Returns the run's optimizer steps, from `steps` or from `epochs` over the rows."""
    if config.steps is not None:
        return config.steps
    assert config.epochs is not None
    return math.ceil(config.epochs * len(rows) / config.data.batch_size)


def train_batches(
    rows: Rows,
    *,
    seed: int,
    start_step: int,
    batch_size: int,
    accumulation_steps: int,
    wanted: np.ndarray | None = None,
    extra: Extra | None = None,
) -> Iterator[Batch]:
    """Yields [A, B / A, S] arrays for each step from `start_step` on, without end.

    A batch depends on seed and step alone. Each epoch has its own order.

    Args:
      wanted: [B / A] bool, the rows of a micro-batch to read; the others are 0. None: all.
      extra: adds arrays.
    """
    wanted = np.ones(batch_size // accumulation_steps, bool) if wanted is None else wanted
    order = _order(rows, seed)

    def take(step: int) -> Batch:
        picked = [order[step * batch_size + i] for i in range(batch_size)]
        numbers = np.array(picked).reshape(accumulation_steps, -1)
        return read_batch(rows, numbers, wanted, extra)

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
    extra: Extra | None = None,
) -> Iterator[Batch]:
    """Yields rows once, in order, as [B, S] arrays; zero rows pad the last batch.

    Args:
      numbers: of the rows; None: all.
      extra: adds arrays.
    """
    numbers = np.arange(len(rows)) if numbers is None else numbers
    for first in range(0, len(numbers), batch_size):
        some = numbers[first : first + batch_size]
        wanted = np.arange(batch_size) < len(some)
        picked = np.pad(some, (0, batch_size - len(some)))
        yield read_batch(rows, picked, wanted, extra)
