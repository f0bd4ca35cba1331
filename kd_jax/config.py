"""The configuration of a run: typed, frozen and validated. Needs no jax."""

import dataclasses
import difflib
import json
import math
from dataclasses import dataclass, field
from types import UnionType
from typing import Any, Literal, get_args, get_origin

Dtype = Literal["bfloat16", "float32"]


class UserError(Exception):
    """A mistake of the user's: printed as one message without a traceback, exit status 2."""


class _Checks:
    """Collects what is wrong with a dataclass, so that all problems are reported at once."""

    def __init__(self) -> None:
        self.problems: list[str] = []

    def require(self, holds: bool, name: str, expected: str, got: Any) -> None:
        if not holds:
            self.problems.append(f"{name}: expected {expected}, got {got!r}")

    def require_types(self, part: Any, prefix: str = "") -> None:
        """Requires values of the annotated types: a config file is Python, which checks none."""
        for entry in dataclasses.fields(part):
            name, value = f"{prefix}{entry.name}".replace("_", "-"), getattr(part, entry.name)
            fits = _is_a(value, entry.type)
            self.require(fits, name, _name_of(entry.type), value)
            if fits and dataclasses.is_dataclass(value):
                self.require_types(value, f"{name}.")

    def finish(self) -> None:
        if self.problems:
            raise UserError("\n".join(self.problems))


def _is_a(value: Any, kind: Any) -> bool:
    """Tells whether a value is of an annotated type; an integer is a float too, a bool neither."""
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if isinstance(kind, UnionType):
        return any(_is_a(value, one) for one in get_args(kind))
    if get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(_is_a(x, get_args(kind)[0]) for x in value)
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, (int, float) if kind is float else kind)


