"""The configuration of the loss."""

import dataclasses
from dataclasses import dataclass, field
from typing import Annotated, Literal

from kd_jax.config.checks import INF, Checks, Range, Share, metadata


@dataclass(frozen=True, kw_only=True, slots=True)
class Compat:
    """The conventions under which another system reports its distillation loss."""

    divergences: tuple[str, ...]
    """The divergences that it has, by LossConfig's names."""
    scale_by_t2: bool
    fixed: dict[str, float] = field(default_factory=dict)
    """Fields of LossConfig whose value it fixes."""


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


class UsedBy(tuple[str, ...]):
    """The divergences that use a field, as metadata of its type."""

    def __str__(self) -> str:
        return f"only for {', '.join(self)}"


Positive = Range(above=0, below=INF)
Finite = Range(above=-INF, below=INF)
NEAR_END = 0.05  # distance of jsd_beta to 0 or 1; the divergence has shrunk to about this share


@dataclass(frozen=True, kw_only=True, slots=True)
class LossConfig:
    """loss = (1 - kd_ratio) * cross-entropy + kd_ratio * divergence, nats per target token."""

    kd_ratio: Annotated[float, Share] = 0.5
    """Weight of the divergence; the cross-entropy on the labels gets the rest. 0 is plain
    fine-tuning and loads no teacher."""
    kd_ratio_end: Annotated[float | None, Share] = None
    """kd_ratio at the end of the schedule and in evaluations; None keeps kd_ratio constant."""
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
        "nla",
        "lk_hybrid",
    ] = "forward_kl"
    """Divergence between teacher and student to minimise; docs/losses.md defines each."""
    symmetric_weight: Annotated[float, Share, UsedBy(["symmetric_kl"])] = 0.5
    """Weight of the forward KL; the reverse KL gets the rest."""
    jsd_beta: Annotated[float, Share, UsedBy(["jsd", "jsd_cross"])] = 0.5
    """Weight of the teacher in the mixture: 0 is the forward KL, 1 the reverse KL. Near 0 and 1 jsd
    vanishes; jsd_cross is continuous there."""
    skew_alpha: Annotated[
        float, Range(least=0, below=1), UsedBy(["skew_forward_kl", "skew_reverse_kl"])
    ] = 0.1
    """Share of the first distribution (skew_forward_kl: teacher, skew_reverse_kl: student) that is
    mixed into the second; 0 is the plain KL."""
    akl_mass: Annotated[float, Range(above=0, below=1), UsedBy(["adaptive_kl"])] = 0.5
    """Probability mass of the teacher's head, its most likely tokens. The forward KL is weighted by
    the head's share of the absolute errors."""
    ab_alpha: Annotated[float, Finite, UsedBy(["alpha_beta"])] = 0.2
    """Power of the teacher's probabilities; 1 with ab-beta 0 is the forward KL."""
    ab_beta: Annotated[float, Finite, UsedBy(["alpha_beta"])] = 0.7
    """Power of the student's probabilities; 1 with ab-alpha 0 is the reverse KL."""
    temperature: Annotated[float, Positive] = 1.0
    """Divides both models' logits in the divergence, never in the cross-entropy."""
    temperature_end: Annotated[float | None, Positive] = None
    """temperature at the end of the schedule and in evaluations; None keeps it constant."""
    scale_by_t2: bool | None = None
    """Multiply the divergence and its gradient by temperature squared; None follows compat, and is
    False with compat none."""
    compat: Literal["none", "torchtune", "trl", "distillkit", "maxtext"] = "none"
    """System whose conventions kd_loss and loss follow, for the divergences that it has."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Shape of the change of kd_ratio and temperature from the first optimizer step to their end
    values."""
    schedule_steps: Annotated[int | None, Range(least=2)] = None
    """Optimizer steps of the schedule; None: all steps of the run."""
    chunk_tokens: Annotated[int | None, Range(least=1)] = None
    """Tokens per device whose logits are in memory at a time, for both models. None: the
    device's default. Changes memory and speed, not results."""

    def check(self, checks: Checks) -> None:
        ends = "loss.kd-ratio-end or loss.temperature-end"
        checks.check_schedule(self, "loss", self.is_scheduled, ends)
        self._check_divergence(checks)
        if self.compat != "none":
            self._check_compat(checks)

    def _check_divergence(self, checks: Checks) -> None:
        for entry in dataclasses.fields(self):
            flag, value = f"loss.{entry.name}".replace("_", "-"), getattr(self, entry.name)
            for users in metadata(entry.type):
                unused = isinstance(users, UsedBy) and self.divergence not in users
                if unused and value != entry.default:
                    expected = f"{entry.default}, its default, with divergence {self.divergence}"
                    checks.refuse(flag, expected, value)
        total = self.ab_alpha + self.ab_beta
        if not total >= 0:  # NaN as well
            checks.refuse("loss.ab-alpha", "ab-alpha + ab-beta at least 0", total)

    def _check_compat(self, checks: Checks) -> None:
        system, beside = COMPATS[self.compat], f"with loss.compat {self.compat}"
        if self.divergence not in system.divergences:
            expected = f"{'|'.join(system.divergences)} {beside}"
            checks.refuse("loss.divergence", expected, self.divergence)
        if self.scale_by_t2 not in (None, system.scale_by_t2):
            expected = f"{system.scale_by_t2} {beside}"
            checks.refuse("loss.scale-by-t2", expected, self.scale_by_t2)
        for name, only in system.fixed.items():
            for field_name in (name, f"{name}_end"):
                value = getattr(self, field_name, None)  # only the temperature has an end
                if value not in (None, only):
                    flag = f"loss.{field_name}".replace("_", "-")
                    checks.refuse(flag, f"{only} {beside}", value)

    @property
    def warning(self) -> str | None:
        """A warning about a valid value that is probably a mistake."""
        beta = self.jsd_beta
        if self.divergence != "jsd" or beta in (0, 1) or NEAR_END <= beta <= 1 - NEAR_END:
            return None
        return (
            f"loss.jsd-beta {beta} is near {round(beta)}, where jsd vanishes (at {round(beta)} "
            "itself it is a KL); jsd_cross is continuous there"
        )

    @property
    def is_scheduled(self) -> bool:
        return self.kd_ratio_end is not None or self.temperature_end is not None
