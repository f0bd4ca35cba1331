"""The configuration of the data: training rows, and held-out rows of evaluations."""

from dataclasses import dataclass
from typing import Annotated, Literal

from kd_jax.config.checks import Checks, OptionalPath, PathText, Range


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    path: PathText
    """Training data: a file (.json, .jsonl, .ndjson, .csv, .tsv, .txt, .parquet, .arrow; also .gz
    or .zst), a folder or glob of such files, an address such as s3://bucket/file.jsonl, or a
    dataset on the hub: org/name, org/name:subset, org/name@revision, org/name:subset@revision.
    Several with commas are one data set; with weights, as in 'a.jsonl:0.7, b.jsonl:0.3', batches
    draw that share of their rows from each."""
    split: str = "train"
    """Split, or a slice of it: train[:98%], train[98%:], train[:1000]. A file has only the split
    train; the names of a folder's files tell their splits."""
    seq_len: Annotated[int, Range(least=2)] = 2048
    """Tokens in a row."""
    batch_size: Annotated[int, Range(least=1)] = 8
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
    chat_template: OptionalPath = None
    """Jinja file to use instead of the tokenizer's own chat template."""
    max_conversations: Annotated[int | None, Range(least=1)] = None
    """Use only the first conversations of each source; None uses all."""
    cache_dir: PathText = "~/.cache/kd_jax/rows"
    """Folder of tokenized rows, keyed by tokenizer, source and options."""
    num_processes: Annotated[int | None, Range(least=1)] = None
    """Processes that tokenize; None: one per CPU core, at most 16. Changes speed, not results."""

    def check(self, checks: Checks) -> None:
        checks.check_date(self.date, "data.date")


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalConfig:
    path: OptionalPath = None
    """Held-out data, in any form that data.path takes; None disables evaluation."""
    split: str | None = None
    """Split or slice of it, as data.split; None: all of files, test of a folder or hub dataset."""
    fraction: Annotated[float, Range(least=0, below=1)] = 0.0
    """Instead of path: hold out this share of the training data, by a hash of each record, so that
    equal records are on one side whatever the seed."""
    every_steps: Annotated[int, Range(least=1)] = 200
    """Optimizer steps between evaluations; the last step is always evaluated."""
    max_conversations: Annotated[int | None, Range(least=1)] = None
    """Use only the first conversations of each source of path; None uses all."""
    accuracy: Annotated[int, Range(least=0)] = 0
    """Questions of eval.path to answer greedily in each evaluation; eval/accuracy is the share of
    answers with the right final number, such as GSM8K's after ####. 0: none."""
    max_new_tokens: Annotated[int, Range(least=1)] = 256
    """Most tokens of an answer for accuracy."""

    def check(self, checks: Checks) -> None:
        if self.accuracy and self.path is None:
            checks.refuse("eval.accuracy", "0 without eval.path", self.accuracy)
        if self.fraction and not (self.path is None and self.max_conversations is None):
            expected = "0 with eval.path or eval.max-conversations"
            checks.refuse("eval.fraction", expected, self.fraction)
