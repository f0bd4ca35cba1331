"""From a configuration to what runs: checked inputs, models on the mesh, the step's program."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from kd_jax.config import Config, StudentConfig, TeacherConfig
from kd_jax.losses.hidden import PROJECTION, init_projection
from kd_jax.models.architecture import Architecture
from kd_jax.models.attention import choose_attention
from kd_jax.models.decoder import Decoder, Placement, Structure, named_arrays
from kd_jax.models.lora import add_adapters, factor_dims
from kd_jax.models.table import abstract_weights, is_adapter, projection_weight, weights
from kd_jax.parallel.mesh import Layout, platform
from kd_jax.parallel.placement import Arrays
from kd_jax.setup.sources import Source
from kd_jax.weights.adapters import stack_adapter
from kd_jax.weights.load import load_arrays


@dataclass(frozen=True, kw_only=True)
class Models:
    """Both models: arrays by dotted path, and the structures that they fill."""

    student: Structure
    trainable: Arrays
    frozen: Arrays
    teacher: Structure | None
    teacher_arrays: Arrays


def load_models(config: Config, student: Source, teacher: Source | None, mesh: Mesh) -> Models:
    """Returns the models of a run; what is trained is float32."""
    lora = config.trainable == "lora"
    layout = Layout(mesh, config.student.shard_over)
    stored = load_arrays(
        student.folder,
        student.arch,
        abstract_weights(
            weights(student.arch), layout, config.student.dtype if lora else "float32"
        ),
        adapter=None if lora else student.adapter,
    )
    start = None
    if lora and student.adapter is not None:
        start = stack_adapter(student.adapter, student.arch)
    arrays, structure = make_student(config, student.arch, layout, stored, start)
    trainable = {name: x for name, x in sorted(arrays.items()) if is_adapter(name) or not lora}
    if lora:  # whole weights stay as they were loaded
        trainable = {
            name: jax.device_put(x, adapter_sharding(layout, student.arch, name, x.shape))
            for name, x in trainable.items()
        }
    weight = projection_weight(config, student.arch, teacher.arch if teacher else None)
    if weight is not None:
        value = init_projection(weight.shape, config.seed)
        trainable[PROJECTION] = jax.device_put(value, layout.sharding(weight.dims, weight.shape))
    teacher_arrays, teacher_structure = _load_frozen(teacher, config.teacher, config, mesh)
    return Models(
        student=structure,
        trainable=trainable,
        frozen={name: x for name, x in arrays.items() if name not in trainable},
        teacher=teacher_structure,
        teacher_arrays=teacher_arrays,
    )


def adapter_sharding(
    layout: Layout, arch: Architecture, name: str, shape: tuple[int, ...]
) -> NamedSharding:
    """Returns how a stacked LoRA factor lies on the mesh: as its weight does."""
    weight = weights(arch)[f"{name.rpartition('.')[0]}.weight"]
    return layout.sharding(factor_dims(name, weight.dims), shape)


def make_student(
    config: Config,
    arch: Architecture,
    layout: Layout,
    stored: Arrays,
    start: dict[str, Any] | None = None,
) -> tuple[Arrays, Structure]:
    """Returns the student's arrays, with adapters where they are trained, and its structure."""
    model = make_decoder(config, arch, config.student.dtype, layout, stored, config.remat)
    if config.trainable == "lora":
        add_adapters(model, config.lora, jax.random.key(config.seed), start)
    return named_arrays(model)


def make_decoder(
    config: Config,
    arch: Architecture,
    dtype: str,
    layout: Layout,
    stored: Arrays,
    remat: str = "none",
) -> Decoder:
    """Returns a model of these arrays as it runs on the mesh's devices."""
    kind = jnp.dtype(dtype)
    kernel = choose_attention(config.attention, platform(layout.mesh), kind, arch.head_dim)
    place = Placement(implementation=kernel, layout=layout)
    return Decoder(arch, stored, dtype=kind, place=place, remat=remat)


def load_frozen_models(
    config: Config, student: Source, teacher: Source | None, mesh: Mesh
) -> Models:
    """Returns both models as they are on disk, none of them to be trained."""
    arrays, structure = _load_frozen(student, config.student, config, mesh)
    assert structure is not None
    teacher_arrays, teacher_structure = _load_frozen(teacher, config.teacher, config, mesh)
    return Models(
        student=structure,
        trainable={},
        frozen=arrays,
        teacher=teacher_structure,
        teacher_arrays=teacher_arrays,
    )


def _load_frozen(
    source: Source | None,
    part: StudentConfig | TeacherConfig | None,
    config: Config,
    mesh: Mesh,
) -> tuple[Arrays, Structure | None]:
    """Returns a model with its adapter merged into it; nothing for no model."""
    if source is None or part is None:
        return {}, None
    layout = Layout(mesh, part.shard_over)
    abstract = abstract_weights(weights(source.arch), layout, part.dtype)
    stored = load_arrays(source.folder, source.arch, abstract, adapter=source.adapter)
    return named_arrays(make_decoder(config, source.arch, part.dtype, layout, stored))
