"""The configuration of a run: typed, frozen and validated. Needs no jax."""

import difflib
from dataclasses import dataclass, field
from typing import Annotated, Literal

from kd_jax.config.checks import INF, Checks, Range, check_fields
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
    path: str
    """The student: Hugging Face folder, output of convert.from_hf, or hub id."""
    adapter: str | None = None
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
        checks.require(bool(self.target_modules), "lora.target-modules", "at least one name", ())
        for name in self.target_modules:
            near = difflib.get_close_matches(name, LINEAR_NAMES, 1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            expected = f"names among {', '.join(LINEAR_NAMES)}"
            checks.require(name in LINEAR_NAMES, "lora.target-modules", expected, f"{name}{hint}")


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
        wanted, given = len(self.student_layers), self.teacher_layers
        expected = f"as many as hidden.student-layers, {wanted}"
        checks.require(len(given) == wanted, "hidden.teacher-layers", expected, given)
        holds, expected = self.weight == 0 or wanted > 0, "at least one with hidden.weight above 0"
        checks.require(holds, "hidden.student-layers", expected, self.student_layers)


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    path: str
    """Training data: a file (.json, .jsonl, .ndjson, .csv, .tsv, .txt, .parquet, .arrow; also .gz
    or .zst), a folder or glob of such files, an address such as s3://bucket/file.jsonl, or a
    dataset on the hub: org/name, org/name:subset, org/name@revision, org/name:subset@revision.
    Several with commas are one data set; with weights, as in 'a.jsonl:0.7, b.jsonl:0.3', batches
    draw that share of their rows from each."""
    split: str = "train"
    """Split, or a slice of it: train[:98%], train[98%:], train[:1000]. Files have only train; those
    of a folder have the splits that their names tell."""
    seq_len: Annotated[int, Range(least=2)] = 2048
    """Tokens in a row."""
    batch_size: Annotated[int, AtLeast1] = 8
    """Rows per optimizer step over all devices and micro-batches."""
    train_on: Literal["assistant", "all"] = "assistant"
    """Target tokens: the assistant's content and end-of-turn tokens, or every token."""
    overlong: Literal["truncate", "drop", "error"] = "truncate"
    """Conversations longer than seq_len: truncate or drop them, or stop with an error."""
    on_bad_record: Literal["error", "skip"] = "error"
    """Records that cannot be used: stop with a list of them, or skip them with a count."""
    pack: bool = True
    """Pack several conversations into a row, with attention masked between them; otherwise one
    conversation a row, padded."""
    date: str = "26 Jul 2024"
    """Date for chat templates that print today's: 26 Jul 2024 or 2024-07-26."""
    chat_template: str | None = None
    """Jinja file to use instead of the tokenizer's own chat template."""
    max_conversations: Annotated[int | None, AtLeast1] = None
    """Use only the first conversations of the data; None uses all."""
    cache_dir: str = "~/.cache/kd_jax/rows"
    """Folder of tokenized rows, keyed by tokenizer, source and options."""
    num_processes: Annotated[int | None, AtLeast1] = None
    """Processes that tokenize; None: one per CPU core, at most 16. Changes speed, not results."""

    def check(self, checks: Checks) -> None:
        checks.require_date(self.date, "data.date")


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
    rows are split. 0: the smallest size that fits, as kd_jax.plan estimates, or 1 where the
    device's memory is unknown."""
    tensor: Annotated[int, Range(least=0, also=-1)] = 0
    """Tensor parallelism: weights and the vocabulary are sharded, rows are not split; 0 as for
    fsdp."""
    unsharded_tolerance: Annotated[float, Range(least=0, most=1)] = 0.02
    """Largest share of a model's bytes that may be replicated because their dimensions do not
    divide by the mesh axes."""

    def check(self, checks: Checks) -> None:
        free = [name for name in ("data", "fsdp", "tensor") if getattr(self, name) == -1]
        checks.require(len(free) <= 1, "mesh", "at most one axis of -1", ", ".join(free))


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
        count, number = self.num_processes, self.process_id
        several = count is not None and count > 1
        for name, value in (("coordinator", self.coordinator), ("process-id", number)):
            expected = "a value with several processes"
            checks.require(value is not None or not several, f"distributed.{name}", expected, value)
        alone = self.coordinator is None and number is None
        checks.require(count is not None or alone, "distributed.num-processes", "a number", count)
        host, _, port = (self.coordinator or "host:1").rpartition(":")
        fits = port.isdigit() and bool(host)
        checks.require(fits, "distributed.coordinator", "HOST:PORT", self.coordinator)
        fits = number is None or count is None or number < count
        checks.require(fits, "distributed.process-id", f"0 to {(count or 1) - 1}", number)


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointConfig:
    every_steps: Annotated[int, AtLeast1] = 200
    """Optimizer steps between checkpoints; the last step is always saved."""
    keep: Annotated[int, AtLeast1] = 2
    """Latest checkpoints to keep; the one with the lowest evaluation loss is kept too."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalConfig:
    path: str | None = None
    """Held-out data, in any form that data.path takes; None disables evaluation."""
    split: str | None = None
    """Split or slice of it, as data.split; None: all of files, test of a folder or hub dataset."""
    fraction: Annotated[float, Range(least=0, below=1)] = 0.0
    """Instead of path: hold out this share of the training data, by a hash of each record, so that
    equal records are on one side whatever the seed."""
    every_steps: Annotated[int, AtLeast1] = 200
    """Optimizer steps between evaluations; the last step is always evaluated."""
    max_conversations: Annotated[int | None, AtLeast1] = None
    """Use only the first conversations of path; None uses all."""
    accuracy: Annotated[int, AtLeast0] = 0
    """Questions of path to answer greedily in each evaluation; eval/accuracy is the share of
    answers whose final number, as GSM8K's after ####, is the data's. 0: none."""
    max_new_tokens: Annotated[int, AtLeast1] = 256
    """Most tokens of an answer for accuracy."""

    def check(self, checks: Checks) -> None:
        fits = not self.accuracy or self.path is not None
        checks.require(fits, "eval.accuracy", "0 without eval.path", self.accuracy)
        alone = not self.fraction or (self.path is None and self.max_conversations is None)
        expected = "0 with eval.path or eval.max-conversations"
        checks.require(alone, "eval.fraction", expected, self.fraction)


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

    workdir: str
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
    attention: Literal["auto", "xla", "cudnn", "splash"] = "auto"
    """Attention kernel; auto: cudnn for bfloat16 on NVIDIA GPUs, splash on TPUs, else xla."""
    compilation_cache: str | None = "~/.cache/kd_jax/xla"
    """Folder (or gs:// address) of compiled programs for later runs; None disables it."""

    def __post_init__(self) -> None:
        check_fields(self, skip=None if self.trainable == "lora" else "lora")

    def check(self, checks: Checks) -> None:
        both = (self.steps, self.epochs)
        one = (self.steps is None) != (self.epochs is None)
        checks.require(one, "steps, epochs", "a number for one, None for the other", both)
        longest = self.loss.schedule_steps or 0
        fits = self.steps is None or longest <= self.steps
        checks.require(fits, "loss.schedule-steps", f"at most steps ({self.steps})", longest)
        expected = "a folder (docs/clusters.md mounts buckets)"
        checks.require("://" not in self.workdir, "workdir", expected, self.workdir)
        size, count = self.data.batch_size, self.optim.accumulation_steps
        fits, expected = count < 1 or size % count == 0, "a multiple of optim.accumulation-steps"
        checks.require(fits, "data.batch-size", f"{expected} ({count})", size)
        models = [self.student] + ([] if self.teacher is None else [self.teacher])
        fits = self.attention != "cudnn" or {m.dtype for m in models} <= {"auto", "bfloat16"}
        expected = "another than cudnn with a float32 student or teacher"
        checks.require(fits, "attention", expected, self.attention)
        fits, expected = self.hidden.weight == 0 or self.distils, "0 without a teacher"
        expected += " or with loss.kd-ratio 0"
        checks.require(fits, "hidden.weight", expected, self.hidden.weight)
        fits = not (self.compares_hidden and self.reads_cache)
        expected = "0 with teacher.cache, which has no outputs of the teacher's layers"
        checks.require(fits, "hidden.weight", expected, self.hidden.weight)
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
