"""Batches onto the devices of a mesh."""

from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh

from kd_jax.parallel.experimental import experimental
from kd_jax.parallel.mesh import batch_sharding, vector_sharding

Arrays = dict[str, jax.Array]
T = TypeVar("T")


def local_rows(mesh: Mesh, num_rows: int) -> np.ndarray:
    """Returns the mask of a batch's rows on this process's devices, [num_rows] bool."""
    wanted = np.zeros(num_rows, bool)
    for index in batch_sharding(mesh, 2).addressable_devices_indices_map((num_rows, 1)).values():
        assert index is not None
        wanted[index[0]] = True
    return wanted


def put_batch(batch: dict[str, Any], mesh: Mesh) -> Arrays:
    """Returns [A, B, S, ...] or [B, S, ...] arrays on the mesh; each process sends its own rows.

    Args:
      batch: arrays of which `tokens` has the dimensions that all begin with. Of those with more,
        a device has its part of the rows' tokens alone.
    """
    shape = batch["tokens"].shape
    plain = batch_sharding(mesh, len(shape))
    vectors = vector_sharding(mesh, len(shape) + 1, shape[-1])
    return {
        name: jax.make_array_from_callback(
            x.shape, vectors if x.ndim > len(shape) else plain, x.__getitem__
        )
        for name, x in batch.items()
    }


def one_late(items: Iterable[T]) -> Iterator[T]:
    """Yields each item once the next one is made: the devices compute it while this one is read."""
    late: list[T] = []
    for item in items:
        yield from late
        late = [item]
    yield from late


def fetch(x: jax.Array) -> np.ndarray:
    """Returns a whole array in host memory, on every process."""
    if x.is_fully_addressable or x.is_fully_replicated:
        return np.asarray(x)
    gather = experimental("jax.experimental.multihost_utils", "process_allgather")
    return gather(x, tiled=True)