def _name_of(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return "|".join(get_args(kind))
    return kind.__name__ if isinstance(kind, type) else str(kind)


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


@dataclass(frozen=True, kw_only=True, slots=True)
class Compat:
    """The conventions under which another system reports its distillation loss."""

    divergences: tuple[str, ...]
    """Those of LossConfig that it has."""
    scale_by_t2: bool
    fixed: dict[str, float] = field(default_factory=dict)
    """Fields of LossConfig that it has no choice of."""


COMPATS = {
    "none": Compat(divergences=(), scale_by_t2=False),
    "torchtune": Compat(
        divergences=("forward_kl", "reverse_kl", "symmetric_kl"),
        scale_by_t2=False,
        fixed={"temperature": 1.0},
    ),
    "trl": Compat(divergences=("forward_kl", "reverse_kl", "jsd"), scale_by_t2=False),
    "distillkit": Compat(
        divergences=("forward_kl", "jsd", "tvd"), scale_by_t2=True, fixed={"jsd_beta": 0.5}
    ),
    "maxtext": Compat(divergences=("forward_kl",), scale_by_t2=True),
}
# Fields that say something of some divergences alone.
OPTIONS = {
    "symmetric_weight": ("symmetric_kl",),
    "jsd_beta": ("jsd", "jsd_cross"),
    "skew_alpha": ("skew_forward_kl", "skew_reverse_kl"),
    "akl_mass": ("adaptive_kl",),
    "ab_alpha": ("alpha_beta",),
    "ab_beta": ("alpha_beta",),
}
NEAR_END = 0.05  # of jsd_beta to 0 or 1: the divergence has shrunk to about this share

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

    def check(self, checks: _Checks) -> None:
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
class LossConfig:
    """loss = (1 - kd_ratio) * cross-entropy + kd_ratio * divergence, nats per target token."""

    kd_ratio: float = 0.5
    """Weight of the divergence; the cross-entropy on the labels gets the rest. 0 is plain
    fine-tuning, for which no teacher is loaded."""
    kd_ratio_end: float | None = None
    """kd_ratio where the schedule ends, and in every evaluation; None keeps it as it is."""
    divergence: Literal[
        "forward_kl",
        "reverse_kl",
        "symmetric_kl",
        "jsd",
        "jsd_cross",
        "skew_forward_kl",
        "skew_reverse_kl",
        "tvd",
        "adaptive_kl",
        "alpha_beta",
    ] = "forward_kl"
    """What is minimised between teacher and student; docs/losses.md defines each."""
    symmetric_weight: float = 0.5
    """Weight of the forward KL in symmetric_kl; the reverse KL gets the rest."""
    jsd_beta: float = 0.5
    """Weight of the teacher in the mixture of jsd and jsd_cross: 0 is the forward KL, 1 the
    reverse. Near an end, but not at it, jsd vanishes, while jsd_cross goes there steadily."""
    skew_alpha: float = 0.1
    """Share of its own first distribution that skew_forward_kl (the teacher) and skew_reverse_kl
    (the student) mix into the second; 0 mixes nothing."""
    akl_mass: float = 0.5
    """Probability of the teacher's likeliest entries, by whose share of the errors adaptive_kl
    weighs the forward KL."""
    ab_alpha: float = 0.2
    """Power of the teacher's probabilities in alpha_beta; 1 beside ab-beta 0 is the forward KL."""
    ab_beta: float = 0.7
    """Power of the student's probabilities in alpha_beta; 1 beside ab-alpha 0 is the reverse KL."""
    temperature: float = 1.0
    """Both models' logits are divided by this in the divergence, never in the cross-entropy."""
    temperature_end: float | None = None
    """temperature where the schedule ends, and in every evaluation; None keeps it as it is."""
    scale_by_t2: bool | None = None
    """Whether the divergence is multiplied by the temperature's square, its gradient with it; None
    does as the system of compat does, and with none of them does not."""
    compat: Literal["none", "torchtune", "trl", "distillkit", "maxtext"] = "none"
    """Report kd_loss and loss as this system does, for the divergences that it has."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How kd_ratio and temperature go to their ends, from the first optimizer step on."""
    schedule_steps: int | None = None
    """Optimizer steps of the schedule, whose last one has the ends; None takes the whole run."""
    chunk_tokens: int | None = None
    """Tokens per device whose logits exist at one time, in both models; None takes what suits the
    device. Memory and speed, not results."""

    def check(self, checks: _Checks) -> None:
        for name, value in (("kd-ratio", self.kd_ratio), ("kd-ratio-end", self.kd_ratio_end)):
            holds = value is None or 0 <= value <= 1
            checks.require(holds, f"loss.{name}", "0 <= ratio <= 1", value)
        for name, value in (
            ("temperature", self.temperature),
            ("temperature-end", self.temperature_end),
        ):
            holds = value is None or 0 < value < math.inf
            checks.require(holds, f"loss.{name}", "above 0 and finite", value)
        self._check_schedule(checks)
        self._check_divergence(checks)
        chunk = self.chunk_tokens
        checks.require(chunk is None or chunk >= 1, "loss.chunk-tokens", "at least 1", chunk)

    def _check_schedule(self, checks: _Checks) -> None:
        count = self.schedule_steps
        if self.schedule == "constant":
            expected = "linear or cosine beside loss.kd-ratio-end or loss.temperature-end"
            checks.require(not self.is_scheduled, "loss.schedule", expected, self.schedule)
            expected = "None with loss.schedule constant"
            checks.require(count is None, "loss.schedule-steps", expected, count)
        else:
            expected = "constant without loss.kd-ratio-end or loss.temperature-end"
            checks.require(self.is_scheduled, "loss.schedule", expected, self.schedule)
            checks.require(count is None or count >= 2, "loss.schedule-steps", "at least 2", count)

    def _check_divergence(self, checks: _Checks) -> None:
        shares = ("symmetric_weight", "jsd_beta")
        ranges = {name: (0 <= getattr(self, name) <= 1, "0 <= x <= 1") for name in shares}
        ranges["skew_alpha"] = (0 <= self.skew_alpha < 1, "0 <= x < 1")
        ranges["akl_mass"] = (0 < self.akl_mass < 1, "0 < x < 1")
        for name in ("ab_alpha", "ab_beta"):
            fits = math.isfinite(getattr(self, name)) and self.ab_alpha + self.ab_beta >= 0
            ranges[name] = (fits, "a finite number, ab-alpha + ab-beta at least 0")
        for entry in dataclasses.fields(self):
            if entry.name not in OPTIONS:
                continue
            flag, value = f"loss.{entry.name}".replace("_", "-"), getattr(self, entry.name)
            checks.require(ranges[entry.name][0], flag, ranges[entry.name][1], value)
            used = self.divergence in OPTIONS[entry.name] or value == entry.default
            expected = f"{entry.default}, its default, with divergence {self.divergence}"
            checks.require(used, flag, expected, value)
        self._check_compat(checks)

    def _check_compat(self, checks: _Checks) -> None:
        if self.compat == "none":
            return
        system, beside = COMPATS[self.compat], f"with loss.compat {self.compat}"
        fits = self.divergence in system.divergences
        expected = f"{'|'.join(system.divergences)} {beside}"
        checks.require(fits, "loss.divergence", expected, self.divergence)
        scales = self.scale_by_t2
        fits = scales in (None, system.scale_by_t2)
        checks.require(fits, "loss.scale-by-t2", f"{system.scale_by_t2} {beside}", scales)
        for name, only in system.fixed.items():
            flag = f"loss.{name}".replace("_", "-")
            value = getattr(self, name)
            checks.require(value == only, flag, f"{only} {beside}", value)
            end = getattr(self, f"{name}_end", None)
            checks.require(end in (None, only), f"{flag}-end", f"{only} {beside}", end)

    @property
    def warning(self) -> str | None:
        """What is allowed and probably not meant."""
        beta = self.jsd_beta
        if self.divergence != "jsd" or beta in (0, 1) or NEAR_END <= beta <= 1 - NEAR_END:
            return None
        return (
            f"loss.jsd-beta {beta} is near {round(beta)}, where jsd vanishes, but for the KL that "
            f"it is at {round(beta)} itself; jsd_cross goes there steadily"
        )

    @property
    def is_scheduled(self) -> bool:
        return self.kd_ratio_end is not None or self.temperature_end is not None


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

    def check(self, checks: _Checks) -> None:
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

    def check(self, checks: _Checks) -> None:
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

    def check(self, checks: _Checks) -> None:
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

    def check(self, checks: _Checks) -> None:
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

    def check(self, checks: _Checks) -> None:
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

    def check(self, checks: _Checks) -> None:
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

    def check(self, checks: _Checks) -> None:
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

    def check(self, checks: _Checks) -> None:
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
        checks = _Checks()
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


# Fields that may differ when a run is resumed: where, how and in how much memory, never what is
# computed. Of what a path names, the content counts (checkpoint.claim_workdir).
RESUMABLE = frozenset(
    {
        "workdir",
        "teacher.path",
        "teacher.adapter",
        "teacher.shard_over",
        "student.path",
        "student.adapter",
        "student.shard_over",
        "data.path",
        "data.cache_dir",
        "compilation_cache",
        "remat",
        "attention",
        "loss.chunk_tokens",
        "log.*",
        "mesh.*",
        "distributed.*",
        "checkpoint.*",
        "eval.*",
    }
)


def dump(config: Config) -> dict[str, Any]:
    """Returns the config as what JSON holds; `from_json` is its inverse."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_json(tree: dict[str, Any]) -> Config:
    """Returns the Config that `dump` made `tree` from."""
    kinds: dict[str, Any] = {
        entry.name: part_of(entry.type) for entry in dataclasses.fields(Config)
    }
    return Config(
        **{n: kinds[n](**_tuples(v)) if isinstance(v, dict) else v for n, v in tree.items()}
    )


def _tuples(part: dict[str, Any]) -> dict[str, Any]:
    """Returns the fields of a part with tuples for the lists that JSON made of them."""
    return {name: tuple(x) if isinstance(x, list) else x for name, x in part.items()}


def part_of(kind: Any) -> Any:
    """Returns the dataclass that an annotation names, alone or beside None; else None."""
    return next((k for k in get_args(kind) or (kind,) if dataclasses.is_dataclass(k)), None)


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Returns `field: old -> new` for each field of two dumps that resuming may not change."""
    old_fields, new_fields = flatten(old), flatten(new)
    changed = []
    for name in sorted(old_fields.keys() | new_fields.keys()):
        before, after = old_fields.get(name), new_fields.get(name)
        free = name in RESUMABLE or f"{name.split('.')[0]}.*" in RESUMABLE
        if before != after and not free:
            changed.append(f"{name}: {before!r} -> {after!r}")
    return changed


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns a nested dict's leaves by dotted name."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat
