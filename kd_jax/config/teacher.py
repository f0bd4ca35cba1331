"""The configuration of the teacher, and of the prompt that only it sees."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from kd_jax.config.checks import Checks, OptionalPath, Range

Dtype = Literal["auto", "bfloat16", "float32"]


EMA_DECAY = 0.99


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherConfig:
    """The teacher, which is not trained. teacher=None, or loss.kd_ratio 0, is plain fine-tuning."""

    path: OptionalPath = None
    """The teacher: Hugging Face folder, output of convert.from_hf, or hub id; None with another
    teacher.kind than model."""
    kind: Literal["model", "base", "ema"] = "model"
    """Weights of the teacher. model: those of teacher.path; base: the student's without its
    adapter; ema: an exponential average of the trained weights. base and ema share the student's
    frozen weights."""
    ema_decay: Annotated[float, Range(least=0, below=1)] = EMA_DECAY
    """With teacher.kind ema, after each update average = decay * average + (1 - decay) * weights
    (arXiv 1703.01780); before the first it is the student."""
    adapter: OptionalPath = None
    """PEFT adapter (folder or hub id) merged into the teacher when it is loaded."""
    dtype: Dtype = "auto"
    """dtype of the teacher's weights and matrix products; norms, softmax, logits and losses are
    always float32. auto: bfloat16 where the devices multiply it faster (GPUs, TPUs, CPUs with
    AVX512-BF16 or AMX), else float32."""
    shard_over: tuple[Literal["fsdp", "tensor"], ...] = ("fsdp", "tensor")
    """Mesh axes that shard the teacher's weights; along all others they are replicated."""
    cache: OptionalPath = None
    """Folder that kd_jax.cache wrote: the teacher's outputs are read from it, and of its weights
    only the lm_head is loaded. None: the teacher runs in every step."""
    cache_missing: Literal["error", "compute"] = "error"
    """Documents that the cache lacks: stop with their number, or run the teacher on them before
    the first step and add them to the cache."""

    cache_rest: Literal["bucket", "uniform", "label", "renormalize", "renormalize_both"] = "bucket"
    """Treatment of the teacher's probability that a topk cache does not store. bucket: all other
    entries count as one; uniform: it is spread evenly over them; label: it is added to the
    label's; renormalize: it is dropped, and the stored ones are divided by their sum;
    renormalize_both: the same for the student, whose other entries then have no part in the
    divergence."""

    system: str | None = None
    """System text that only the teacher sees, before a conversation's own; @FILE reads a file. The
    student learns to answer without it what the teacher answers with it (docs/prompts.md)."""
    messages: bool = False
    """Give the teacher the records' teacher_messages in place of their own turns. The answers with
    a loss must be the same texts."""
    seq_len: Annotated[int | None, Range(least=2)] = None
    """Tokens in a row of a teacher with its own prompt. None: as many as the data need; kd_jax.plan
    assumes data.seq-len."""

    @property
    def has_prompt(self) -> bool:
        """True if the teacher sees another prompt than the student."""
        return self.system is not None or self.messages

    @property
    def is_student(self) -> bool:
        """True in self-distillation."""
        return self.kind != "model"

    def check(self, checks: Checks) -> None:
        for name, value in (("path", self.path), ("adapter", self.adapter)):
            if self.is_student and value is not None:
                expected = f"None with teacher.kind {self.kind}, which is the student"
                checks.refuse(f"teacher.{name}", expected, value)
        if not self.is_student and self.path is None:
            expected = "a model, or teacher.kind base or ema, which take the student"
            checks.refuse("teacher.path", expected, self.path)
        if self.kind != "ema" and self.ema_decay != EMA_DECAY:
            expected = f"{EMA_DECAY} without teacher.kind ema"
            checks.refuse("teacher.ema-decay", expected, self.ema_decay)
        if self.kind == "ema" and self.cache is not None:
            expected = "None with teacher.kind ema, which changes with each step"
            checks.refuse("teacher.cache", expected, self.cache)
        if self.system is not None and not self.system.strip("@ \n"):
            checks.refuse("teacher.system", "a text or @FILE", self.system)
        if self.seq_len is not None and not self.has_prompt:
            expected = (
                "None without teacher.system or teacher.messages; data.seq-len is both models'"
            )
            checks.refuse("teacher.seq-len", expected, self.seq_len)
        if self.cache is None and self.cache_missing != "error":
            checks.refuse(
                "teacher.cache-missing", "error without teacher.cache", self.cache_missing
            )

    def check_run(self, checks: Checks, config: Any) -> None:
        """Checks the other parts of a run's Config."""
        train_on = config.data.train_on
        if config.prompts_teacher and train_on != "assistant":
            expected = (
                "assistant with teacher.system or teacher.messages, since prompts then differ"
            )
            checks.refuse("data.train-on", expected, train_on)
        if not self.is_student:
            return
        if self.kind == "base" and config.trainable == "full":
            expected = "model or ema with trainable full, which changes the base"
            checks.refuse("teacher.kind", expected, self.kind)
        for name, default in (("dtype", "auto"), ("shard_over", ("fsdp", "tensor"))):
            student, teacher = getattr(config.student, name), getattr(self, name)
            if teacher not in (default, student):
                expected = f"the student's, {student!r}, whose weights it has"
                checks.refuse(f"teacher.{name.replace('_', '-')}", expected, teacher)
