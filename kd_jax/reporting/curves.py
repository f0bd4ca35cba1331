"""Curves over optimizer steps as PNG images: one figure for each metric, one line style per arm."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kd_jax.reporting.arms import Arm, label_names
from kd_jax.workdir.history import Run

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, slots=True)
class Figure:
    """A metric to draw over the training steps, or over the evaluations."""

    file: str
    title: str
    unit: str
    column: str
    held_out: bool = False
    scale: float = 1.0


NATS, PERCENT = "nats per target token", "% of target tokens"
KL, AGREEMENT = "KL(teacher ‖ student)", "Top-1 agreement"
FIGURES = (
    Figure("loss", "Loss, training", NATS, "loss"),
    Figure("loss_held_out", "Loss, held-out", NATS, "loss", held_out=True),
    Figure("ce", "Cross-entropy, training", NATS, "ce_loss"),
    Figure("ce_held_out", "Cross-entropy, held-out", NATS, "ce", held_out=True),
    Figure("kl", f"{KL}, training", NATS, "kd_loss"),
    Figure("kl_held_out", f"{KL}, held-out", NATS, "kl_forward", held_out=True),
    Figure("agreement", f"{AGREEMENT}, training", PERCENT, "top1_agreement", scale=100),
    Figure("agreement_held_out", f"{AGREEMENT}, held-out", PERCENT, "top1_agreement", True, 100),
    Figure("throughput", "Throughput", "thousand tokens a second", "tokens_per_second", scale=1e-3),
    Figure("grad_norm", "Gradient norm", "before clipping", "grad_norm"),
    Figure("learning_rate", "Learning rate", "of AdamW", "learning_rate"),
)
# Distinct with any colour vision: Okabe and Ito's set, with a wine red in place of its yellow.
COLOURS = (
    "#1a1a1a", "#0072b2", "#d55e00", "#009e73", "#e69f00", "#cc79a7", "#56b4e9", "#7b1e3c",
)  # fmt: skip
DASHES = ("", "5 2", "1.5 1.5", "6 2 1.5 2")
MARKERS = "os^D"
RC: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 8.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#8a8a8a",
    "axes.linewidth": 0.8,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.7,
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "text.color": "#1a1a1a",
    "axes.labelcolor": "#444444",
    "lines.solid_capstyle": "round",
}


@dataclass(frozen=True, slots=True)
class Style:
    colour: str
    dash: str
    """Lengths of dashes and gaps in points, as in SVG; empty for a solid line."""
    marker: str

    @property
    def line(self) -> dict[str, Any]:
        """Returns matplotlib's arguments for a line."""
        dashes = tuple(map(float, self.dash.split()))
        return {"color": self.colour, "linestyle": (0, dashes) if dashes else "-"}


