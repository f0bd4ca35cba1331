"""The configuration of a run: typed, frozen and validated. Needs no jax."""

import difflib
from dataclasses import dataclass, field
from typing import Literal

from kd_jax.config.errors import Checks
from kd_jax.config.loss import LossConfig

Dtype = Literal["bfloat16", "float32"]


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherConfig:
    """The frozen model to learn from. `teacher=None`, or loss.kd_ratio 0, is plain fine-tuning."""

    path: str
    """Folder in Hugging Face form, output of convert.from_hf, or hub id of the frozen teacher."""
    adapter: str | None = None
    """PEFT adapter (folder or hub id) merged into the teacher when it is loaded."""
    dtype: Dtype = "bfloat16"
    """dtype of the teacher's weights and matrix products; norms, softmax, logits and losses are
    always float32."""
    shard_over: tuple[Literal["fsdp", "tensor"], ...] = ("fsdp", "tensor")
    """Mesh axes whose devices share the teacher's weights; along the others each has a copy."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StudentConfig:
    path: str
    """Folder in Hugging Face form, output of convert.from_hf, or hub id of the student."""
    adapter: str | None = None
    """PEFT adapter (folder or hub id) to start from: continued with trainable=lora, merged at load
    with trainable=full."""
    dtype: Dtype = "bfloat16"
    """dtype of the student's frozen weights and matrix products; trainable weights are float32."""
    shard_over: tuple[Literal["fsdp", "tensor"], ...] = ("fsdp", "tensor")
    """Mesh axes whose devices share the student's weights and their optimizer state; along the
    others each has a copy."""


