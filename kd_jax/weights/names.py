"""Hugging Face names of weights, and whether a folder has exactly those."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from kd_jax.config import UserError

EMBEDDING = "model.embed_tokens.weight"


def check_shapes(
    shapes: Mapping[str, tuple[int, ...]],
    expected: Mapping[str, tuple[int, ...]],
    place: Path,
    problems: Sequence[str] = (),
) -> None:
    lines = [f"missing: {n} {list(expected[n])}" for n in sorted(expected.keys() - shapes)]
    lines += [f"unexpected: {n} {list(shapes[n])}" for n in sorted(shapes.keys() - expected)]
    for name in sorted(expected.keys() & shapes.keys()):
        want, got = list(expected[name]), list(shapes[name])
        if got != want:
            lines.append(f"misshapen: {name}: expected {want}, got {got}")
    lines += problems
    if lines:
        raise UserError(f"{place}: the tensors do not fit config.json:\n  " + "\n  ".join(lines))