def make_styles(arms: Sequence[Arm]) -> list[Style]:
    """Returns a style for each arm; of two fields, one sets the colour and the other the dashes."""
    fields = list(arms[0].values)
    kinds = [list(dict.fromkeys(arm.values[name] for arm in arms)) for name in fields]
    pairs = [(i % len(COLOURS), i // len(COLOURS) % len(DASHES)) for i in range(len(arms))]
    if len(fields) == 2 and len(arms) > 3:
        many, few = sorted((0, 1), key=lambda k: -len(kinds[k]))
        if len(kinds[many]) <= len(COLOURS) and len(kinds[few]) <= len(DASHES):
            positions = [
                [kind.index(arm.values[f]) for f, kind in zip(fields, kinds, strict=True)]
                for arm in arms
            ]
            pairs = [(position[many], position[few]) for position in positions]
    return [Style(COLOURS[colour], DASHES[dash], MARKERS[dash]) for colour, dash in pairs]


def draw_figures(arms: Sequence[Arm], smooth: int | None) -> dict[Figure, bytes]:
    """Returns a PNG of each figure for which any run has values.

    Args:
      smooth: steps in the moving average of training curves; None: 1/30 of the longest run.
    """
    import matplotlib  # takes seconds, which --help avoids

    longest = max(run.last_step for arm in arms for run in arm.runs)
    width = max(1, longest // 30) if smooth is None else smooth
    with matplotlib.rc_context(RC):
        return {
            figure: _draw(figure, arms, width, longest)
            for figure in FIGURES
            if any(len(curve(run, figure)) for arm in arms for run in arm.runs)
        }


def curve(run: Run, figure: Figure) -> "pd.Series":
    """Returns the finite values by step; an empty series where the run has no such metric."""
    import pandas as pd

    values = (run.held_out if figure.held_out else run.train).get(figure.column)
    if values is None or (figure.column == "kd_loss" and not minimises_kl(run)):
        return pd.Series(dtype=float)
    return values[np.isfinite(values)] * figure.scale


def minimises_kl(run: Run) -> bool:
    """Returns True where a run's kd_loss is KL(teacher || student)."""
    loss = run.config.loss
    plain = loss.temperature == 1 and loss.temperature_end in (None, 1)
    plain = plain and loss.compat != "torchtune"  # whose forward KL is a cross-entropy
    return loss.divergence == "forward_kl" and plain


def moving_average(values: "pd.Series", width: int) -> "pd.Series":
    """Returns the mean over the `width` steps around each step.

    Near the first step, where curves are steep, the window shrinks on both sides; near the last
    step, only on the right.
    """
    import pandas as pd

    steps, index = values.index.to_numpy(), np.arange(len(values))
    before = index - np.searchsorted(steps, steps - width / 2, side="left")
    after = np.searchsorted(steps, steps + width / 2, side="right") - 1 - index
    after = np.minimum(before, after)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    means = (sums[index + after + 1] - sums[index - before]) / (before + after + 1)
    return pd.Series(means, index=values.index)


def mean_of(curves: Sequence["pd.Series"]) -> "pd.Series":
    """Returns the mean over runs at their common steps; the first run if there are none."""
    import pandas as pd

    common = pd.concat(curves, axis=1, join="inner")
    return curves[0] if common.empty else common.mean(axis=1)


def _draw(figure: Figure, arms: Sequence[Arm], width: int, longest: int) -> bytes:
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=(5.0, max(3.2, 1.2 + 0.15 * len(arms))), layout="constrained", dpi=200)
    axes: Any = canvas.add_subplot()
    if figure.held_out or figure.column == "learning_rate":
        width = 1
    faint = 0.1 if len(arms) > 4 else 0.22
    ends: list[tuple[float, float, Style, str]] = []
    drawn: list[pd.Series] = []
    for arm, style in zip(arms, make_styles(arms), strict=True):
        curves = _draw_runs(axes, figure, arm, style, width, faint)
        if curves:
            ends.append((*_draw_mean(axes, figure, arm, curves, style), style, _end_label(arm)))
            drawn += curves.values()
    axes.set_ylim(*limits(drawn, longest))  # spikes of the raw values may lie outside
    axes.set_xlim(0, longest)
    axes.set_xlabel("optimizer steps")
    axes.set_title(figure.title, loc="left", fontsize=10.5, fontweight="bold", pad=18)
    names = label_names(arms)
    unit = f"{figure.unit}, by {names}" if names else figure.unit
    above = {"xycoords": "axes fraction", "textcoords": "offset points"}
    axes.annotate(unit, (0, 1), (0, 6), color="#555555", **above)
    if len(arms) > 1:
        _label_ends(canvas, axes, ends)
    file = io.BytesIO()
    canvas.savefig(file, format="png", facecolor="white")
    return file.getvalue()


def _draw_runs(
    axes, figure: Figure, arm: Arm, style: Style, width: int, faint: float
) -> dict[Path, "pd.Series"]:
    """Draws an arm's runs as thin lines; returns their smoothed curves by folder."""
    smoothed = {}
    for run in arm.runs:
        values = curve(run, figure)
        if values.empty:
            continue
        smoothed[run.folder] = moving_average(values, width)
        if not figure.held_out:
            axes.plot(values, color=style.colour, linewidth=0.6, alpha=faint)
        if len(arm.runs) > 1:
            axes.plot(smoothed[run.folder], color=style.colour, linewidth=0.7, alpha=0.45)
    return smoothed


def _draw_mean(
    axes, figure: Figure, arm: Arm, curves: dict[Path, "pd.Series"], style: Style
) -> tuple[float, float]:
    """Draws the mean of the finished runs, or of all if none is; returns its last point."""
    marks: dict[str, Any] = {}
    if figure.held_out:
        marks = {"marker": style.marker, "markersize": 3.6, "markeredgewidth": 0, "clip_on": False}
    finished = [curves[run.folder] for run in arm.finished if run.folder in curves]
    mean = mean_of(finished or list(curves.values()))
    axes.plot(mean, linewidth=1.7, **style.line, **marks)
    return mean.index[-1], mean.iloc[-1]


def _end_label(arm: Arm) -> str:
    left = len(arm.runs) - len(arm.finished)
    if not left:
        return arm.label
    return f"{arm.label} ({'' if left == len(arm.runs) else f'{left} '}unfinished)"


def limits(curves: Sequence["pd.Series"], longest: int) -> tuple[float, float]:
    """Returns the range of the y axis.

    The first twentieth of the longest run is ignored if the values after it cover less than a third
    of the range.
    """
    whole = np.concatenate(curves)
    rest = np.concatenate([values[values.index > longest / 20] for values in curves])
    shown = rest if len(rest) and np.ptp(whole) > 3 * np.ptp(rest) > 0 else whole
    low, high = float(shown.min()), float(shown.max())
    margin = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    return low - margin, high + margin


def _label_ends(canvas, axes, ends: Sequence[tuple[float, float, Style, str]]) -> None:
    """Writes each arm's label right of the axes, as near as possible to the end of its curve."""
    low, high = axes.get_ylim()
    last = axes.get_xlim()[1]
    levels = [(y - low) / (high - low) for _, y, _, _ in ends]
    size = canvas.get_size_inches()[1] - 0.95  # inches of the axes, below titles and above ticks
    box = {"transform": axes.transAxes, "clip_on": False}
    for (x, _, style, label), level, height in zip(
        ends, levels, spread(levels, 0.145 / size), strict=True
    ):
        axes.plot(
            [x / last, 1.04], [level, height], color="#bdbdbd", linewidth=0.6, zorder=1, **box
        )
        axes.plot([1.045, 1.105], [height, height], linewidth=1.7, **style.line, **box)
        axes.text(1.12, height, label, va="center", transform=axes.transAxes)


def spread(wanted: Sequence[float], gap: float) -> np.ndarray:
    """Returns positions in [0, 1] at least `gap` apart, in the order wanted and as near to it."""
    from scipy.optimize import isotonic_regression

    order = np.argsort(wanted, kind="stable")
    offsets = gap * np.arange(len(order))
    lowest = isotonic_regression(np.asarray(wanted)[order] - offsets).x
    found = np.empty(len(order))
    found[order] = np.clip(lowest, 0.0, max(0.0, 1.0 - offsets[-1])) + offsets
    return found
