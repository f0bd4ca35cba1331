"""Rotary position embedding: its frequencies, and the keys of config.json that set them."""

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from kd_jax.models.config_keys import is_number, show, sort_keys


@dataclass(frozen=True, kw_only=True, slots=True)
class Rope:
    """Rotary position embedding (arXiv 2104.09864)."""

    theta: float
    rope_type: str = "default"
    """default; linear: all frequencies are divided by `factor`; llama3 and yarn: the low ones are;
    none: no rotation."""
    partial_rotary_factor: float = 1.0
    """Share of a head's entries that is rotated, the first ones."""
    attention_factor: float = 1.0
    """Factor of cos and sin."""
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: float = 8192.0
    beta_fast: float = 32.0
    """yarn keeps frequencies that turn this often within the original length."""
    beta_slow: float = 1.0
    """yarn divides frequencies that turn less often than this."""

    def inverse_frequencies(self, head_dim: int) -> np.ndarray:
        """Returns radians per position of each rotated pair, at most [H / 2] float32.

        Llama 3's scaling multiplies wavelengths above original / low_freq_factor by `factor`, keeps
        those below original / high_freq_factor, and interpolates between.
        """
        # Rounded to float32 in the same places as the models' training code: at position 10,000
        # the last bit of a frequency is a thousandth of a radian.
        rotated = int(head_dim * self.partial_rotary_factor)
        exponent = np.arange(0, rotated, 2, dtype=np.float32) / np.float32(rotated)
        power = (self.theta ** exponent.astype(np.float64)).astype(np.float32)
        frequency = np.float32(1) / power
        if self.rope_type == "none":
            frequency = np.zeros_like(frequency)
        if self.rope_type == "linear":
            frequency = frequency / np.float32(self.factor)
        if self.rope_type == "llama3":
            turns = self.original_max_position_embeddings * frequency / np.float32(2 * math.pi)
            blend = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
            blend = np.clip(blend, 0.0, 1.0)
            frequency = (1 - blend) * frequency / self.factor + blend * frequency
        if self.rope_type == "yarn":
            blend = self._yarn_ramp(rotated)
            divided = np.float32(1) / (np.float32(self.factor) * power)
            frequency = blend * divided + (1 - blend) * frequency
        return frequency.astype(np.float32)

    def _yarn_ramp(self, rotated: int) -> np.ndarray:
        """Returns 0 for the frequencies that yarn keeps, 1 for those it divides (2309.00071)."""

        def pair_that_turns(times: float) -> float:
            length = self.original_max_position_embeddings / (times * 2 * math.pi)
            return rotated * math.log(length) / (2 * math.log(self.theta))

        first = max(math.floor(pair_that_turns(self.beta_fast)), 0)
        last = min(math.ceil(pair_that_turns(self.beta_slow)), rotated - 1)
        pairs = np.arange(rotated // 2, dtype=np.float32)
        return np.clip((pairs - first) / max(last - first, 0.001), 0, 1).astype(np.float32)


_LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
# rope_type -> its parameters beside rope_theta.
_FIELDS = {
    "default": (), "linear": ("factor",), "dynamic": ("factor",), "llama3": _LLAMA3,
    "yarn": (
        "factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow",
    ),
}  # fmt: skip
_PARTIAL = ("phi3",)  # families whose heads may be rotated in part
_UNUSED = {"rope_type", "type", "original_max_position_embeddings"}
_LARGEST = float(np.finfo(np.float32).max)
ROPE_KEYS = (
    "rope_theta", "rope_scaling", "rope_parameters", "original_max_position_embeddings",
)  # fmt: skip


def is_positive(value: Any) -> bool:
    """Returns True for a number above 0 that is finite in float32."""
    return is_number(value) and 0 < value <= _LARGEST


def read_rope(config: dict[str, Any], problems: list[str], warnings: list[str]) -> Rope | None:
    """Reads rope_theta with rope_scaling, or transformers 5's rope_parameters."""
    part = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(part, dict):
        problems.append(f"rope_scaling, rope_parameters: expected an object, got {show(part)}")
        return None
    fields = {"rope_theta": config.get("rope_theta", 10000.0)} | part
    share = 1.0
    if config.get("model_type") in _PARTIAL:
        share = fields.pop("partial_rotary_factor", None) or config["partial_rotary_factor"]
        if not is_positive(share) or share > 1:
            problems.append(f"partial_rotary_factor: expected a number up to 1, got {show(share)}")
    kind = part.get("rope_type") or part.get("type") or "default"
    if not isinstance(kind, str) or kind not in _FIELDS:
        problems.append(f"rope_type: expected {'|'.join(_FIELDS)}, got {show(kind)}")
        return None
    fields |= _left_out(kind, fields, config)
    wanted = ("rope_theta", *_FIELDS[kind])
    for key in wanted:
        if not is_positive(fields.get(key)):
            got = show(fields[key]) if key in fields else "none"
            problems.append(f"rope parameter {key}: expected a finite number above 0, got {got}")
    if kind == "llama3" and fields.get("low_freq_factor") == fields.get("high_freq_factor"):
        problems.append("rope parameter high_freq_factor: expected another than low_freq_factor")
    rest = {f"rope parameter {x}": fields[x] for x in fields.keys() - {*wanted, *_UNUSED}}
    rope_problems, rope_warnings = sort_keys(rest, ())
    problems += rope_problems
    warnings += rope_warnings
    if problems:
        return None
    if kind == "dynamic":
        warnings.append(
            "rope_type dynamic: computed without its scaling, as in transformers for texts of at "
            f"most {config.get('max_position_embeddings')} tokens (max_position_embeddings)"
        )
    rope = Rope(theta=float(fields["rope_theta"]), partial_rotary_factor=float(share))
    if kind in ("default", "dynamic") or (kind == "linear" and fields["factor"] == 1):
        return rope
    scaling = {key: float(fields[key]) for key in _FIELDS[kind]}
    return replace(rope, rope_type=kind, **scaling)


def _left_out(kind: str, fields: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """Returns parameters of a rope_type that stand elsewhere or have transformers' defaults."""
    if kind not in ("llama3", "yarn"):
        return {}
    name = "original_max_position_embeddings"
    length = fields.get(name, config.get("max_position_embeddings"))
    length = length if config.get(name) is None else config[name]
    if kind == "llama3":
        return {name: length}
    factor = fields.get("factor")
    scale = 0.1 * math.log(max(factor, 1)) + 1 if is_positive(factor) else 1.0  # type: ignore[type-var, arg-type]
    usual = {"attention_factor": scale, "beta_fast": 32.0, "beta_slow": 1.0}
    return {name: length, **{key: fields.get(key) or value for key, value in usual.items()}}
