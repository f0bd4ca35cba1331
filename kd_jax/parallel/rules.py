"""The rule table from a weight's dimensions to mesh axes, over axis sizes. Needs no jax.

A model's `axes` are those that may split its weights; devices along the others hold copies.
"""

import math
from collections.abc import Mapping, Sequence

from kd_jax.config import Config, MeshConfig, UserError
from kd_jax.models.architecture import Architecture, weights

AXES = ("data", "fsdp", "tensor")


BATCH_AXES = ("data", "fsdp")  # that every array of rows is split over


# Logical name of a weight's dimension -> mesh axis. "layers" is never split: the scan walks it.
RULES: Mapping[str, str | None] = {
    "layers": None,
    "embed": None,
    "heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
    "rank": None,
    "norm": None,
}


# Splits the rows of every matrix besides: a device's share is a few whole ranges of a file, and is
# gathered, where the matrix is used, without moving what lies in between.
ROWS_AXIS = "fsdp"


Sizes = Mapping[str, int]


Split = tuple[tuple[str, ...], ...]


def mesh_sizes(config: MeshConfig, num_devices: int, batch_rows: int) -> dict[str, int]:
    """Returns the devices along each axis, 1 along those left open; rows must divide by theirs."""
    sizes = {name: getattr(config, name) or 1 for name in AXES}
    fixed = math.prod(size for size in sizes.values() if size != -1)
    sizes = {n: num_devices // fixed if size == -1 else size for n, size in sizes.items()}
    if math.prod(sizes.values()) != num_devices:
        raise UserError(
            f"mesh: expected a product of {num_devices} (the devices), got "
            + " x ".join(f"{name} {size}" for name, size in sizes.items())
        )
    shards = axes_size(sizes, BATCH_AXES)
    if batch_rows % shards:
        raise UserError(
            f"data.batch-size: expected micro-batches that divide by {shards} devices "
            f"(mesh.data x mesh.fsdp), got {batch_rows} rows in each. Change data.batch-size, "
            "optim.accumulation-steps or mesh.*"
        )
    return sizes


def axes_size(sizes: Sizes, axes: Sequence[str]) -> int:
    """Returns the devices along all of these axes."""
    return math.prod(sizes[axis] for axis in axes)


def wanted_split(sizes: Sizes, axes: Sequence[str], dims: tuple[str, ...]) -> Split:
    """Returns the mesh axes that the rules give each dimension of a weight.

    Args:
      dims: names in RULES; [layers, rows, columns], [rows, columns], or a vector's.
    """
    named = [axis for axis in map(RULES.get, dims) if axis is not None]
    if len(named) != len(set(named)):
        raise ValueError(f"dims {dims} collide: two of them map to one axis of {RULES}")
    rows = len(dims) - 2 if dims[-2:-1] not in ((), ("layers",)) else None
    pairs = [(RULES[dim], ROWS_AXIS if i == rows else None) for i, dim in enumerate(dims)]
    return tuple(tuple(x for x in pair if x and x in axes and sizes[x] > 1) for pair in pairs)


def split(sizes: Sizes, axes: Sequence[str], dims: tuple[str, ...], shape: Sequence[int]) -> Split:
    """Returns how a weight is split; a dimension is whole along an axis it does not divide by."""
    taken = []
    for wanted, size in zip(wanted_split(sizes, axes, dims), shape, strict=True):
        some: tuple[str, ...] = ()
        for axis in wanted:
            if size % axes_size(sizes, (*some, axis)) == 0:
                some += (axis,)
        taken.append(some)
    return tuple(taken)


def row_axes(sizes: Sizes, axes: Sequence[str], num_rows: int) -> tuple[str, ...]:
    """Returns the axes that split the rows that a model computes.

    Where its weights are not split over "tensor", the rows are, if there are enough of them.
    """
    choices = (BATCH_AXES if "tensor" in axes else AXES, BATCH_AXES, ("data",), ())
    return next(x for x in choices if num_rows % axes_size(sizes, x) == 0)


def check_layout(config: Config, sizes: Sizes, **models: Architecture | None) -> None:
    """Raises UserError with everything of the models, by field, that the mesh cannot split."""
    found = {field: arch for field, arch in models.items() if arch is not None}
    problems = [x for field, arch in found.items() for x in _problems(config, sizes, field, arch)]
    size = min(arch.vocab_size for arch in found.values())
    if size % sizes["tensor"]:
        problems.append(
            f"mesh.tensor: expected a divisor of the vocabulary's {size} entries, got "
            f"{sizes['tensor']}"
        )
    if problems:
        raise UserError("\n".join(problems))


def _problems(config: Config, sizes: Sizes, field: str, arch: Architecture) -> list[str]:
    axes, tolerance = getattr(config, field).shard_over, config.mesh.unsharded_tolerance
    problems, whole, total = [], {}, 0
    size, N, K = sizes["tensor"], arch.num_attention_heads, arch.num_key_value_heads
    if "tensor" in axes and (N % size or (K % size and size % K)):
        problems.append(
            f"mesh.tensor: expected a divisor of the {field}'s {N} query heads that divides "
            f"its {K} key/value heads or is a multiple of them, got {size}"
        )
    for name, weight in weights(arch).items():
        count = math.prod(weight.shape)
        total += count
        if split(sizes, axes, weight.dims, weight.shape) != wanted_split(sizes, axes, weight.dims):
            whole[name] = count
    if sum(whole.values()) > tolerance * total:
        wanted = ", ".join(f"{axis} {sizes[axis]}" for axis in axes)
        problems.append(
            f"mesh: expected dimensions of the {field} that divide by {wanted} for all but "
            f"{tolerance:.0%} of its weights, got {sum(whole.values()) / total:.0%} that do not: "
            f"{', '.join(whole)}. Choose other mesh.* sizes, or raise mesh.unsharded-tolerance"
        )
    return problems
