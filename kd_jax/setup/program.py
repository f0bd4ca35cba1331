"""The program of a run: its static configuration under jit."""

import dataclasses
from dataclasses import dataclass

from jax.sharding import Mesh

from kd_jax.config import Config, HiddenConfig, LossConfig, OptimConfig
from kd_jax.losses.head_inputs import HeadConfig
from kd_jax.models.decoder import DecoderSpec
from kd_jax.parallel.mesh import num_batch_shards, traits
from kd_jax.parallel.rules import context_size
from kd_jax.planning.chips import chip_of
from kd_jax.planning.memory import chunk_tokens
from kd_jax.setup.models import Models, TeacherKind
from kd_jax.teachers.live import LiveModel
from kd_jax.teachers.stored import StoredModel
from kd_jax.teachers.topk import TopKModel


@dataclass(frozen=True, kw_only=True)
class Program:
    """Static configuration of a step; a static argument of jit."""

    student: DecoderSpec
    teacher: LiveModel | StoredModel | TopKModel | None
    """Gives the teacher's side of a batch."""
    teacher_kind: TeacherKind = "model"
    """Whose weights the teacher has."""
    ema_decay: float = 0.0
    """With teacher_kind ema: the share of the average that an update leaves."""
    head: HeadConfig
    hidden: HiddenConfig | None = None
    mesh: Mesh
    seed: int = 0
    optim: OptimConfig | None = None
    """The optimizer, built while the step is traced; None for evaluation."""
    num_steps: int | None = None
    """Optimizer steps of the run, the length of the schedules."""

    @property
    def schedule_steps(self) -> int | None:
        """Length of the loss schedule, optimizer steps."""
        return self.head.loss.schedule_steps or self.num_steps


def make_head(
    loss: LossConfig,
    mesh: Mesh,
    vocab_size: int,
    num_tokens: int,
    dtype: str,
    trainable: bool = False,
) -> HeadConfig:
    """Returns the head's configuration; `num_tokens` are those of all devices."""
    share = num_tokens // num_batch_shards(mesh) // context_size(mesh.shape)
    entries = vocab_size // mesh.shape["tensor"]
    row = traits(mesh)
    return HeadConfig(
        loss=loss,
        chunk_tokens=chunk_tokens(
            loss.chunk_tokens,
            row,
            chip_of(mesh.devices.flat[0].device_kind),
            entries,
            share,
            head_trainable=trainable,
        ),
        vocab_size=vocab_size,
        mesh=mesh,
        transpose_head=row.transposed_head and dtype == "bfloat16",
        head_trainable=trainable,
    )


def make_program(
    config: Config, models: Models, vocab_size: int, mesh: Mesh, num_steps: int | None = None
) -> Program:
    """Returns the program of a run.

    Args:
      num_steps: optimizer steps of the run, the length of the schedules; None for evaluation.
    """
    rows = config.data.batch_size // config.optim.accumulation_steps
    head = make_head(
        config.loss,
        mesh,
        vocab_size,
        rows * config.data.seq_len,
        models.student.dtype.name,
        config.trainable == "full",
    )
    if models.teacher_outputs == "topk" and config.teacher is not None:
        both = config.teacher.cache_rest == "renormalize_both"
        head = dataclasses.replace(head, listed_only=both)
    return Program(
        student=models.student,
        teacher=_make_teacher(config, models),
        teacher_kind=models.teacher_kind,
        ema_decay=config.teacher.ema_decay if config.teacher is not None else 0.0,
        head=head,
        hidden=config.hidden if config.compares_hidden else None,
        mesh=mesh,
        # 0 without dropout, so runs with different seeds share one compiled program.
        seed=config.seed if models.student.dropout > 0 else 0,
        optim=config.optim,
        num_steps=num_steps,
    )


def _make_teacher(config: Config, models: Models) -> LiveModel | StoredModel | TopKModel | None:
    spec = models.teacher
    if spec is None:
        return None
    if models.teacher_outputs == "live":
        return LiveModel(spec, models.separate_teacher_rows)
    if models.teacher_outputs == "hidden":
        return StoredModel(spec.arch)
    assert config.teacher is not None
    return TopKModel(spec.arch.vocab_size, config.teacher.cache_rest)
