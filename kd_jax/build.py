"""From a configuration to what runs: checked inputs, models on the mesh, the step's program."""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from kd_jax.config import Config, LoraConfig, LossConfig, StudentConfig, TeacherConfig, UserError
from kd_jax.data.chat import check_same_tokenizer, load_tokenizer
from kd_jax.disk import fingerprint, load_architecture, resolve
from kd_jax.hf import Adapter, check_source, load_adapter, load_arrays, stack_adapter
from kd_jax.losses.fused_head import HeadConfig
from kd_jax.losses.hidden import PROJECTION, init_projection, projection_weight
from kd_jax.models.architecture import Architecture, weights
from kd_jax.models.attention import choose_attention
from kd_jax.models.decoder import Decoder, Placement, Structure, named_arrays
from kd_jax.models.lora import add_adapters, factor_dims, is_adapter
from kd_jax.parallel.mesh import Layout, num_batch_shards, platform, replicated
from kd_jax.parallel.placement import Arrays
from kd_jax.planning.chips import GPU_MEMORY_SHARE, chip_of
from kd_jax.planning.cost import chunk_tokens
from kd_jax.step import Program, TrainState


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
    """Sets what every command wants of jax: true float32 products, a GPU's memory, and the
    compilation cache. Before jax looks for devices."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", str(GPU_MEMORY_SHARE))
    jax.config.update("jax_default_matmul_precision", "highest")  # else float32 means TF32 on GPUs
    if compilation_cache is not None:
        remote = "://" in compilation_cache
        folder = compilation_cache if remote else str(Path(compilation_cache).expanduser())
        jax.config.update("jax_compilation_cache_dir", folder)


def check_attention(config: Config, mesh: Mesh) -> None:
    """Raises UserError where the mesh's devices do not have the attention kernel asked for."""
    needs = {"cudnn": "gpu", "splash": "tpu"}.get(config.attention, platform(mesh))
    if platform(mesh) != needs:
        raise UserError(
            f"attention: expected auto|xla on {platform(mesh)}, got {config.attention}, which "
            f"needs a {needs.upper()}"
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
    layout = Layout(mesh, config.student.shard_over)
    stored = load_arrays(
        student.folder,
        student.arch,
        layout,
        config.student.dtype if lora else "float32",
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
    stored = load_arrays(source.folder, source.arch, layout, part.dtype, adapter=source.adapter)
    return named_arrays(make_decoder(config, source.arch, part.dtype, layout, stored))


def make_head(
    loss: LossConfig,
    mesh: Mesh,
    vocab_size: int,
    num_tokens: int,
    dtype: str,
    trainable: bool = False,
) -> HeadConfig:
    """Returns the head for `num_tokens` over all devices, of a student in `dtype`."""
    share, entries = num_tokens // num_batch_shards(mesh), vocab_size // mesh.shape["tensor"]
    return HeadConfig(
        loss=loss,
        chunk_tokens=chunk_tokens(
            loss.chunk_tokens,
            chip_of(mesh.devices.flat[0].device_kind),
            entries,
            share,
            on_cpu=platform(mesh) == "cpu",
            head_trainable=trainable,
        ),
        vocab_size=vocab_size,
        mesh=mesh,
        turn_head=platform(mesh) == "cpu" and dtype == "bfloat16",
        head_trainable=trainable,
    )


def make_program(
    config: Config, models: Models, vocab_size: int, mesh: Mesh, num_steps: int | None = None
) -> Program:
    """Returns what is fixed while the step is compiled.

    Args:
      num_steps: of the run, for what follows a schedule; evaluation needs none.
    """
    rows = config.data.batch_size // config.optim.accumulation_steps
    head = make_head(
        config.loss,
        mesh,
        vocab_size,
        rows * config.data.seq_len,
        config.student.dtype,
        config.trainable == "full",
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


def place_state(state: TrainState, mesh: Mesh) -> TrainState:
    """Returns the state with its scalars on every device of the mesh, like the arrays."""
    return jax.tree.map(lambda x: jax.device_put(x, replicated(mesh)) if x.ndim == 0 else x, state)
