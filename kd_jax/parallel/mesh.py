"""The device mesh, and the sharding of each model on it by the rules."""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from kd_jax.config import MeshConfig
from kd_jax.parallel import rules
from kd_jax.parallel.platforms import PLATFORMS, Platform
from kd_jax.parallel.rules import BATCH_AXES, ROWS_AXIS, axes_size, mesh_sizes


def make_mesh(
    config: MeshConfig, batch_rows: int, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """Returns the mesh over all devices; its batch shards must divide a micro-batch's rows."""
    devices = jax.devices() if devices is None else devices
    sizes = mesh_sizes(config, len(devices), batch_rows)
    kinds = (jax.sharding.AxisType.Auto,) * len(sizes)
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=kinds, devices=devices)


def platform(mesh: Mesh) -> str:
    """Returns cpu, gpu or tpu: the platform of the mesh's devices, here or not."""
    return mesh.devices.flat[0].platform


def traits(mesh: Mesh) -> Platform:
    """Returns the platform traits of the mesh's devices."""
    return PLATFORMS[platform(mesh)]


def compiler_options(mesh: Mesh) -> dict[str, bool | int | str]:
    """Returns XLA's options for programs on these devices."""
    return dict(traits(mesh).compiler_options)


@dataclass(frozen=True, slots=True)
class Layout:
    """Sharding of one model over the mesh; static under jit."""

    mesh: Mesh
    axes: tuple[str, ...] = ("fsdp", "tensor")
    """Axes that shard the model's weights; devices along the others hold copies."""

    def sharding(self, dims: tuple[str, ...], shape: tuple[int, ...]) -> NamedSharding:
        """Returns a weight's sharding; `dims` are names in rules.RULES."""
        spec = rules.split(self.mesh.shape, self.axes, dims, shape)
        return NamedSharding(self.mesh, P(*spec))

    def in_use(self, dims: tuple[str, ...], shape: tuple[int, ...]) -> NamedSharding:
        """Returns a weight's sharding in its matmul: all-gathered along ROWS_AXIS."""
        axes = tuple(axis for axis in self.axes if axis != ROWS_AXIS)
        return Layout(self.mesh, axes).sharding(dims, shape)

    @property
    def tensor_axis(self) -> str | None:
        """The axis that shards heads and hidden units; None where none does."""
        return "tensor" if "tensor" in self.axes and self.mesh.shape["tensor"] > 1 else None

    def row_axes(self, num_rows: int) -> tuple[str, ...]:
        """Returns the axes that shard the rows that this model computes."""
        return rules.row_axes(self.mesh.shape, self.axes, num_rows)

    def activations(self, shape: tuple[int, ...]) -> P:
        """Returns the spec of activations [B, S, ...], with rows sharded, and tokens by context."""
        return P(self.row_axes(shape[0]), rules.context_axis(self.mesh.shape, shape[1]))


def batch_sharding(mesh: Mesh, num_dims: int = 3) -> NamedSharding:
    """Returns the sharding of a batch's arrays, [accumulation, B, S] or, with two dims, [B, S]."""
    return NamedSharding(mesh, P(*(None,) * (num_dims - 2), BATCH_AXES))


def vector_sharding(mesh: Mesh, num_dims: int, num_tokens: int) -> NamedSharding:
    """Returns the sharding of a batch's arrays with a vector for each token, [..., B, S, D]."""
    context = rules.context_axis(mesh.shape, num_tokens)
    return NamedSharding(mesh, P(*(None,) * (num_dims - 3), BATCH_AXES, context))


def num_batch_shards(mesh: Mesh) -> int:
    return axes_size(mesh.shape, BATCH_AXES)


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def constrain(x: jax.Array, mesh: Mesh, *axes: str | tuple[str, ...] | None) -> jax.Array:
    """Returns `x` constrained to mesh axes, one for each leading dimension; `x` on one device."""
    if mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P(*axes)))
