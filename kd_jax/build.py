"""From a configuration to what runs: checked inputs, models on the mesh, the step's program."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from kd_jax.architecture import Architecture, weights
from kd_jax.config import Config, LoraConfig, StudentConfig, TeacherConfig, UserError
from kd_jax.disk import fingerprint, resolve
from kd_jax.hf import (
    Adapter,
    check_source,
    load_adapter,
    load_architecture,
    load_arrays,
    stack_adapter,
)
from kd_jax.hidden import PROJECTION, init_projection, projection_weight
from kd_jax.kd_head import HeadConfig, chunk_tokens
from kd_jax.lora import add_adapters, is_adapter
from kd_jax.model import Decoder, Structure, named_arrays
from kd_jax.sharding import batch_sharding, num_batch_shards, replicated, weight_sharding
from kd_jax.step import Program
from kd_jax.text import check_same_tokenizer, load_tokenizer

Arrays = dict[str, jax.Array]


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """A model on disk whose architecture and tensors' names and shapes have been checked."""

    folder: Path
    arch: Architecture
    tokenizer: Any
    adapter: Adapter | None
    hashes: dict[str, str]
    """Of what was read from disk, by the field that names it."""


def start_jax(compilation_cache: str | None) -> None:
    """Sets what every command wants of jax: true float32 products, and the compilation cache."""
    jax.config.update("jax_default_matmul_precision", "highest")  # else float32 means TF32 on GPUs
    if compilation_cache is not None:
        folder = str(Path(compilation_cache).expanduser())
        jax.config.update("jax_compilation_cache_dir", folder)


def check_attention(config: Config) -> None:
    """Raises UserError where the attention kernel asked for is not on this machine."""
    if config.attention == "cudnn" and jax.default_backend() != "gpu":
        raise UserError(
            f"attention: expected auto|xla on {jax.default_backend()}, got cudnn, which needs a GPU"
        )


def open_source(path: str, adapter: str | None, field: str) -> Source:
    """Returns a checked model on disk; `field` (student or teacher) names it in errors."""
    folder = resolve(path, f"{field}.path")
    arch = load_architecture(folder)
    check_source(folder, arch)
    hashes = {f"{field}.path": fingerprint(folder)}
    loaded = None
    if adapter is not None:
        adapter_folder = resolve(adapter, f"{field}.adapter")
        loaded = load_adapter(adapter_folder, arch)
        hashes[f"{field}.adapter"] = fingerprint(adapter_folder)
    tokenizer = load_tokenizer(folder)
    return Source(folder=folder, arch=arch, tokenizer=tokenizer, adapter=loaded, hashes=hashes)


def without_tokenizer(source: Source) -> Source:
    """Returns the source without its tokenizer, which takes more memory than a small model."""
    return replace(source, tokenizer=None)


def shared_vocab_size(student: Source, teacher: Source | None) -> int:
    """Returns the vocabulary entries that both heads have; raises where tokenizers differ.

    Equal sizes are taken whole; sizes that differ by padding are cut to the tokenizer's.
    """
    sources, fields = [student], "student.path"
    if teacher is not None:
        sources, fields = [student, teacher], "student.path, teacher.path"
        check_same_tokenizer(student.tokenizer, teacher.tokenizer, student.folder, teacher.folder)
    true_size = max(student.tokenizer.get_vocab().values()) + 1
    sizes = [source.arch.vocab_size for source in sources]
    if min(sizes) < true_size:
        raise UserError(
            f"{fields}: expected at least {true_size} vocabulary entries (the tokenizer's), got "
            + " and ".join(map(str, sizes))
        )
    return sizes[0] if len(set(sizes)) == 1 else true_size


def check_adapter(source: Source, config: LoraConfig) -> None:
    """Raises UserError unless training can go on from the source's adapter as configured."""
    assert source.adapter is not None
    stored = source.adapter.config
    pairs = {
        "rank": (config.rank, stored.rank),
        "alpha": (config.alpha, stored.alpha),
        "target-modules": (set(config.target_modules), set(stored.target_modules)),
    }
    wrong = [
        f"lora.{name}: expected {theirs} as in student.adapter, got {ours}"
        for name, (ours, theirs) in pairs.items()
        if ours != theirs
    ]
    if wrong:
        raise UserError("\n".join(wrong))


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
    stored = load_arrays(
        student.folder,
        student.arch,
        mesh,
        config.student.dtype if lora else "float32",
        adapter=None if lora else student.adapter,
    )
    start = None
    if lora and student.adapter is not None:
        start = stack_adapter(student.adapter, student.arch)
    arrays, structure = _make_student(config, student.arch, stored, start)
    trainable = {name: x for name, x in sorted(arrays.items()) if is_adapter(name) or not lora}
    if lora:  # small enough for every device to hold them; whole weights stay as they were loaded
        trainable = {name: jax.device_put(x, replicated(mesh)) for name, x in trainable.items()}
    wide = None if teacher is None else teacher.arch
    for name, like in _abstract_projection(config, student.arch, wide, mesh).items():
        value = init_projection(like.shape, config.seed)
        trainable[name] = jax.device_put(value, like.sharding)
    teacher_arrays, teacher_structure = _load_frozen(teacher, config.teacher, config, mesh)
    return Models(
        student=structure,
        trainable=trainable,
        frozen={name: x for name, x in arrays.items() if name not in trainable},
        teacher=teacher_structure,
        teacher_arrays=teacher_arrays,
    )


