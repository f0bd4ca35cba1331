"""A run without weights, to trace and compile its step for local or absent devices."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from kd_jax.config import Config
from kd_jax.data.rows import COLUMNS
from kd_jax.data.store import TEACHER
from kd_jax.models.architecture import Architecture
from kd_jax.onpolicy.samples import GROUP
from kd_jax.parallel.mesh import batch_sharding, vector_sharding
from kd_jax.parallel.placement import Arrays
from kd_jax.setup.models import Models, abstract_models
from kd_jax.setup.program import Program, make_program
from kd_jax.training.step import TrainState, abstract_state, jit_train_step


@dataclass(frozen=True, kw_only=True)
class AbstractRun:
    """A run's program and the ShapeDtypeStructs of its step's arguments."""

    models: Models
    program: Program
    state: TrainState
    batch: Arrays

    def trace(self) -> Any:
        """Returns the traced step, ready to lower and compile for the mesh."""
        layout = jax.tree.map(lambda x: x.sharding, self.state)
        models = self.models
        return jit_train_step(self.program.mesh, layout).trace(
            self.program, self.state, models.frozen, models.teacher_arrays, self.batch
        )


def abstract_run(
    config: Config,
    student: Architecture,
    teacher: Architecture | None,
    mesh: Mesh,
    num_steps: int = 1000,
) -> AbstractRun:
    """Returns a run's program and abstract arguments.

    Args:
      num_steps: optimizer steps of the run, the length of the schedules.
    """
    models = abstract_models(config, student, teacher, mesh)
    sizes = [arch.vocab_size for arch in (student, teacher) if arch is not None]
    program = make_program(config, models, min(sizes), mesh, num_steps)
    accumulation = config.optim.accumulation_steps
    shape = (accumulation, config.data.batch_size // accumulation, config.data.seq_len)

    def column(shape, dtype=jnp.int32):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=batch_sharding(mesh))

    batch: dict[str, Any] = {name: column(shape, dtype) for name, dtype in COLUMNS.items()}
    if models.separate_teacher_rows:
        own = (*shape[:2], config.teacher_seq_len)
        names = ("tokens", "positions", "segment_ids")
        batch |= {f"{TEACHER}{name}": column(own) for name in names}
        batch[f"{TEACHER}places"] = column(shape)
    if config.samples:
        batch[GROUP] = column(shape)
    if teacher is not None and models.teacher is not None and config.reads_cache:
        batch[f"{TEACHER}hidden"] = jax.ShapeDtypeStruct(
            (*shape, teacher.hidden_size),
            models.teacher.dtype,
            sharding=vector_sharding(mesh, len(shape) + 1, shape[-1]),
        )
    state = abstract_state(program, models.trainable)
    return AbstractRun(models=models, program=program, state=state, batch=batch)
