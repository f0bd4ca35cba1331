"""The device mesh and the rule table from a weight's dimensions to mesh axes."""

import math
from collections.abc import Mapping

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from kd_jax.config import MeshConfig, UserError

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")

# Logical name of a weight's dimension -> mesh axis. "layers" is never split: the scan walks it.
Rules = Mapping[str, str | None]
RULES: Rules = {
    "layers": None,
    "embed": "fsdp",
    "heads": "tensor",
    "mlp": "tensor",
    "vocab": "fsdp",
    "row": None,  # of an embedding or a head, whose first dimension is split already
    "norm": None,
}


def make_mesh(config: MeshConfig, batch_rows: int) -> Mesh:
    """Returns the mesh over all devices; its batch shards must divide a micro-batch's rows."""
    num_devices = jax.device_count()
    sizes = {name: getattr(config, name) for name in AXES}
    fixed = int(np.prod([size for size in sizes.values() if size != -1]))
    sizes = {n: num_devices // fixed if size == -1 else size for n, size in sizes.items()}
    if int(np.prod(list(sizes.values()))) != num_devices:
        raise UserError(
            f"mesh: expected a product of {num_devices} (the devices), got "
            + " x ".join(f"{name} {size}" for name, size in sizes.items())
        )
    shards = sizes["data"] * sizes["fsdp"]
    if batch_rows % shards:
        raise UserError(
            f"data.batch-size: expected micro-batches that divide by {shards} devices "
            f"(mesh.data x mesh.fsdp), got {batch_rows} rows in each. Change data.batch-size, "
            "optim.accumulation-steps or mesh.*"
        )
    return jax.make_mesh(
        tuple(sizes.values()), AXES, axis_types=(jax.sharding.AxisType.Auto,) * len(AXES)
    )


def compiler_options(mesh: Mesh) -> dict[str, bool | int]:
    """Returns what XLA is told besides its defaults, for programs on these devices.

    A CPU's sums over the vocabulary are vectorised only if their terms may be added in any order;
    NaN and infinity stay what they are. docs/benchmarks.md has the times.
    """
    if mesh.devices.flat[0].platform != "cpu":
        return {}
    return {"xla_cpu_enable_fast_math": True, "xla_cpu_prefer_vector_width": 512}


def weight_sharding(
    mesh: Mesh, dims: tuple[str, ...], shape: tuple[int, ...], rules: Rules = RULES
) -> NamedSharding:
    """Returns how a weight with these logical dims lies on the mesh.

    A dimension that does not divide by its axis stays whole.
    """
    axes = [rules[dim] for dim in dims]
    used = [axis for axis in axes if axis is not None]
    if len(used) != len(set(used)):
        raise ValueError(f"dims {dims} collide: two of them map to one axis of {rules}")
    whole = [a if a and n % mesh.shape[a] == 0 else None for a, n in zip(axes, shape, strict=True)]
    return NamedSharding(mesh, P(*whole))


def batch_sharding(mesh: Mesh, num_dims: int = 3) -> NamedSharding:
    """Returns the sharding of a batch's arrays, [accumulation, B, S] or, with two dims, [B, S]."""
    return NamedSharding(mesh, P(*(None,) * (num_dims - 2), BATCH_AXES))


def num_batch_shards(mesh: Mesh) -> int:
    """Returns the shares that the rows of a batch are split into."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def constrain(x: jax.Array, mesh: Mesh | None, *axes: str | tuple[str, ...] | None) -> jax.Array:
    """Returns `x` pinned to mesh axes, one per leading dimension; without a mesh, `x` itself."""
    if mesh is None:
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P(*axes)))
