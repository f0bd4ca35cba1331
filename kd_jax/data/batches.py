"""Batches of rows: shuffled and endless for training, in order and once for evaluation."""

import math
from collections.abc import Iterator

import grain
import numpy as np

from kd_jax.config import Config
from kd_jax.data.rows import Rows
from kd_jax.data.store import COLUMNS, Batch


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
) -> Iterator[Batch]:
    """Yields [A, B / A, S] arrays for each step from `start_step` on, without end.

    A batch depends on seed and step alone. Each epoch has its own order.

    Args:
      wanted: [B / A] bool, the rows of a micro-batch to read; the others are 0. None: all.
    """
    wanted = np.ones(batch_size // accumulation_steps, bool) if wanted is None else wanted
    order = _order(rows, seed)

    def take(step: int) -> Batch:
        picked = [order[step * batch_size + i] for i in range(batch_size)]
        return _batch(rows, np.array(picked).reshape(accumulation_steps, -1), wanted)

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
    """Returns the columns of row numbers `picked`, [A, B / A], zero where not wanted."""
    out: Batch = {}
    for name, dtype in COLUMNS.items():
        out[name] = np.zeros((*picked.shape, rows.tokens.shape[1]), dtype)
        out[name][:, wanted] = getattr(rows, name)[picked[:, wanted]]
    return out


def eval_batches(rows: Rows, batch_size: int) -> Iterator[Batch]:
    """Yields every row once, in order, as [B, S] arrays; zero rows pad the last batch."""
    for first in range(0, len(rows), batch_size):
        some = {name: np.array(getattr(rows, name)[first : first + batch_size]) for name in COLUMNS}
        missing = batch_size - len(some["tokens"])
        yield {name: np.pad(x, ((0, missing), (0, 0))) for name, x in some.items()}
