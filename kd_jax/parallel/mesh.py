"""The device mesh, and how each model lies on it by the rules."""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from kd_jax.config import MeshConfig
from kd_jax.parallel import rules
from kd_jax.parallel.rules import AXES, BATCH_AXES, ROWS_AXIS, axes_size, mesh_sizes


def make_mesh(
    config: MeshConfig, batch_rows: int, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """Returns the mesh over all devices; its batch shards must divide a micro-batch's rows."""
    devices = jax.devices() if devices is None else devices
    sizes = mesh_sizes(config, len(devices), batch_rows)
    kinds = (jax.sharding.AxisType.Auto,) * len(AXES)
    return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=kinds, devices=devices)


def compiler_options(mesh: Mesh) -> dict[str, bool | int | str]:
    """Returns what XLA is told besides its defaults, for programs on these devices.

    A CPU's sums over the vocabulary are vectorised only if their terms may be added in any order.
    Fast math keeps NaN and infinity in sums, products and comparisons, but folds x - x and x * 0
    to 0: checkpoints.save checks weights outside these options. XLA slices bfloat16 weights as
    float32 on a CPU, and would convert those of all layers before the loop over them. docs/log.md
    has the cost of both.
    """
    if platform(mesh) != "cpu":
        return {}
    return {
        "xla_cpu_enable_fast_math": True,
        "xla_cpu_prefer_vector_width": 512,
        "xla_disable_hlo_passes": "while-loop-invariant-code-motion",
    }


def platform(mesh: Mesh) -> str:
    """Returns cpu, gpu or tpu: that of the devices a program is for, be they here or not."""
    return mesh.devices.flat[0].platform


@dataclass(frozen=True, slots=True)
class Layout:
    """How one model lies on the mesh; static under jit."""

    mesh: Mesh
    axes: tuple[str, ...] = ("fsdp", "tensor")
    """Axes that split the model's weights; devices along the others hold copies."""

    def spec(self, dims: tuple[str, ...], shape: tuple[int, ...]) -> P:
        """Returns how a weight is split; `dims` are names in rules.RULES."""
        return P(*rules.split(self.mesh.shape, self.axes, dims, shape))

    def sharding(self, dims: tuple[str, ...], shape: tuple[int, ...]) -> NamedSharding:
        return NamedSharding(self.mesh, self.spec(dims, shape))

    def in_use(self, dims: tuple[str, ...], shape: tuple[int, ...]) -> NamedSharding:
        """Returns how a weight lies where it multiplies: gathered along ROWS_AXIS."""
        axes = tuple(axis for axis in self.axes if axis != ROWS_AXIS)
        return Layout(self.mesh, axes).sharding(dims, shape)

    @property
    def tensor_axis(self) -> str | None:
        """The axis that splits heads and hidden units, where one does."""
        return "tensor" if "tensor" in self.axes and self.mesh.shape["tensor"] > 1 else None

    def row_axes(self, num_rows: int) -> tuple[str, ...]:
        """Returns the axes that split the rows that this model computes."""
        return rules.row_axes(self.mesh.shape, self.axes, num_rows)


def batch_sharding(mesh: Mesh, num_dims: int = 3) -> NamedSharding:
    """Returns the sharding of a batch's arrays, [accumulation, B, S] or, with two dims, [B, S]."""
    return NamedSharding(mesh, P(*(None,) * (num_dims - 2), BATCH_AXES))


def num_batch_shards(mesh: Mesh) -> int:
    """Returns the shares that the rows of a batch are split into."""
    return axes_size(mesh.shape, BATCH_AXES)


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def constrain(x: jax.Array, mesh: Mesh | None, *axes: str | tuple[str, ...] | None) -> jax.Array:
    """Returns `x` pinned to mesh axes, one per leading dimension; without a mesh, `x` itself."""
    if mesh is None or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P(*axes)))
