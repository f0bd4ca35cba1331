"""The configuration of a run: typed, frozen and validated. Needs no jax."""

import re
from dataclasses import dataclass, field
from typing import Annotated, Literal

from kd_jax.config.checks import INF, Checks, OptionalPath, PathText, Range, Share, check_fields
from kd_jax.config.data import DataConfig, EvalConfig
from kd_jax.config.errors import did_you_mean
from kd_jax.config.loss import LossConfig
from kd_jax.config.on_policy import OnPolicyConfig
from kd_jax.config.teacher import Dtype, TeacherConfig

Remat = Literal["none", "dots", "attention", "layer"]
# Ranges of several fields.
AtLeast0 = Range(least=0)
AtLeast1 = Range(least=1)
Above0 = Range(above=0)
Below1 = Range(least=0, below=1)


@dataclass(frozen=True, kw_only=True, slots=True)
class StudentConfig:
    path: PathText
    """The student: Hugging Face folder, output of convert.from_hf, or hub id."""
    adapter: OptionalPath = None
    """PEFT adapter (folder or hub id) to start from: continued with trainable=lora, merged at load
    with trainable=full."""
    dtype: Dtype = "auto"
    """dtype of the student's frozen weights and matrix products; trainable weights are float32.
    auto: as for the teacher."""
    shard_over: tuple[Literal["fsdp", "tensor"], ...] = ("fsdp", "tensor")
    """Mesh axes that shard the student's weights and optimizer state; along all others they are
    replicated."""


LINEAR_NAMES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraConfig:
    """Low-rank adapters, y = x Wᵀ + (alpha / rank) (x Aᵀ) Bᵀ (arXiv 2106.09685)."""

    rank: Annotated[int, AtLeast1] = 64
    """Rows of A and columns of B."""
    alpha: Annotated[float, Above0] = 128.0
    """The adapter's output is scaled by alpha / rank."""
    dropout: Annotated[float, Below1] = 0.0
    """Dropout probability of A's inputs in training."""
    target_modules: tuple[str, ...] = tuple(name for name in LINEAR_NAMES if name != "k_proj")
    """Projections with an adapter, by Hugging Face name; Phi's fused qkv_proj and gate_up_proj have
    one if any of their parts is named."""

    def check(self, checks: Checks) -> None:
        if not self.target_modules:
            checks.refuse("lora.target-modules", "at least one name", ())
        for name in self.target_modules:
            if name not in LINEAR_NAMES:
                checks.problems.append(
                    f"lora.target-modules: expected names among {', '.join(LINEAR_NAMES)}, got "
                    f"{name!r}.{did_you_mean(name, LINEAR_NAMES)}"
                )


@dataclass(frozen=True, kw_only=True, slots=True)
class HiddenConfig:
    """Hidden-state loss: hidden.weight * hidden_loss is added to the loss on the tokens.

    States are divided by their root mean square. Where the models' widths differ, each pair of
    layers trains a projection, which is checkpointed and never exported. Evaluations omit the loss.
    """

    weight: Annotated[float, Range(least=0, below=INF)] = 0.0
    """Weight of the hidden-state loss; 0 disables it."""
    kind: Literal["mse", "cosine"] = "mse"
    """Mean squared error over the width, or 1 - cosine similarity, of the projected student's and
    the teacher's states; mean over pairs of layers and target tokens."""
    student_layers: tuple[int, ...] = ()
    """Student layers whose outputs are compared, from 0; -1 is the last layer."""
    teacher_layers: tuple[int, ...] = ()
    """Teacher layer for each of student_layers, in the same order."""

    def check(self, checks: Checks) -> None:
        if len(self.teacher_layers) != len(self.student_layers):
            expected = f"as many as hidden.student-layers, {len(self.student_layers)}"
            checks.refuse("hidden.teacher-layers", expected, self.teacher_layers)
        if self.weight > 0 and not self.student_layers:
            checks.refuse("hidden.student-layers", "at least one with hidden.weight above 0", ())


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimConfig:
    """AdamW (arXiv 1711.05101) in float32; norms and biases are not decayed."""

    learning_rate: Annotated[float, AtLeast0] = 3e-4
    """Peak learning rate."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Learning rate after the warm-up: decay to zero, or constant."""
    warmup_steps: Annotated[int, AtLeast0] = 100
    """Optimizer steps of linear warm-up."""
    weight_decay: Annotated[float, AtLeast0] = 0.01
    """Decoupled weight decay."""
    beta1: Annotated[float, Below1] = 0.9
    """Decay of the first moment."""
    beta2: Annotated[float, Below1] = 0.999
    """Decay of the second moment."""
    epsilon: Annotated[float, Above0] = 1e-8
    """Added to the root of the second moment."""
    clip_norm: Annotated[float | None, Above0] = 1.0
    """Clip gradients to this global norm; None does not clip."""
    accumulation_steps: Annotated[int, AtLeast1] = 1
    """Micro-batches per optimizer step, into which data.batch-size is split. Changes memory, not
    results."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MeshConfig:
    """Devices by mesh axis; the product must be the number of devices."""

    data: Annotated[int, Range(least=1, also=-1)] = -1
    """Data parallelism: both models are replicated, rows are split. -1: all devices left by
    the other axes."""
    fsdp: Annotated[int, Range(least=0, also=-1)] = 0
    """Fully sharded data parallelism: weights are sharded over this axis and all-gathered for use,
    rows are split. 0: the size of the fastest layout that fits, as kd_jax.plan estimates, or 1
    where the device's memory is unknown."""
    tensor: Annotated[int, Range(least=0, also=-1)] = 0
    """Tensor parallelism: weights and the vocabulary are sharded, rows are not split; 0 as for
    fsdp."""
    context: Annotated[int, Range(least=0, also=-1)] = 0
    """Context parallelism: each row's tokens are split over this axis, for rows too long or too few
    for the devices. Keys and values are all-gathered; weights are replicated. 0: 1, and more only
    where no other layout fits."""
    unsharded_tolerance: Annotated[float, Share] = 0.02
    """Largest share of a model's bytes that may be replicated because their dimensions do not
    divide by the mesh axes."""

    def check(self, checks: Checks) -> None:
        axes = ("data", "fsdp", "context", "tensor")
        free = [name for name in axes if getattr(self, name) == -1]
        if len(free) > 1:
            checks.refuse("mesh", "at most one axis of -1", ", ".join(free))


