"""python -m kd_jax.report RUN...: one HTML page and PNG files that compare runs."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from kd_jax.config.checks import IS_PATH, Checked, PathText
from kd_jax.config.command import parse_args, run_command
from kd_jax.reporting.page import make_report


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportArgs(Checked):
    runs: Annotated[tuple[str, ...], IS_PATH]
    """Workdirs of kd_jax.train. Runs that differ only in their seed form one arm. The flag's name
    is optional: python -m kd_jax.report runs/sweep/*"""
    out: PathText = "report"
    """Folder for the page (index.html) and the PNG files: a new folder, or an earlier report, which
    is replaced."""
    control: str | None = None
    """Run or arm, by the name in the report, to compare the others with. None: for each arm, the
    arm without a teacher that is otherwise like it, or the only arm without a teacher."""
    smooth: int | None = None
    """Optimizer steps in the moving average of training curves. 1: no smoothing. None: 1/30 of the
    longest run."""


def main(argv: Sequence[str]) -> None:
    args = parse_args(ReportArgs, _name_runs(argv), __doc__)
    runs, out = [Path(run) for run in args.runs], Path(args.out).expanduser()
    page = make_report(runs, out, control=args.control, smooth=args.smooth)
    print(f"{page}: open it in a browser; the figures are beside it as PNG files")


def _name_runs(argv: Sequence[str]) -> list[str]:
    """Returns the arguments with one --runs before the folders, wherever they stand."""
    runs, rest = [], []
    words = list(argv)
    while words:
        word = words.pop(0)
        if not word.startswith("-"):
            runs.append(word)
        elif word != "--runs":  # the words after --runs are folders in any case
            rest.append(word)
            if "=" not in word and word not in ("--help", "-h") and words:
                rest.append(words.pop(0))
    return (["--runs", *runs] if runs else []) + rest


if __name__ == "__main__":
    sys.exit(run_command(main))
