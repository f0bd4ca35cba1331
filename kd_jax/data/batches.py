"""Batches of rows: shuffled and endless for training, in order and once for evaluation."""

import math
from collections.abc import Callable, Iterator

import grain
import numpy as np

from kd_jax.config import Config
from kd_jax.data.rows import Rows
from kd_jax.data.store import COLUMNS, Batch

Extra = Callable[[np.ndarray, np.ndarray], Batch]
"""Maps row numbers [..., B] and which of the B to read, bool, to more arrays of a batch,
[..., B, S, ...], zero where not wanted. It runs in a thread that reads ahead."""


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
        more = {} if extra is None else extra(numbers, wanted)
        return _batch(rows, numbers, wanted) | more

    steps = grain.MapDataset.range(start_step, 2**31).map(take)
    yield from steps.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4))


def _order(rows: Rows, seed: int) -> grain.MapDataset:
    """Returns the endless order of row numbers; each source of a weighted blend has its own."""
    weights = [weight for _, weight, _ in rows.sources if weight]
    sizes = [size for *_, size in rows.sources] if weights else [len(rows)]
    starts = np.cumsum([0, *sizes]).tolist()
    orders = [
        grain.MapDataset.range(start, start + size).seed(seed).shuffle().repeat()
        for start, size in zip(starts, sizes, strict=False)
    ]
    return grain.MapDataset.mix(orders, weights) if weights else orders[0]


def _batch(rows: Rows, picked: np.ndarray, wanted: np.ndarray) -> Batch:
    """Returns the columns of row numbers `picked`, [..., B], zero where not wanted, [B] bool."""
    out: Batch = {}
    for name, dtype in COLUMNS.items():
        out[name] = np.zeros((*picked.shape, rows.tokens.shape[1]), dtype)
        out[name][..., wanted, :] = getattr(rows, name)[picked[..., wanted]]
    return out


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
        yield _batch(rows, picked, wanted) | ({} if extra is None else extra(picked, wanted))
