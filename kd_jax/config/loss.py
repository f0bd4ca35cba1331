"""The configuration of the loss."""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Literal

from kd_jax.config.errors import Checks


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

    def check(self, checks: Checks) -> None:
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

    def _check_schedule(self, checks: Checks) -> None:
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

    def _check_divergence(self, checks: Checks) -> None:
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

    def _check_compat(self, checks: Checks) -> None:
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
