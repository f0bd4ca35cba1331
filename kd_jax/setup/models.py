"""The models of a run on the mesh, abstract or loaded."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from kd_jax.config import Config, StudentConfig, TeacherConfig
from kd_jax.losses.hidden import init_projection
from kd_jax.models.architecture import Architecture
from kd_jax.models.decoder import DecoderSpec
from kd_jax.models.lora import init_adapters
from kd_jax.models.weight_table import (
    Weight,
    abstract_weights,
    head_weights,
    projection_weight,
    trained_weights,
    weights,
)
from kd_jax.parallel.mesh import Layout, platform
from kd_jax.parallel.placement import Arrays
from kd_jax.parallel.platforms import choose_attention, choose_dtype
from kd_jax.setup.model_files import ModelFiles
from kd_jax.weights.adapters import stack_adapter
from kd_jax.weights.load import load_arrays

TeacherKind = Literal["model", "base", "ema"]
"""As in teacher.kind of the configuration."""
TeacherOutputs = Literal["live", "hidden", "topk", "sampled"]
"""Computed in the program, or of a kind that kd_jax.cache stores."""


@dataclass(frozen=True, kw_only=True)
class Models:
    """Specs of both models, and their arrays by path: jax.Array or ShapeDtypeStruct."""

    student: DecoderSpec
    trainable: dict[str, Any]
    """`student`: float32 arrays by path; `projection` of the hidden-state loss, if trained."""
    frozen: dict[str, Any]
    """The student's other arrays."""
    teacher: DecoderSpec | None
    teacher_arrays: dict[str, Any]
    """The teacher's weights; of a cached one the lm_head or, without hidden states, none."""
    teacher_kind: TeacherKind = "model"
    """Whose weights the teacher has; in self-distillation it has no arrays here."""
    teacher_outputs: TeacherOutputs = "live"
    """live: of a model in the program; else of a cache of this kind, with the batches."""
    separate_teacher_rows: bool = False
    """A live teacher has a prompt of its own, and its rows come with the batches."""
    step: int | None = None
    """Optimizer step of the checkpoint from which a command after training loaded the student."""


def make_spec(
    config: Config, part: StudentConfig | TeacherConfig, arch: Architecture, mesh: Mesh
) -> DecoderSpec:
    """Returns the spec of a frozen model without adapters."""
    dtype = choose_dtype(part.dtype, platform(mesh))
    return DecoderSpec(
        arch=arch,
        dtype=jnp.dtype(dtype),
        attention=choose_attention(config.attention, platform(mesh), dtype, arch.head_dim),
        layout=Layout(mesh, part.shard_over),
    )


def make_student_spec(config: Config, arch: Architecture, mesh: Mesh) -> DecoderSpec:
    """Returns the spec of the student in training: remat, LoRA scale and dropout."""
    spec, lora = make_spec(config, config.student, arch, mesh), config.lora
    spec = replace(spec, remat=config.remat_policy)
    if config.trainable == "lora":
        spec = replace(spec, lora_scale=lora.alpha / lora.rank, dropout=lora.dropout)
    return spec


def abstract_models(
    config: Config,
    student: Architecture,
    teacher: Architecture | None,
    mesh: Mesh,
    outputs: TeacherOutputs | None = None,
) -> Models:
    """Returns the models of a run as ShapeDtypeStructs with shardings.

    Args:
      outputs: of the teacher; None: hidden states from teacher.cache, if that is given, else live.
    """
    outputs = outputs or ("hidden" if config.reads_cache else "live")
    spec = make_student_spec(config, student, mesh)
    table = trained_weights(config, student)
    trainable: dict[str, Any] = {"student": _abstract(spec, table, "float32")}
    weight = projection_weight(config, student, teacher)
    if weight is not None:
        trainable |= _abstract(spec, {"projection": weight}, "float32")
    frozen: dict[str, Any] = {}
    if config.trainable == "lora":
        frozen = _abstract(spec, weights(student), spec.dtype.name)
    teacher_spec, teacher_arrays = None, dict[str, Any]()
    kind: TeacherKind = "model"
    if teacher is not None and config.teacher is not None:
        assert config.teacher_part is not None
        kind = config.teacher.kind
        teacher_spec = make_spec(config, config.teacher_part, teacher, mesh)
        teacher_spec = replace(teacher_spec, lora_scale=spec.lora_scale if kind == "ema" else 0.0)
        tables = {"live": weights(teacher), "hidden": head_weights(teacher)}
        table = tables.get(outputs, {}) if kind == "model" else {}
        teacher_arrays = _abstract(teacher_spec, table, teacher_spec.dtype.name)
    return Models(
        student=spec,
        trainable=trainable,
        frozen=frozen,
        teacher=teacher_spec,
        teacher_arrays=teacher_arrays,
        teacher_kind=kind,
        teacher_outputs=outputs,
        separate_teacher_rows=outputs == "live" and config.prompts_teacher,
    )


def _abstract(spec: DecoderSpec, table: Mapping[str, Weight], dtype: str) -> Any:
    return abstract_weights(table, spec.layout, dtype)


def load_models(
    config: Config,
    student: ModelFiles,
    teacher: ModelFiles | None,
    mesh: Mesh,
    *,
    with_trainable: bool = True,
    outputs: TeacherOutputs | None = None,
) -> Models:
    """Returns the models of a run.

    Args:
      outputs: of the teacher, as in abstract_models.
      with_trainable: load or initialize the trainable arrays; otherwise they stay abstract, to be
        restored from a checkpoint.
    """
    models = abstract_models(config, student.arch, teacher.arch if teacher else None, mesh, outputs)
    frozen = load_arrays(student.folder, student.arch, models.frozen)
    trainable = models.trainable
    if with_trainable:
        trainable = _first_values(config, student, models)
    arrays = {}
    if teacher is not None and models.teacher_arrays:
        arrays = load_arrays(
            teacher.folder, teacher.arch, models.teacher_arrays, adapter=teacher.adapter
        )
    return replace(models, frozen=frozen, trainable=trainable, teacher_arrays=arrays)


def _first_values(config: Config, student: ModelFiles, models: Models) -> dict[str, Any]:
    """Returns the initial trainable arrays, structured like models.trainable."""
    abstract = models.trainable["student"]
    if config.trainable == "full":
        arrays = load_arrays(
            student.folder, student.arch, abstract, adapter=student.adapter, donated=True
        )
    else:
        values = (
            init_adapters(config.lora, student.arch, config.seed)
            if student.adapter is None
            else stack_adapter(student.adapter, student.arch)
        )
        arrays = {path: jax.device_put(values[path], x.sharding) for path, x in abstract.items()}
    trainable: dict[str, Any] = {"student": arrays}
    if "projection" in models.trainable:
        shape = models.trainable["projection"]
        value = init_projection(shape.shape, config.seed)
        trainable["projection"] = jax.device_put(value, shape.sharding)
    return trainable


def load_frozen(
    config: Config,
    part: StudentConfig | TeacherConfig,
    files: ModelFiles,
    mesh: Mesh,
    table: Mapping[str, Weight] | None = None,
) -> tuple[DecoderSpec, Arrays]:
    """Returns a model from disk, its adapter merged into the weights.

    Args:
      table: weights to load; None: all.
    """
    spec = make_spec(config, part, files.arch, mesh)
    wanted = weights(files.arch) if table is None else table
    abstract = _abstract(spec, wanted, spec.dtype.name)
    return spec, load_arrays(files.folder, files.arch, abstract, adapter=files.adapter)
