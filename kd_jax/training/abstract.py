"""A run without its weights: shapes, dtypes and shardings in place of arrays.

What `jax.jit(train_step).lower` takes: a run can be checked, compiled and planned for devices that
are not here.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from kd_jax.config import Config
from kd_jax.data.rows import COLUMNS
from kd_jax.losses.hidden import PROJECTION
from kd_jax.models.architecture import Architecture
from kd_jax.models.decoder import Structure, named_arrays
from kd_jax.models.table import is_adapter, projection_weight, weights
from kd_jax.parallel.mesh import Layout, batch_sharding, replicated
from kd_jax.parallel.placement import Arrays
from kd_jax.setup.models import Models, adapter_sharding, make_decoder, make_student
from kd_jax.setup.program import Program, make_program
from kd_jax.training.optim import make_optimizer
from kd_jax.training.step import TrainState, init_state, jit_train_step


def abstract_models(
    config: Config, student: Architecture, teacher: Architecture | None, mesh: Mesh
) -> Models:
    """Returns a run's models as load_models would, of ShapeDtypeStructs."""
    lora = config.trainable == "lora"
    layout = Layout(mesh, config.student.shard_over)
    stored = _abstract_arrays(student, config.student.dtype if lora else "float32", layout)
    arrays, structure = _abstract(lambda x: make_student(config, student, layout, x), stored)
    trainable = {name: x for name, x in sorted(stored.items()) if not lora}
    for name, x in sorted(arrays.items()):
        if is_adapter(name):
            place = adapter_sharding(layout, student, name, x.shape)
            trainable[name] = jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)
    weight = projection_weight(config, student, teacher)
    if weight is not None:
        place = layout.sharding(weight.dims, weight.shape)
        trainable[PROJECTION] = jax.ShapeDtypeStruct(weight.shape, jnp.float32, sharding=place)
    teacher_arrays, teacher_structure = _abstract_teacher(config, teacher, mesh)
    return Models(
        student=structure,
        trainable=trainable,
        frozen=stored if lora else {},
        teacher=teacher_structure,
        teacher_arrays=teacher_arrays,
    )


def _abstract_teacher(
    config: Config, teacher: Architecture | None, mesh: Mesh
) -> tuple[Arrays, Structure | None]:
    if teacher is None or config.teacher is None:
        return {}, None
    layout, dtype = Layout(mesh, config.teacher.shard_over), config.teacher.dtype
    arrays = _abstract_arrays(teacher, dtype, layout)
    make = lambda x: named_arrays(make_decoder(config, teacher, dtype, layout, x))  # noqa: E731
    return arrays, _abstract(make, arrays)[1]


def _abstract_arrays(arch: Architecture, dtype: str, layout: Layout) -> dict[str, Any]:
    return {
        path: jax.ShapeDtypeStruct(
            weight.shape, dtype, sharding=layout.sharding(weight.dims, weight.shape)
        )
        for path, weight in weights(arch).items()
    }


def _abstract(make: Callable[[Arrays], tuple[Arrays, Structure]], stored: Arrays):
    """Returns the shapes of what `make` returns, without running it, and its structure."""
    structures = []

    def arrays_of(stored):
        arrays, structure = make(stored)
        structures.append(structure)
        return arrays

    return jax.eval_shape(arrays_of, stored), structures[0]


@dataclass(frozen=True, kw_only=True)
class AbstractRun:
    """A run's step and what it takes."""

    models: Models
    program: Program
    optimizer: Any
    state: TrainState
    batch: Arrays

    def trace(self) -> Any:
        """Returns the traced step, to be lowered and compiled for the mesh's devices."""
        assert self.program.mesh is not None
        layout = jax.tree.map(lambda x: x.sharding, self.state)
        return jit_train_step(self.program.mesh, layout).trace(
            self.program,
            self.optimizer,
            self.state,
            self.models.frozen,
            self.models.teacher_arrays,
            self.batch,
        )


def abstract_run(
    config: Config,
    student: Architecture,
    teacher: Architecture | None,
    mesh: Mesh,
    num_steps: int = 1000,
) -> AbstractRun:
    """Returns what one optimizer step of the run takes, without any weights.

    Args:
      num_steps: of the run, where a schedule follows them.
    """
    models = abstract_models(config, student, teacher, mesh)
    sizes = [arch.vocab_size for arch in (student, teacher) if arch is not None]
    program = make_program(config, models, min(sizes), mesh, num_steps)
    optimizer = make_optimizer(config.optim, num_steps)
    state = jax.eval_shape(lambda x: init_state(x, optimizer), models.trainable)
    accumulation = config.optim.accumulation_steps
    shape = (accumulation, config.data.batch_size // accumulation, config.data.seq_len)
    batch: dict[str, Any] = {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=batch_sharding(mesh))
        for name, dtype in COLUMNS.items()
    }
    return AbstractRun(
        models=models,
        program=program,
        optimizer=optimizer,
        state=_placed(state, models.trainable, mesh),
        batch=batch,
    )


def _placed(state: TrainState, trainable: Arrays, mesh: Mesh) -> TrainState:
    """Returns the state with each weight's moments laid out as the weight, the rest on every
    device."""
    shardings = {name: x.sharding for name, x in trainable.items()}

    def place(path, x):
        names = [getattr(key, "key", None) for key in path]
        found = next((shardings[name] for name in names if name in shardings), replicated(mesh))
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=found)

    return jax.tree_util.tree_map_with_path(place, state)
