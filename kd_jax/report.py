"""python -m kd_jax.report RUN...: one HTML page and PNG files that compare runs."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kd_jax.config.command import parse_args, run_command
from kd_jax.reporting.page import make_report


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportArgs:
    runs: tuple[str, ...]
    """Workdirs of kd_jax.train. Those that differ in their seed alone are one arm. The flag's name
    may be left out: python -m kd_jax.report runs/sweep/*"""
    out: str = "report"
    """Folder of the page (index.html) and of the PNG files: a new one, or that of an old report,
    which is replaced."""
    control: str | None = None
    """Run, or arm by the name that the report shows, that the others are compared with; None takes
    for each the arm without a teacher that is otherwise like it, or the only such arm."""
    smooth: int | None = None
    """Optimizer steps in the moving average of training curves; None takes a thirtieth of the
    longest run, 1 draws what was logged."""


def main(argv: Sequence[str]) -> None:
    prog = "python -m kd_jax.report"
    args = parse_args(ReportArgs, _name_runs(argv), prog=prog, description=__doc__)
    page = make_report(
        [Path(run) for run in args.runs],
        Path(args.out).expanduser(),
        control=args.control,
        smooth=args.smooth,
    )
    print(f"{page}: open it in a browser; the figures are beside it as PNG files")


def _name_runs(argv: Sequence[str]) -> list[str]:
    """Returns the arguments with --runs before the folders, which may stand first or last."""
    runs, rest = [], []
    words = list(argv)
    while words:
        word = words.pop(0)
        if not word.startswith("-"):
            runs.append(word)
            continue
        rest.append(word)
        if word == "--runs":
            while words and not words[0].startswith("--"):
                runs.append(words.pop(0))
            rest.pop()
        elif "=" not in word and word not in ("--help", "-h") and words:
            rest.append(words.pop(0))
    return (["--runs", *runs] if runs else []) + rest


if __name__ == "__main__":
    sys.exit(run_command(main))