LINEAR_NAMES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraConfig:
    """Low-rank adapters, y = x Wᵀ + (alpha / rank) (x Aᵀ) Bᵀ (arXiv 2106.09685)."""

    rank: int = 64
    """Rows of A and columns of B."""
    alpha: float = 128.0
    """The adapter's output is scaled by alpha / rank."""
    dropout: float = 0.0
    """Probability of zeroing an input of A in training; 0 turns dropout off."""
    target_modules: tuple[str, ...] = (
        "q_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    )
    """Projections that get an adapter, by Hugging Face name."""

    def check(self, checks: Checks) -> None:
        checks.require(self.rank >= 1, "lora.rank", "at least 1", self.rank)
        checks.require(self.alpha > 0, "lora.alpha", "above 0", self.alpha)
        checks.require(0 <= self.dropout < 1, "lora.dropout", "0 <= p < 1", self.dropout)
        checks.require(bool(self.target_modules), "lora.target-modules", "at least one name", ())
        for name in self.target_modules:
            near = difflib.get_close_matches(name, LINEAR_NAMES, 1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            checks.require(
                name in LINEAR_NAMES,
                "lora.target-modules",
                f"names among {', '.join(LINEAR_NAMES)}",
                f"{name}, which matches nothing{hint}",
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class HiddenConfig:
    """An optional term, hidden.weight * hidden_loss, that brings layers' outputs to the teacher's.

    States are divided by their root mean square. Where the models' widths differ, a projection is
    trained for each pair of layers; it is checkpointed and never exported. Evaluations leave the
    term out.
    """

    weight: float = 0.0
    """Weight of the hidden-state loss, added to the loss on the tokens; 0 turns it off."""
    kind: Literal["mse", "cosine"] = "mse"
    """Mean square of projected student less teacher over the width, or 1 - their cosine; mean over
    the pairs of layers, and over the target tokens."""
    student_layers: tuple[int, ...] = ()
    """Student layers whose outputs are compared, from 0; -1 is the last one."""
    teacher_layers: tuple[int, ...] = ()
    """The teacher's layer for each of student_layers, in the same order."""

    def check(self, checks: Checks) -> None:
        checks.require(0 <= self.weight < float("inf"), "hidden.weight", "at least 0", self.weight)
        wanted = len(self.student_layers)
        checks.require(
            len(self.teacher_layers) == wanted,
            "hidden.teacher-layers",
            f"as many as hidden.student-layers, {wanted}",
            self.teacher_layers,
        )
        checks.require(
            self.weight == 0 or wanted > 0,
            "hidden.student-layers",
            "at least one layer with hidden.weight above 0",
            self.student_layers,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    path: str
    """Training data: .json (array or lines), .jsonl, .parquet, or a dataset id on the hub."""
    split: str = "train"
    """Split to read when path is a hub id."""
    seq_len: int = 2048
    """Tokens in a row."""
    batch_size: int = 8
    """Rows per optimizer step over all devices and micro-batches."""
    train_on: Literal["assistant", "all"] = "assistant"
    """Tokens with a loss: the assistant's content and end-of-turn tokens, or every token."""
    overlong: Literal["truncate", "drop", "error"] = "truncate"
    """What happens to conversations longer than seq_len."""
    pack: bool = True
    """Fill rows with several conversations (none sees another); otherwise one row each."""
    date: str = "26 Jul 2024"
    """The date shown to chat templates that print today's, as day month year."""
    chat_template: str | None = None
    """Jinja file to use instead of the tokenizer's own chat template."""
    max_conversations: int | None = None
    """Use only the first conversations of the file; None uses all."""
    cache_dir: str = "~/.cache/kd_jax/rows"
    """Folder of tokenised rows, keyed by tokenizer, source and options."""

    def check(self, checks: Checks) -> None:
        checks.require(self.seq_len >= 2, "data.seq-len", "at least 2", self.seq_len)
        checks.require(self.batch_size >= 1, "data.batch-size", "at least 1", self.batch_size)
        few = self.max_conversations
        checks.require(few is None or few >= 1, "data.max-conversations", "at least 1", few)


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimConfig:
    """AdamW (arXiv 1711.05101) in float32; norms and biases are not decayed."""

    learning_rate: float = 3e-4
    """Peak learning rate."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """After the warm-up: decay from the peak to zero, or the peak to the end."""
    warmup_steps: int = 100
    """Optimizer steps of linear warm-up."""
    weight_decay: float = 0.01
    """Decoupled weight decay."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.999
    """Decay of the second moment."""
    epsilon: float = 1e-8
    """Added to the root of the second moment."""
    clip_norm: float | None = 1.0
    """Largest global gradient norm; None does not clip."""
    accumulation_steps: int = 1
    """Micro-batches that data.batch-size is split into; memory, not results."""

    def check(self, checks: Checks) -> None:
        checks.require(
            self.learning_rate >= 0, "optim.learning-rate", "at least 0", self.learning_rate
        )
        checks.require(
            self.warmup_steps >= 0, "optim.warmup-steps", "at least 0", self.warmup_steps
        )
        checks.require(
            self.weight_decay >= 0, "optim.weight-decay", "at least 0", self.weight_decay
        )
        checks.require(0 <= self.beta1 < 1, "optim.beta1", "0 <= beta < 1", self.beta1)
        checks.require(0 <= self.beta2 < 1, "optim.beta2", "0 <= beta < 1", self.beta2)
        checks.require(self.epsilon > 0, "optim.epsilon", "above 0", self.epsilon)
        clip = self.clip_norm
        checks.require(clip is None or clip > 0, "optim.clip-norm", "above 0 or None", clip)
        count = self.accumulation_steps
        checks.require(count >= 1, "optim.accumulation-steps", "at least 1", count)


@dataclass(frozen=True, kw_only=True, slots=True)
class MeshConfig:
    """Devices by axis; the product must be the number of devices."""

    data: int = -1
    """Copies of both models that see different rows; -1 takes the devices left by the others."""
    fsdp: int = 0
    """Devices that share each weight, gathered when it is used, and see different rows; 0 takes as
    few as hold the run, by the estimate of kd_jax.plan, and 1 where the devices are not known."""
    tensor: int = 0
    """Devices that share each weight, and the vocabulary, and see the same rows; 0 as for fsdp."""
    unsharded_tolerance: float = 0.02
    """Share of a model's bytes that may stay whole on every device where dimensions do not divide
    by their axes; more is refused."""

    def check(self, checks: Checks) -> None:
        for name in ("data", "fsdp", "tensor"):
            size = getattr(self, name)
            least = 1 if name == "data" else 0
            checks.require(
                size >= least or size == -1, f"mesh.{name}", f"at least {least}, or -1", size
            )
        share = self.unsharded_tolerance
        checks.require(0 <= share <= 1, "mesh.unsharded-tolerance", "0 <= share <= 1", share)
        free = [name for name in ("data", "fsdp", "tensor") if getattr(self, name) == -1]
        checks.require(len(free) <= 1, "mesh", "at most one axis of -1", ", ".join(free))


@dataclass(frozen=True, kw_only=True, slots=True)
class DistributedConfig:
    """Several processes as one run; Slurm, Open MPI and Cloud TPU need none of this."""

    coordinator: str | None = None
    """HOST:PORT of process 0, at which the others find it."""
    num_processes: int | None = None
    """Processes of the run; 1 runs this one alone, whatever launched it."""
    process_id: int | None = None
    """Number of this process, from 0."""
    timeout_seconds: int = 300
    """That the processes wait for each other at the start."""

    def check(self, checks: Checks) -> None:
        count, number = self.num_processes, self.process_id
        checks.require(
            count is None or count >= 1, "distributed.num-processes", "at least 1", count
        )
        several = count is not None and count > 1
        given = (self.coordinator is not None, count is not None, number is not None)
        for name, value in (("coordinator", self.coordinator), ("process-id", number)):
            checks.require(
                value is not None or not several, f"distributed.{name}", "one, of so many", value
            )
        checks.require(
            count is not None or not any(given), "distributed.num-processes", "a number", count
        )
        port = (self.coordinator or ":1").rpartition(":")[2]
        whole = port.isdigit() and ":" in (self.coordinator or ":")
        checks.require(whole, "distributed.coordinator", "HOST:PORT", self.coordinator)
        checks.require(
            number is None or count is None or 0 <= number < count,
            "distributed.process-id",
            f"0 to {(count or 1) - 1}",
            number,
        )
        seconds = self.timeout_seconds
        checks.require(seconds >= 1, "distributed.timeout-seconds", "at least 1", seconds)


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointConfig:
    every_steps: int = 200
    """Optimizer steps between checkpoints; the last step is always saved."""
    keep: int = 2
    """Latest checkpoints kept; of those saved at a step that was evaluated, the one with the lowest
    loss is kept besides."""

    def check(self, checks: Checks) -> None:
        checks.require(
            self.every_steps >= 1, "checkpoint.every-steps", "at least 1", self.every_steps
        )
        checks.require(self.keep >= 1, "checkpoint.keep", "at least 1", self.keep)


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalConfig:
    path: str | None = None
    """Held-out data in any form that data.path takes; None evaluates nothing."""
    split: str = "test"
    """Split to read when path is a hub id."""
    every_steps: int = 200
    """Optimizer steps between evaluations; the last step is always evaluated."""
    max_conversations: int | None = None
    """Use only the first conversations of the file; None uses all."""

    def check(self, checks: Checks) -> None:
        checks.require(self.every_steps >= 1, "eval.every-steps", "at least 1", self.every_steps)
        few = self.max_conversations
        checks.require(few is None or few >= 1, "eval.max-conversations", "at least 1", few)


@dataclass(frozen=True, kw_only=True, slots=True)
class LogConfig:
    every_steps: int = 1
    """Optimizer steps between lines of metrics.jsonl."""
    tensorboard: bool = True
    """Write WORKDIR/tensorboard as well."""
    progress: bool = True
    """Draw a progress bar when the output is a terminal, else print a line now and then."""
    profile_start: int | None = None
    """First optimizer step of an XLA profile written to WORKDIR/profile; None takes none."""
    profile_steps: int = 3
    """Optimizer steps in the profile."""

    def check(self, checks: Checks) -> None:
        checks.require(self.every_steps >= 1, "log.every-steps", "at least 1", self.every_steps)
        start = self.profile_start
        checks.require(start is None or start >= 0, "log.profile-start", "at least 0", start)
        checks.require(
            self.profile_steps >= 1, "log.profile-steps", "at least 1", self.profile_steps
        )


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
    optim: OptimConfig = field(default_factory=OptimConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    log: LogConfig = field(default_factory=LogConfig)
    steps: int | None = None
    """Optimizer updates to take; give this or epochs. The flag replaces the file's epochs."""
    epochs: float | None = None
    """Passes over the packed rows; give this or steps. The flag replaces the file's steps."""
    seed: int = 0
    """Seeds adapters, dropout and the order of the rows."""
    remat: Literal["none", "dots", "attention", "layer"] = "layer"
    """What the student's backward pass recomputes: nothing; all but matrix products and attention;
    all but attention; or whole layers. Memory and speed, not results."""
    attention: Literal["auto", "xla", "cudnn", "splash"] = "auto"
    """Attention kernel; auto takes cudnn for bfloat16 on NVIDIA GPUs, splash on TPUs, else xla."""
    compilation_cache: str | None = "~/.cache/kd_jax/xla"
    """Folder (or gs:// address) of compiled programs, reused by later runs; None compiles anew."""

    def __post_init__(self) -> None:
        checks = Checks()
        checks.require_types(self)
        checks.finish()  # values of a wrong type cannot be compared
        if self.trainable == "lora":
            self.lora.check(checks)
        for part in (self.loss, self.hidden, self.data, self.optim, self.mesh, self.checkpoint):
            part.check(checks)
        self.distributed.check(checks)
        self.eval.check(checks)
        self.log.check(checks)
        given = (self.steps is not None) + (self.epochs is not None)
        both = (self.steps, self.epochs)
        checks.require(given == 1, "steps, epochs", "a number for one, None for the other", both)
        checks.require(self.steps is None or self.steps >= 1, "steps", "at least 1", self.steps)
        longest = self.loss.schedule_steps or 0
        checks.require(
            self.steps is None or longest <= self.steps,
            "loss.schedule-steps",
            f"at most steps ({self.steps})",
            longest,
        )
        checks.require(
            "://" not in self.workdir,
            "workdir",
            "a folder (docs/clusters.md mounts buckets)",
            self.workdir,
        )
        passes = self.epochs
        checks.require(passes is None or 0 < passes < 1e9, "epochs", "above 0", passes)
        checks.require(0 <= self.seed < 2**32, "seed", "0 <= seed < 2**32", self.seed)
        size, count = self.data.batch_size, self.optim.accumulation_steps
        checks.require(
            count < 1 or size % count == 0,
            "data.batch-size",
            f"a multiple of optim.accumulation-steps ({count})",
            size,
        )
        models = [self.student] + ([] if self.teacher is None else [self.teacher])
        narrow = {model.dtype for model in models} == {"bfloat16"}
        checks.require(
            self.attention != "cudnn" or narrow,
            "attention",
            "another than cudnn with a float32 student or teacher",
            self.attention,
        )
        checks.require(
            self.hidden.weight == 0 or self.distils,
            "hidden.weight",
            "0 without a teacher or with loss.kd-ratio 0",
            self.hidden.weight,
        )
        checks.finish()

    @property
    def distils(self) -> bool:
        """Whether a teacher takes part; else the loss is the cross-entropy alone."""
        highest = max(self.loss.kd_ratio, self.loss.kd_ratio_end or 0)
        return self.teacher is not None and highest > 0

    @property
    def compares_hidden(self) -> bool:
        """Whether layers' outputs are compared with the teacher's."""
        return self.distils and self.hidden.weight > 0
