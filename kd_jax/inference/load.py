"""Loads a model for inference, from a folder, the hub or a workdir."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from jax.sharding import Mesh

from kd_jax.config import Config, DataConfig, Dtype, OnPolicyConfig, StudentConfig, UserError
from kd_jax.data.chat import saved_template
from kd_jax.inference.unstacking import unstack_layers
from kd_jax.models.decoder import DecoderSpec
from kd_jax.models.weight_table import head_weights
from kd_jax.parallel.mesh import platform
from kd_jax.parallel.placement import Arrays
from kd_jax.parallel.platforms import choose_dtype
from kd_jax.setup.model_files import ModelFiles, open_model_files
from kd_jax.setup.models import Models, load_frozen, load_models
from kd_jax.workdir.checkpoints import open_trained
from kd_jax.workdir.history import MOVABLE_STUDENT, is_run, read_config
from kd_jax.workdir.resume import check_same_inputs


@dataclass(frozen=True, kw_only=True, slots=True)
class OpenModel:
    """A checked model whose weights are not loaded yet."""

    config: Config
    """The run's configuration in the requested dtype; without a run, a placeholder."""
    files: ModelFiles
    workdir: Path | None
    step: int | None


def open_model(
    path: str,
    dtype: Dtype,
    step: int | None = None,
    *,
    student_path: str | None = None,
    adapter: str | None = None,
    field: str = "student",
    flag: str = "--model",
) -> OpenModel:
    """Returns a checked model.

    Args:
      path: Hugging Face folder, hub id, output of convert.from_hf, or workdir.
      step: checkpoint of the workdir; None: the latest.
      student_path: the run's student where it is now, for --model; None: where the run had it.
      adapter: PEFT adapter to merge; not for a workdir.
      field: config field whose name the model's hashes have; not for a workdir.
      flag: names the path in errors; not for a workdir.
    """
    folder = Path(path).expanduser()
    workdir = folder if is_run(folder) else None
    if workdir is not None:
        config = read_config(workdir, student_path)
        field = "student"
        named = MOVABLE_STUDENT if flag == "--model" else "student.path"
        student = dataclasses.replace(config.student, dtype=dtype)
        teacher = config.teacher
        if teacher is not None:  # of self-distillation: its dtype must be the student's or auto
            teacher = dataclasses.replace(teacher, dtype="auto")
        config = dataclasses.replace(
            config, attention="auto", student=student, teacher=teacher, on_policy=OnPolicyConfig()
        )
    else:
        for name, value in (("step", step), ("student-path", student_path)):
            if value is not None:
                raise UserError(f"--{name}: expected a workdir as --model, got {path}")
        named = flag
        student = StudentConfig(path=path, adapter=adapter, dtype=dtype)
        unused = DataConfig(path="unused")
        config = Config(workdir="unused", teacher=None, student=student, data=unused, steps=1)
    files = open_model_files(config.student.path, config.student.adapter, field, named)
    if workdir is not None:
        check_same_inputs(workdir, files.hashes)
        if (template := saved_template(workdir, config.data)) is not None:
            files.tokenizer.chat_template = template
    return OpenModel(config=config, files=files, workdir=workdir, step=step)


def load_model(model: OpenModel, mesh: Mesh, *, head_only: bool = False) -> Models:
    """Returns the model with all its arrays on the mesh as `frozen`, and no teacher.

    The trained arrays of a run come from its checkpoint, the others from its base model.

    Args:
      head_only: load the lm_head alone; not for a workdir.
    """
    config, files, step = model.config, model.files, None
    if model.workdir is None:
        table = head_weights(files.arch) if head_only else None
        spec, arrays = load_frozen(config, config.student, files, mesh, table)
    else:
        models = load_models(config, files, None, mesh, with_trainable=False)
        spec, trained = models.student, open_trained(model.workdir, model.step)
        step = trained.step
        arrays = models.frozen | trained.load(_in_use(config, models))
    return Models(
        student=spec, trainable={}, frozen=arrays, teacher=None, teacher_arrays={}, step=step
    )


def load_unstacked(model: OpenModel, mesh: Mesh) -> tuple[DecoderSpec, Arrays]:
    """Returns the spec and the arrays by layer, as decoding takes them."""
    models = load_model(model, mesh)
    unstack_layers(models.student, models.frozen)
    return models.student, models.frozen


def describe_dtype(wanted: Dtype, mesh: Mesh) -> str | None:
    """Returns a line about the dtype that `auto` becomes; None if another is asked for."""
    chosen = choose_dtype(wanted, platform(mesh))
    return f"dtype {chosen}, chosen for these devices" if wanted == "auto" else None


def _in_use(config: Config, models: Models) -> Arrays:
    """Returns the trained arrays as ShapeDtypeStructs: LoRA in float32, weights in the dtype."""
    abstract = models.trainable["student"]
    if config.trainable == "lora":
        return abstract
    return {path: x.update(dtype=models.student.dtype) for path, x in abstract.items()}
