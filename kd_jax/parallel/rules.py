"""The rules that shard a weight's dimensions over mesh axes. Needs no jax.

A model's `axes` are those that may shard its weights; devices along the others hold copies.
"context" shards the tokens of each row, and no weights; a mesh has it only if its size is above 1.
"""

import math
from collections.abc import Mapping, Sequence

from kd_jax.config import MeshConfig, UserError

AXES = ("data", "fsdp", "context", "tensor")

BATCH_AXES = ("data", "fsdp")  # shard every array of rows

# Logical name of a weight's dimension -> mesh axis. "layers" is never sharded: the scan walks it.
RULES: Mapping[str, str | None] = {
    "layers": None,
    "embed": None,
    "heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
    "rank": None,
    "norm": None,
}

# Shards the rows of every matrix too: a device's shard is a few contiguous ranges of a file, and an
# all-gather moves nothing in between.
ROWS_AXIS = "fsdp"

Sizes = Mapping[str, int]

Split = tuple[tuple[str, ...], ...]


def mesh_sizes(config: MeshConfig, num_devices: int, batch_rows: int) -> dict[str, int]:
    """Returns the devices along each axis; an axis of size 0 has 1.

    Raises:
      UserError: the sizes do not multiply to the devices, or the rows do not divide.
    """
    sizes = {name: getattr(config, name) or 1 for name in AXES}
    fixed = math.prod(size for size in sizes.values() if size != -1)
    sizes = {n: num_devices // fixed if size == -1 else size for n, size in sizes.items()}
    if math.prod(sizes.values()) != num_devices:
        rest = [name for name in AXES if getattr(config, name) == -1]
        given = describe_mesh({n: x for n, x in mesh_axes(sizes).items() if n not in rest})
        odd = "".join(f", which leave {name} no whole number" for name in rest)
        raise UserError(
            f"mesh: expected a product of {num_devices} (the devices), got {given}{odd}"
        )
    shards = axes_size(sizes, BATCH_AXES)
    if batch_rows % shards:
        raise UserError(
            f"data.batch-size: expected micro-batches that divide by {shards} devices "
            f"(mesh.data x mesh.fsdp), got {batch_rows} rows in each. Change data.batch-size, "
            "optim.accumulation-steps or mesh.*; mesh.context splits rows"
        )
    return mesh_axes(sizes)


def axes_size(sizes: Sizes, axes: Sequence[str]) -> int:
    """Returns the number of devices along all of these axes."""
    return math.prod(sizes[axis] for axis in axes)


def describe_mesh(sizes: Sizes) -> str:
    return " x ".join(f"{name} {size}" for name, size in sizes.items())


def mesh_axes(sizes: Sizes) -> dict[str, int]:
    """Returns the sizes without a context of 1, which would add an axis to every program."""
    return {name: size for name, size in sizes.items() if name != "context" or size != 1}


def wanted_split(sizes: Sizes, axes: Sequence[str], dims: tuple[str, ...]) -> Split:
    """Returns the mesh axes of each dimension of a weight by the rules.

    Args:
      dims: names in RULES, of [layers, rows, columns], [rows, columns], or a vector.
    """
    named = [axis for axis in map(RULES.get, dims) if axis is not None]
    if len(named) != len(set(named)):
        raise ValueError(f"dims {dims} collide: two of them map to one axis of {RULES}")
    rows = len(dims) - 2 if dims[-2:-1] not in ((), ("layers",)) else None
    pairs = [(RULES[dim], ROWS_AXIS if i == rows else None) for i, dim in enumerate(dims)]
    return tuple(tuple(x for x in pair if x and x in axes and sizes[x] > 1) for pair in pairs)


def split(sizes: Sizes, axes: Sequence[str], dims: tuple[str, ...], shape: Sequence[int]) -> Split:
    """Returns a weight's mesh axes; axes that do not divide a dimension are left out."""
    taken = []
    for wanted, size in zip(wanted_split(sizes, axes, dims), shape, strict=True):
        some: tuple[str, ...] = ()
        for axis in wanted:
            if size % axes_size(sizes, (*some, axis)) == 0:
                some += (axis,)
        taken.append(some)
    return tuple(taken)


def row_axes(sizes: Sizes, axes: Sequence[str], num_rows: int) -> tuple[str, ...]:
    """Returns the axes that shard the rows that a model computes.

    "tensor" is one of them where it shards no weights and divides the rows.
    """
    most = BATCH_AXES if "tensor" in axes else (*BATCH_AXES, "tensor")
    choices = (most, BATCH_AXES, ("data",), ())
    return next(x for x in choices if num_rows % axes_size(sizes, x) == 0)


def context_size(sizes: Sizes) -> int:
    """Returns the parts into which the tokens of a row are split."""
    return sizes.get("context", 1)


def context_axis(sizes: Sizes, num_tokens: int) -> str | None:
    """Returns the axis that shards the tokens of rows; None where none does, or not evenly."""
    size = context_size(sizes)
    return "context" if size > 1 and num_tokens % size == 0 else None


def uneven_rows(sizes: Sizes, lengths: Mapping[str, int]) -> list[str]:
    """Returns the problems of rows, by name, that context does not split into equal parts."""
    size = context_size(sizes)
    return [
        f"mesh.context: expected a divisor of {name}, {length:,} tokens, got {size}"
        for name, length in lengths.items()
        if length % size
    ]


def token_axes(sizes: Sizes, num_tokens: int) -> tuple[str, ...]:
    """Returns the axes that shard the tokens of a batch, whose rows have `num_tokens` each."""
    context = context_axis(sizes, num_tokens)
    return BATCH_AXES if context is None else (*BATCH_AXES, context)
