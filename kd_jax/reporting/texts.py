"""Samples of on-policy runs as a table of a report. Needs no jax."""

from collections.abc import Sequence
from typing import Any

from kd_jax.reporting.arms import Arm
from kd_jax.reporting.tables import Table
from kd_jax.weights.files import read_lines

_FIRST, _LAST = 2, 4  # samples of a run that are shown
_MOST_CHARACTERS = 600


def samples_tables(arms: Sequence[Arm]) -> list[Table]:
    """Returns a table of samples of each arm's first run; none where no run has samples."""
    rows = []
    for arm in arms:
        lines = read_lines(arm.runs[0].folder / "samples.jsonl", ["step"])
        found = [sample for _, sample in lines if sample and _is_whole(sample)]
        shown = found if len(found) <= _FIRST + _LAST else found[:_FIRST] + found[-_LAST:]
        rows += [[arm.label, *_cells(one)] for one in shown]
    header = ["arm", "step", "prompt", "answer", "ended", "log-probability a token"]
    note = "The first and the last samples of the first run of each arm, with special tokens."
    return [Table(title="Samples", header=header, rows=rows, note=note)] if rows else []


def _is_whole(sample: dict[str, Any]) -> bool:
    return isinstance(sample.get("log_prob"), int | float)


def _cells(sample: dict[str, Any]) -> list[str]:
    prompt, answer = (str(sample.get(name, "")) for name in ("prompt", "answer"))
    ended = "yes" if sample.get("ended") else "no"
    # A cell's part after the sign would be a spread.
    shown = [
        text.replace(" ± ", " ±\N{NO-BREAK SPACE}")
        for text in (prompt[-_MOST_CHARACTERS:], answer[:_MOST_CHARACTERS])
    ]
    return [str(sample["step"]), *shown, ended, f"{sample['log_prob']:.3f}"]
