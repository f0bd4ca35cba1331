"""Runs compared on one HTML page."""

import base64
from collections.abc import Sequence
from pathlib import Path

from kd_jax.config import UserError
from kd_jax.config.errors import raise_all
from kd_jax.reporting.arms import Arm, find_controls, make_arms
from kd_jax.reporting.curves import FIGURES, Figure, draw_figures, make_styles, minimises_kl
from kd_jax.reporting.provenance import config_table, setup_table
from kd_jax.reporting.tables import Table, arms_table, cost_table, result_tables, runs_table
from kd_jax.reporting.teacher_cost import shared_table
from kd_jax.reporting.texts import samples_tables
from kd_jax.workdir.history import read_runs

PAGE = "index.html"
MARK = '<meta name="generator" content="kd_jax.report">'


def make_report(
    runs: Sequence[Path],
    out: Path,
    *,
    control: str | None = None,
    smooth: int | None = None,
    title: str = "Distillation runs",
    extra: Sequence[Table] = (),
) -> Path:
    """Writes OUT/index.html and a PNG file for each figure; returns the page's path.

    Args:
      runs, control, smooth: as in report.ReportArgs.
      extra: tables to place first.

    Raises:
      UserError: lists every problem of the runs and of `out`.
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
    raise_all(problems)
    arms = make_arms(found)
    controls, reason = find_controls(arms, control)
    figures = draw_figures(arms, smooth)
    tables: dict[str, list[Table]] = {
        "extra": list(extra),
        "results": [arms_table(arms, controls), *result_tables(arms, controls)],
        "details": [cost_table(arms), *shared_table(found), runs_table(arms), setup_table(arms)],
        "samples": samples_tables(arms),
        "config": [config_table(arms)],
    }
    return _write(out, _render(arms, tables, figures, title, reason), figures)


def _is_free(out: Path) -> bool:
    """Returns True for a folder that is new or empty or holds an earlier report."""
    if not out.is_dir():
        return not out.exists()
    page = out / PAGE
    return not any(out.iterdir()) or (page.is_file() and MARK in page.read_text(errors="replace"))


def _render(
    arms: Sequence[Arm],
    tables: dict[str, list[Table]],
    figures: dict[Figure, bytes],
    title: str,
    reason: str,
) -> str:
    """Returns the page. The template escapes every text."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(Path(__file__).with_name("report.html").read_text())
    images = {figure: base64.b64encode(image).decode() for figure, image in figures.items()}
    return template.render(
        title=title,
        reason=reason,
        num_runs=sum(len(arm.runs) for arm in arms),
        num_arms=len(arms),
        num_unfinished=sum(len(arm.runs) - len(arm.finished) for arm in arms),
        styles=make_styles(arms),
        spread_widths=spread_widths,
        figures=[(figure, image, _caption(figure, arms)) for figure, image in images.items()],
        **tables,
    )


def spread_widths(table: Table) -> list[int | None]:
    """Returns the width of each column's longest ` ± b` in characters; None for text columns.

    The first column, which names the row, counts as text.
    """
    widths: list[int | None] = [None]
    for cells in list(zip(*table.rows, strict=True))[1:]:
        numeric = all(cell in ("", "–") or cell.lstrip("+−-")[:1].isdigit() for cell in cells)
        longest = max((len(cell) - cell.index(" ± ") for cell in cells if " ± " in cell), default=0)
        widths.append(longest if numeric else None)
    return widths


def _caption(figure: Figure, arms: Sequence[Arm]) -> str:
    """Returns a warning for readers of a figure, or nothing."""
    losses = {arm.runs[0].config.loss for arm in arms}
    if figure.column == "loss" and len(losses) > 1:
        return "The arms minimise different losses: compare cross-entropy and KL instead."
    distilled = [run for arm in arms for run in arm.runs if run.config.distils]
    if figure.column == "kd_loss" and not all(map(minimises_kl, distilled)):
        return "Without runs that minimise another divergence, or this one at a temperature."
    return ""


def _write(out: Path, page: str, figures: dict[Figure, bytes]) -> Path:
    """Removes the figures of an earlier report, writes the new ones, and the page last."""
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