@dataclass(frozen=True, kw_only=True, slots=True)
class DistributedConfig:
    """Several processes as one run; Slurm, Open MPI and Cloud TPU are detected without flags."""

    coordinator: str | None = None
    """HOST:PORT of process 0, to which the others connect."""
    num_processes: Annotated[int | None, AtLeast1] = None
    """Processes of the run; 1 disables the detection of launchers."""
    process_id: Annotated[int | None, AtLeast0] = None
    """Number of this process, from 0."""
    timeout_seconds: Annotated[int, AtLeast1] = 300
    """Seconds to wait for all processes to connect."""

    def check(self, checks: Checks) -> None:
        count, number, coordinator = self.num_processes, self.process_id, self.coordinator
        for name, value in (("coordinator", coordinator), ("process-id", number)):
            if value is None and count is not None and count > 1:
                checks.refuse(f"distributed.{name}", "a value with several processes", value)
        if count is None and not (coordinator is None and number is None):
            checks.refuse("distributed.num-processes", "a number", count)
        if coordinator is not None and not re.fullmatch(r".+:\d+", coordinator):
            checks.refuse("distributed.coordinator", "HOST:PORT", coordinator)
        if number is not None and count is not None and number >= count:
            checks.refuse("distributed.process-id", f"0 to {count - 1}", number)


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointConfig:
    every_steps: Annotated[int, AtLeast1] = 200
    """Optimizer steps between checkpoints; the last step is always saved."""
    keep: Annotated[int, AtLeast1] = 2
    """Latest checkpoints to keep; the one with the lowest evaluation loss is kept too."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LogConfig:
    every_steps: Annotated[int, AtLeast1] = 1
    """Optimizer steps between lines of metrics.jsonl."""
    tensorboard: bool = True
    """Also write metrics to WORKDIR/tensorboard."""
    progress: bool = True
    """Show a progress bar on a terminal, else print a line now and then."""
    profile_start: Annotated[int | None, AtLeast0] = None
    """First optimizer step of an XLA profile in WORKDIR/profile; None: no profile."""
    profile_steps: Annotated[int, AtLeast1] = 3
    """Optimizer steps in the profile."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """Everything that a run depends on; `dump` writes it to WORKDIR/config.json."""

    workdir: PathText
    """Folder of the run: metrics, configuration, checkpoints. The same folder resumes."""
    teacher: TeacherConfig | None
    student: StudentConfig
    data: DataConfig
    trainable: Literal["lora", "full"] = "lora"
    """Train low-rank adapters on the student, or all of its weights."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    hidden: HiddenConfig = field(default_factory=HiddenConfig)
    on_policy: OnPolicyConfig = field(default_factory=OnPolicyConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    log: LogConfig = field(default_factory=LogConfig)
    steps: Annotated[int | None, AtLeast1] = None
    """Optimizer steps; give this or epochs. The flag replaces the file's epochs."""
    epochs: Annotated[float | None, Range(above=0, below=10**9)] = None
    """Passes over the packed rows; give this or steps. The flag replaces the file's steps."""
    seed: Annotated[int, Range(least=0, below=2**32)] = 0
    """Seed of the adapters, of dropout and of the order of rows."""
    remat: Literal["auto", "none", "dots", "attention", "layer"] = "auto"
    """Gradient checkpointing: what the student's backward pass recomputes. none: nothing; dots: all
    but matrix products and attention; attention: all but attention; layer: whole layers; auto: the
    fastest of them that fits, as kd_jax.plan estimates. Changes memory and speed, not results."""
    attention: Literal["auto", "xla", "cudnn", "triton", "splash"] = "auto"
    """Attention kernel; auto: triton for bfloat16 on NVIDIA GPUs, splash on TPUs, else xla. triton,
    splash, and xla on a CPU skip other documents, which cudnn computes and masks; triton leaves
    sliding windows, and heads of another dimension than 16, 32, 64 or 128, to cudnn."""
    compilation_cache: OptionalPath = "~/.cache/kd_jax/xla"
    """Folder (or gs:// address) of compiled programs for later runs; None disables it."""

    def __post_init__(self) -> None:
        check_fields(self, skip=None if self.trainable == "lora" else "lora")

    def check(self, checks: Checks) -> None:
        if (self.steps is None) == (self.epochs is None):
            both = self.steps, self.epochs
            checks.refuse("steps, epochs", "a number for one, None for the other", both)
        for name, part in (("loss", self.loss), ("on-policy", self.on_policy)):
            longest = part.schedule_steps or 0
            if self.steps is not None and longest > self.steps:
                checks.refuse(f"{name}.schedule-steps", f"at most steps ({self.steps})", longest)
        if "://" in self.workdir:
            expected = "a folder (docs/clusters.md mounts buckets)"
            checks.refuse("workdir", expected, self.workdir)
        size, count = self.data.batch_size, self.optim.accumulation_steps
        if count >= 1 and size % count:
            expected = f"a multiple of optim.accumulation-steps ({count})"
            checks.refuse("data.batch-size", expected, size)
        dtypes = {self.student.dtype, "auto" if self.teacher is None else self.teacher.dtype}
        if self.attention in ("cudnn", "triton") and "float32" in dtypes:
            expected = f"another than {self.attention} with a float32 student or teacher"
            checks.refuse("attention", expected, self.attention)
        if self.hidden.weight > 0 and not self.distils:
            expected = "0 without a teacher or with loss.kd-ratio 0"
            checks.refuse("hidden.weight", expected, self.hidden.weight)
        if self.compares_hidden and self.reads_cache:
            expected = "0 with teacher.cache, which has no outputs of the teacher's layers"
            checks.refuse("hidden.weight", expected, self.hidden.weight)
        if self.teacher is not None:
            self.teacher.check_run(checks, self)
        if self.samples:
            self.on_policy.check_run(checks, self)

    @property
    def samples(self) -> bool:
        """True if rows are sampled from the student: on-policy distillation."""
        return self.on_policy.highest_fraction > 0

    @property
    def distils(self) -> bool:
        """True if a teacher takes part; else the loss is the cross-entropy alone."""
        highest = max(self.loss.kd_ratio, self.loss.kd_ratio_end or 0)
        return self.teacher is not None and highest > 0

    @property
    def remat_policy(self) -> Remat:
        """remat; `auto` that is not chosen yet is layer, which takes the least memory."""
        return "layer" if self.remat == "auto" else self.remat

    @property
    def compares_hidden(self) -> bool:
        """True if layers' outputs are compared with the teacher's."""
        return self.distils and self.hidden.weight > 0

    @property
    def reads_cache(self) -> bool:
        """True if the teacher's outputs come from a cache."""
        return self.distils and self.teacher is not None and self.teacher.cache is not None

    @property
    def fills_cache(self) -> bool:
        """True if the teacher runs before the first step, on documents that its cache lacks."""
        return (
            self.reads_cache and self.teacher is not None and self.teacher.cache_missing != "error"
        )

    @property
    def prompts_teacher(self) -> bool:
        """True if a teacher takes part that sees another prompt than the student."""
        return self.distils and self.teacher is not None and self.teacher.has_prompt

    @property
    def teacher_seq_len(self) -> int:
        """Tokens in a row of the teacher; without teacher.seq_len as in the student's."""
        own = self.teacher.seq_len if self.teacher is not None and self.prompts_teacher else None
        return self.data.seq_len if own is None else own

    @property
    def teacher_part(self) -> StudentConfig | TeacherConfig | None:
        """Whose path, dtype and shard_over the teacher has: in self-distillation the student's."""
        return (
            self.student if self.teacher is not None and self.teacher.is_student else self.teacher
        )
