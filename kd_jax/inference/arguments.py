"""Arguments of the commands that compare and ask models. Needs no jax."""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Literal

from kd_jax.config import DistributedConfig, MeshConfig
from kd_jax.config.checks import INF, Checks, OptionalPath, PathText, Range
from kd_jax.config.command import ModelArgs
from kd_jax.workdir.history import is_run

DRAFT_TOKENS = 4
_FOR_DATA = ("out", "samples", "split", "max_conversations", "batch_rows", "keep_system")


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateArgs(ModelArgs):
    teacher: OptionalPath = None
    """Teacher to compare with, in any of --model's forms; None omits the metrics that need one."""
    teacher_cache: OptionalPath = None
    """Folder that kd_jax.cache wrote, from which the teacher's outputs are read; of the teacher
    only the lm_head is loaded. Also --teacher.cache."""
    teacher_cache_missing: Literal["error", "compute"] = "error"
    """Documents that the cache lacks: stop with their number, or run the teacher on them and add
    them."""
    teacher_system: str | None = None
    """System text that only the teacher sees, or @FILE; also --teacher.system. None: that of the
    run, if --teacher is its teacher; '' removes it."""
    teacher_messages: bool = False
    """Give the teacher the records' teacher_messages; also --teacher.messages."""
    against: OptionalPath = None
    """Second model, in any of --model's forms: differences (model minus against) on the same data
    with 95 % confidence intervals."""
    data: PathText
    """Conversations, in any form that data.path of a run takes."""
    split: str | None = None
    """Split or slice of it, as data.split of a run; None: all of files, test of a folder or hub
    dataset."""
    draft: bool = False
    """Report the expected tokens per pass of --teacher in speculative decoding with --model as the
    draft model, which proposes 4 or 8 tokens at a time: accepted_length_4, accepted_length_8."""
    accuracy: Annotated[int | None, Range(least=1)] = None
    """Answer the first questions of the data greedily, as many as this, and report the share with
    the final number of the data's answer: the number after the last ####, or the last number if
    the data's answer has no ####. None: no answers are generated."""
    max_new_tokens: Annotated[int, Range(least=1)] = 320
    """Most tokens of an answer for --accuracy."""
    top_k: Annotated[int, Range(least=1)] = 10
    """Most likely tokens of student and teacher whose overlap is measured."""
    bootstrap_samples: Annotated[int, Range(least=1)] = 2000
    """Bootstrap resamples of the documents for the intervals of --against."""
    seed: Annotated[int, Range(least=0)] = 0
    """Seed of the bootstrap."""
    json: bool = False
    """Print one JSON object instead of tables."""
    out: OptionalPath = None
    """File to write the JSON object to."""
    save: bool = False
    """Write the JSON object to WORKDIR/evaluation.json; --model must be a workdir."""
    seq_len: Annotated[int | None, Range(least=2)] = None
    """Tokens in a row, to which conversations are truncated; None: the run's, or 2048, and less
    where all conversations are shorter."""
    batch_size: Annotated[int | None, Range(least=1)] = None
    """Rows per batch over all devices; None: as many as the platform scores at a time."""
    chat_template: OptionalPath = None
    """Jinja file to use instead of the tokenizer's own chat template."""
    mesh: MeshConfig = field(default_factory=MeshConfig)
    max_conversations: Annotated[int | None, Range(least=1)] = None
    """Use only the first conversations of the data; None uses all."""

    def check(self, checks: Checks) -> None:
        if self.save and not is_run(Path(self.model).expanduser()):
            checks.refuse("--save", "a workdir as --model", self.model)
        if self.teacher is None and self.draft:
            checks.refuse("--teacher", "the model that checks the drafts, with --draft", None)
        if self.teacher is None and (self.teacher_system or self.teacher_messages):
            checks.refuse("--teacher", "a model with a prompt for the teacher", None)
        if self.teacher_cache is None and self.teacher_cache_missing != "error":
            checks.refuse("--teacher-cache-missing", "error without --teacher-cache", "compute")
        no_folder = self.teacher is None or is_run(Path(self.teacher).expanduser())
        if self.teacher_cache is not None and no_folder:
            checks.refuse("--teacher", "a folder or a hub id with --teacher-cache", self.teacher)


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerateArgs(ModelArgs):
    prompt: tuple[str, ...] = ()
    """User messages; several are answered in one batch."""
    data: OptionalPath = None
    """Data with prompts, in any form that training reads: conversations up to their last answer,
    which may be missing."""
    split: str = "train"
    """Split of the data, or a slice such as train[:100]."""
    max_conversations: Annotated[int | None, Range(least=1)] = None
    """Use only the first records of the data; None uses all."""
    out: OptionalPath = None
    """File of JSON lines for the answers to --data: messages with the answer as the last turn, and
    index, sample, ended, tokens."""
    samples: Annotated[int, Range(least=1)] = 1
    """Answers to each prompt of --data."""
    batch_rows: Annotated[int | None, Range(least=1)] = None
    """Answers to --data that are decoded at once; None: as many as fit a share of the device's
    memory, up to what the platform decodes fast."""
    system: str | None = None
    """System message before each prompt; with --data in place of a record's own."""
    keep_system: bool = True
    """Write --system into the records of --out. With --no-keep-system they have their own turns: a
    student that learns them answers without the message (docs/prompts.md)."""
    raw: bool = False
    """Continue the prompt as text, without a chat template."""
    draft: OptionalPath = None
    """Smaller model, in any of --model's forms, that proposes tokens which --model checks several
    at a time (speculative decoding). The answers have the same distribution."""
    draft_tokens: Annotated[int, Range(least=1)] = DRAFT_TOKENS
    """Tokens that the draft model proposes at a time."""
    max_new_tokens: Annotated[int, Range(least=1)] = 256
    """Most tokens of an answer."""
    temperature: Annotated[float, Range(least=0, below=INF)] = 0.0
    """Sampling temperature; 0 is greedy decoding."""
    top_k: Annotated[int | None, Range(least=1)] = None
    """Sample from the k most likely tokens."""
    top_p: Annotated[float | None, Range(above=0, most=1)] = None
    """Sample from the fewest most likely tokens with this total probability."""
    seed: Annotated[int, Range(least=0, below=2**32)] = 0
    """Seed of the sampling."""
    stop: tuple[str, ...] = ()
    """Texts or special tokens that end an answer, in addition to the model's end tokens; they are
    not printed."""
    chat_template: OptionalPath = None
    """Jinja file to use instead of the tokenizer's own chat template."""
    date: str | None = None
    """Date for chat templates that print today's: 26 Jul 2024 or 2024-07-26; None: the run's, or
    26 Jul 2024."""
    mesh: MeshConfig = field(default_factory=lambda: MeshConfig(data=1, tensor=-1))
    distributed: DistributedConfig = field(default_factory=DistributedConfig)

    def check(self, checks: Checks) -> None:
        if self.data is None:
            if not self.prompt or not all(self.prompt):
                checks.refuse("--prompt", "text", self.prompt)
            for entry in fields(self):
                value = getattr(self, entry.name)
                if entry.name in _FOR_DATA and value != entry.default:
                    flag = f"--{entry.name.replace('_', '-')}"
                    checks.refuse(flag, "--data as well", value)
            if self.distributed != DistributedConfig():
                checks.problems.append("--distributed: expected --data as well, got --prompt")
            if self.raw and (self.system is not None or self.chat_template is not None):
                checks.refuse("--raw", "no --system and no --chat-template", True)
        else:
            if self.prompt:
                checks.refuse("--prompt", "either --prompt or --data", self.prompt)
            if self.out is None:
                checks.refuse("--out", "a file for the answers", self.out)
            if self.raw:
                checks.refuse("--raw", "no --raw with --data", self.raw)
            if self.system is None and not self.keep_system:
                checks.refuse("--no-keep-system", "a --system to leave out", None)
            if self.draft is not None:
                checks.refuse("--draft", "none with --data", self.draft)
        if self.draft is None and self.draft_tokens != DRAFT_TOKENS:
            checks.refuse("--draft-tokens", "--draft as well", self.draft_tokens)
        if self.temperature == 0 and self.samples > 1:
            checks.refuse("--temperature", "above 0 with --samples", 0)
        if self.temperature == 0 and (self.top_k or self.top_p):
            checks.refuse("--temperature", "above 0 with --top-k or --top-p", 0)
        if not all(self.stop):
            checks.refuse("--stop", "text", self.stop)
        if self.date is not None:
            checks.check_date(self.date, "--date")
