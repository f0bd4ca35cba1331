"""python -m kd_jax.report RUN...: one HTML page and PNG files that compare runs."""

import base64
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kd_jax.arms import Arm, find_controls, make_arms
from kd_jax.config import UserError
from kd_jax.config.command import parse_args, run_command
from kd_jax.curves import FIGURES, Figure, draw_figures, make_styles, minimises_kl
from kd_jax.runs import read_runs
from kd_jax.tables import (
    Table,
    arms_table,
    config_table,
    cost_table,
    result_tables,
    runs_table,
    setup_table,
)

PAGE = "index.html"
MARK = '<meta name="generator" content="kd_jax.report">'


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


def make_report(
    runs: Sequence[Path],
    out: Path,
    *,
    control: str | None = None,
    smooth: int | None = None,
    title: str = "Distillation runs",
    extra: Sequence[Table] = (),
) -> Path:
    """Writes OUT/index.html and a PNG file a figure; returns the page's path.

    Args:
      runs: workdirs of kd_jax.train.
      control: an arm's name or one of its runs.
      smooth: steps in the moving average of training curves.
      extra: tables to place first.

    Raises:
      UserError: with everything that is wrong with the runs and with `out`.
    """
    problems = []
    if smooth is not None and smooth < 1:
        problems.append(f"--smooth: expected at least 1, got {smooth}")
    if not _is_free(out):
        problems.append(
            f"--out: expected a new folder or an earlier report, got {out}, which holds other files"
        )
    try:
        found = read_runs(runs)
    except UserError as error:
        problems.append(str(error))
    if problems:
        raise UserError("\n".join(problems))
    arms = make_arms(found)
    controls, reason = find_controls(arms, control)
    figures = draw_figures(arms, smooth)
    tables = [
        arms_table(arms, controls),
        *result_tables(arms, controls),
        cost_table(arms),
        runs_table(arms),
        setup_table(arms),
        config_table(arms),
    ]
    page = _render(arms, tables, figures, title=title, reason=reason, extra=extra)
    return _write(out, page, figures)


def _is_free(out: Path) -> bool:
    if not out.exists():
        return True
    if not out.is_dir():
        return False
    page = out / PAGE
    return not any(out.iterdir()) or (page.is_file() and MARK in page.read_text(errors="replace"))


def _render(
    arms: Sequence[Arm],
    tables: Sequence[Table],
    figures: dict[Figure, bytes],
    *,
    title: str,
    reason: str,
    extra: Sequence[Table],
) -> str:
    """Returns the page; the template escapes every text."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(Path(__file__).with_name("report.html").read_text())
    num_runs = sum(len(arm.runs) for arm in arms)
    left = num_runs - sum(len(arm.finished) for arm in arms)
    return template.render(
        title=title,
        num_runs=num_runs,
        num_arms=len(arms),
        num_unfinished=left,
        reason=reason,
        styles=make_styles(arms),
        extra=[(table, spread_widths(table)) for table in extra],
        tables=[(table, spread_widths(table)) for table in tables],
        figures=[
            (figure, base64.b64encode(image).decode(), _caption(figure, arms))
            for figure, image in figures.items()
        ],
    )


def spread_widths(table: Table) -> list[int | None]:
    """Returns for each column the characters of its longest ` ± b`; None for a column of words.

    The first column names the row, be it by a number.
    """
    widths: list[int | None] = [None]
    for cells in list(zip(*table.rows, strict=True))[1:]:
        numeric = all(cell in ("", "–") or cell.lstrip("+−-")[:1].isdigit() for cell in cells)
        longest = max(
            (len(cell.partition(" ± ")[2]) + 3 for cell in cells if " ± " in cell), default=0
        )
        widths.append(longest if numeric else None)
    return widths


def _caption(figure: Figure, arms: Sequence[Arm]) -> str:
    """Returns what a reader must know about a figure besides its title."""
    losses = {str(sorted(arm.runs[0].record["config"]["loss"].items())) for arm in arms}
    if figure.column == "loss" and len(losses) > 1:
        return "The arms minimise different losses: compare cross-entropy and KL instead."
    distilled = [run for arm in arms for run in arm.runs if run.distils]
    if figure.column == "kd_loss" and not all(map(minimises_kl, distilled)):
        return "Runs that minimise something else, or this at a temperature, have no curve here."
    return ""


def _write(out: Path, page: str, figures: dict[Figure, bytes]) -> Path:
    """Writes the page last; figures of an earlier report that this one lacks are removed."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        for figure in FIGURES:
            (out / f"{figure.file}.png").unlink(missing_ok=True)
        for figure, image in figures.items():
            (out / f"{figure.file}.png").write_bytes(image)
        (out / PAGE).write_text(page, encoding="utf-8")
    except OSError as error:
        raise UserError(f"--out: {out} cannot be written ({error})") from None
    return out / PAGE


if __name__ == "__main__":
    sys.exit(run_command(main))
