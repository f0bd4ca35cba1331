"""A model to be run, not trained, in any form that the commands take: a folder, or a workdir."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import jax
from jax.sharding import Mesh

from kd_jax.config import Config, DataConfig, Dtype, StudentConfig, UserError
from kd_jax.setup.models import Models, load_frozen_models, load_models
from kd_jax.setup.sources import Source, open_source
from kd_jax.workdir.checkpoints import load_trained
from kd_jax.workdir.record import check_inputs, is_run, read_run


@dataclass(frozen=True, kw_only=True, slots=True)
class OpenModel:
    """A model whose files, but no weights, have been read."""

    config: Config
    """The run's, in the dtype asked for; that of a run of one step, where the model is no run."""
    source: Source
    workdir: Path | None
    step: int | None


def open_model(
    path: str,
    dtype: Dtype,
    step: int | None = None,
    *,
    adapter: str | None = None,
    field: str = "student",
) -> OpenModel:
    """Returns a checked model: Hugging Face folder, hub id, output of convert.from_hf, or workdir.

    Args:
      step: checkpoint of the workdir; None takes the latest.
      adapter: PEFT adapter to merge into what is no workdir.
      field: names what is no workdir in errors.
    """
    folder = Path(path).expanduser()
    workdir = folder if is_run(folder) else None
    if workdir is not None:
        config = read_run(workdir)
        field = "student"
        student = dataclasses.replace(config.student, dtype=dtype)
        config = dataclasses.replace(config, attention="auto", student=student)
    else:
        if step is not None:
            raise UserError(f"--step: expected a workdir as --model, got {path}")
        student = StudentConfig(path=path, adapter=adapter, dtype=dtype)
        unused = DataConfig(path="unused")
        config = Config(workdir="unused", teacher=None, student=student, data=unused, steps=1)
    source = open_source(config.student.path, config.student.adapter, field)
    if workdir is not None:
        check_inputs(workdir, source.hashes)
    return OpenModel(config=config, source=source, workdir=workdir, step=step)


def load_model(model: OpenModel, mesh: Mesh) -> Models:
    """Returns the model's arrays on the mesh as `frozen`, and its structure, without a teacher."""
    if model.workdir is None:
        return load_frozen_models(model.config, model.source, None, mesh)
    models = load_models(model.config, model.source, None, mesh)
    arrays = models.frozen | models.trainable
    trained, _ = load_trained(model.workdir, model.step)
    arrays |= {name: jax.device_put(x, arrays[name].sharding) for name, x in trained.items()}
    return dataclasses.replace(models, frozen=arrays, trainable={})
