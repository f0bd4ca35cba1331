"""The configuration of on-policy distillation."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from kd_jax.config.checks import INF, Checks, Range, Share

LEAST_PROMPT = 2
"""Tokens of a prompt, at least; a text of its own has none or a begin of text."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OnPolicyConfig:
    """On-policy distillation (GKD, arXiv 2306.13649): a share of each step's rows is sampled from
    the student, and its loss there is the divergence alone."""

    fraction: Annotated[float, Share] = 0.0
    """Share of each step's rows that the student samples, GKD's lambda; the others are the data's.
    0 samples nothing."""
    fraction_end: Annotated[float | None, Share] = None
    """fraction at the end of the schedule; None keeps it constant."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Shape of the change of fraction from the first optimizer step to its end value."""
    schedule_steps: Annotated[int | None, Range(least=2)] = None
    """Optimizer steps of the schedule; None: all steps of the run."""
    max_new_tokens: Annotated[int, Range(least=1)] = 256
    """Most tokens of a sampled answer. Rows are filled with prompts that leave room for as many."""
    temperature: Annotated[float, Range(least=0, below=INF)] = 1.0
    """Temperature of sampling; 0 is greedy decoding. The loss has its own, loss.temperature."""
    top_p: Annotated[float | None, Range(above=0, most=1)] = None
    """Sample from the fewest most likely tokens with this total probability."""
    every_steps: Annotated[int, Range(least=1)] = 1
    """Optimizer steps between drawings; in between, the last samples are used again."""
    log_samples: Annotated[int, Range(least=0)] = 50
    """Optimizer steps between drawings of which a few samples are written as text to
    WORKDIR/samples.jsonl; 0 writes none."""

    def check(self, checks: Checks) -> None:
        has_end = self.fraction_end is not None
        checks.check_schedule(self, "on-policy", has_end, "on-policy.fraction-end")
        if self.temperature <= 0 and self.top_p is not None:
            checks.refuse("on-policy.temperature", "above 0 with on-policy.top-p", 0)

    def check_run(self, checks: Checks, config: Any) -> None:
        """Checks the other parts of an on-policy run's Config."""
        name, share, data = "on-policy.fraction", self.highest_fraction, config.data
        if config.teacher is None or config.loss.kd_ratio == 0:
            checks.refuse(name, "0 without a teacher or with loss.kd-ratio 0", share)
        if config.reads_cache:
            checks.refuse(
                name, "0 with teacher.cache: a stored teacher cannot score new text", share
            )
        if data.train_on != "assistant":
            checks.refuse(name, "0 with data.train-on all: prompts are what has no loss", share)
        if share * data.batch_size < 0.5:
            checks.refuse(name, f"at least a row of data.batch-size {data.batch_size}", share)
        if self.max_new_tokens > (longest := data.seq_len - LEAST_PROMPT):
            expected = f"at most {longest}, for which data.seq-len {data.seq_len} has room"
            checks.refuse("on-policy.max-new-tokens", expected, self.max_new_tokens)

    @property
    def highest_fraction(self) -> float:
        return max(self.fraction, self.fraction_end or 0.0)