def _make_student(
    config: Config, arch: Architecture, stored: Arrays, start: dict[str, Any] | None = None
) -> tuple[Arrays, Structure]:
    """Returns the student's arrays, with adapters where they are trained, and its structure."""
    model = Decoder(
        arch,
        stored,
        dtype=jnp.dtype(config.student.dtype),
        implementation=config.attention,
        remat=config.remat,
    )
    if config.trainable == "lora":
        add_adapters(model, config.lora, jax.random.key(config.seed), start)
    return named_arrays(model)


def abstract_models(
    config: Config, student: Architecture, teacher: Architecture | None, mesh: Mesh
) -> Models:
    """Returns a run's models with shapes, dtypes and shardings in place of arrays.

    What `jax.jit(train_step).lower` takes: a run can be checked and compiled without weights.
    """
    lora = config.trainable == "lora"
    stored = _abstract_arrays(student, config.student.dtype if lora else "float32", mesh)
    arrays, structure = _abstract(lambda stored: _make_student(config, student, stored), stored)
    placed = {
        name: stored.get(name, jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated(mesh)))
        for name, x in sorted(arrays.items())
    }
    teacher_arrays: Arrays = {}
    teacher_structure = None
    if teacher is not None and config.teacher is not None:
        dtype = jnp.dtype(config.teacher.dtype)
        teacher_arrays = _abstract_arrays(teacher, config.teacher.dtype, mesh)
        _, teacher_structure = _abstract(
            lambda stored: named_arrays(
                Decoder(teacher, stored, dtype=dtype, implementation=config.attention)
            ),
            teacher_arrays,
        )
    return Models(
        student=structure,
        trainable={name: x for name, x in placed.items() if is_adapter(name) or not lora}
        | _abstract_projection(config, student, teacher, mesh),
        frozen={name: x for name, x in placed.items() if lora and not is_adapter(name)},
        teacher=teacher_structure,
        teacher_arrays=teacher_arrays,
    )


def _abstract_arrays(arch: Architecture, dtype: str, mesh: Mesh) -> dict[str, Any]:
    return {
        path: jax.ShapeDtypeStruct(
            weight.shape, dtype, sharding=weight_sharding(mesh, weight.dims, weight.shape)
        )
        for path, weight in weights(arch).items()
    }


def _abstract_projection(
    config: Config, student: Architecture, teacher: Architecture | None, mesh: Mesh
) -> dict[str, Any]:
    """Returns the projection of the hidden-state loss by its name; nothing for none."""
    weight = projection_weight(config, student, teacher)
    if weight is None:
        return {}
    sharding = weight_sharding(mesh, weight.dims, weight.shape)
    return {PROJECTION: jax.ShapeDtypeStruct(weight.shape, jnp.float32, sharding=sharding)}


def _abstract(make: Callable[[Arrays], tuple[Arrays, Structure]], stored: Arrays):
    """Returns the shapes of what `make` returns, without running it, and its structure."""
    structures = []

    def arrays_of(stored):
        arrays, structure = make(stored)
        structures.append(structure)
        return arrays

    return jax.eval_shape(arrays_of, stored), structures[0]


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
    stored = load_arrays(source.folder, source.arch, mesh, part.dtype, adapter=source.adapter)
    dtype = jnp.dtype(part.dtype)
    model = Decoder(source.arch, stored, dtype=dtype, implementation=config.attention)
    return named_arrays(model)


def make_program(
    config: Config, models: Models, vocab_size: int, mesh: Mesh, num_steps: int | None = None
) -> Program:
    """Returns what is fixed while the step is compiled.

    Args:
      num_steps: of the run, for what follows a schedule; evaluation needs none.
    """
    rows = config.data.batch_size // config.optim.accumulation_steps
    num_shards = num_batch_shards(mesh)
    head = HeadConfig(
        loss=config.loss,
        chunk_tokens=chunk_tokens(
            config.loss.chunk_tokens,
            mesh.devices.flat[0].platform,
            vocab_size,
            rows * config.data.seq_len // num_shards,
        ),
        num_shards=num_shards,
        vocab_size=vocab_size,
        head_trainable=config.trainable == "full",
    )
    return Program(
        student=models.student,
        teacher=models.teacher,
        head=head,
        hidden=config.hidden if config.compares_hidden else None,
        mesh=mesh,
        dropout=config.trainable == "lora" and config.lora.dropout > 0,
        seed=config.seed,
        schedule_steps=config.loss.schedule_steps or num_steps,
    )


def put_batch(batch: dict[str, Any], mesh: Mesh) -> Arrays:
    """Returns [A, B, S] or [B, S] arrays on the mesh; each process sends only its own rows."""
    return {
        name: jax.make_array_from_callback(x.shape, batch_sharding(mesh, x.ndim), x.__getitem__)
        for name, x in batch.items()
    }
