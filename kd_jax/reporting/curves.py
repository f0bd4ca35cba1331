"""Curves over optimizer steps as PNG images: one figure a metric, one colour an arm."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kd_jax.reporting.arms import Arm, label_names
from kd_jax.workdir.history import Run


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """What is drawn: a column of the training steps, or of the evaluations."""

    file: str
    title: str
    unit: str
    column: str
    held_out: bool = False
    scale: float = 1.0


Curve = tuple[np.ndarray, np.ndarray]  # steps [P] and values [P]


NATS = "nats per target token"


FIGURES = (
    Figure(file="loss", title="Loss, training", unit=NATS, column="loss"),
    Figure(file="loss_held_out", title="Loss, held-out", unit=NATS, column="loss", held_out=True),
    Figure(file="ce", title="Cross-entropy, training", unit=NATS, column="ce_loss"),
    Figure(
        file="ce_held_out", title="Cross-entropy, held-out", unit=NATS, column="ce", held_out=True
    ),
    Figure(file="kl", title="KL(teacher ‖ student), training", unit=NATS, column="kd_loss"),
    Figure(
        file="kl_held_out",
        title="KL(teacher ‖ student), held-out",
        unit=NATS,
        column="kl_forward",
        held_out=True,
    ),
    Figure(
        file="agreement",
        title="Top-1 agreement, training",
        unit="% of target tokens",
        column="top1_agreement",
        scale=100,
    ),
    Figure(
        file="agreement_held_out",
        title="Top-1 agreement, held-out",
        unit="% of target tokens",
        column="top1_agreement",
        held_out=True,
        scale=100,
    ),
    Figure(
        file="throughput",
        title="Throughput",
        unit="thousand tokens a second",
        column="tokens_per_second",
        scale=1e-3,
    ),
    Figure(file="grad_norm", title="Gradient norm", unit="before clipping", column="grad_norm"),
    Figure(file="learning_rate", title="Learning rate", unit="of AdamW", column="learning_rate"),
)


# Told apart with any colour vision (Okabe and Ito's set, its yellow replaced by a wine red).
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


@dataclass(frozen=True, kw_only=True, slots=True)
class Style:
    colour: str
    dash: str
    """Lengths of strokes and gaps in points, as SVG writes them; empty for a solid line."""
    marker: str


def make_styles(arms: Sequence[Arm]) -> list[Style]:
    """Returns a style for each arm; two fields get a property each: colour and dashes."""
    fields = list(arms[0].values)
    kinds = [list(dict.fromkeys(arm.values[name] for arm in arms)) for name in fields]
    styles = []
    for i, arm in enumerate(arms):
        colour, dash = i % len(COLOURS), i // len(COLOURS) % len(DASHES)
        if len(fields) == 2 and len(arms) > 3:
            many, few = sorted((0, 1), key=lambda k: -len(kinds[k]))
            if len(kinds[many]) <= len(COLOURS) and len(kinds[few]) <= len(DASHES):
                colour = kinds[many].index(arm.values[fields[many]])
                dash = kinds[few].index(arm.values[fields[few]])
        styles.append(Style(colour=COLOURS[colour], dash=DASHES[dash], marker=MARKERS[dash]))
    return styles


def draw_figures(arms: Sequence[Arm], smooth: int | None) -> dict[Figure, bytes]:
    """Returns a PNG for each figure that any run has values for.

    Args:
      smooth: steps in the moving average of training curves; None takes a thirtieth of a run.
    """
    import matplotlib  # seconds that --help need not pay

    with matplotlib.rc_context(RC):
        return {
            figure: _draw(figure, arms, smooth)
            for figure in FIGURES
            if any(len(series(run, figure)[0]) for arm in arms for run in arm.runs)
        }


def series(run: Run, figure: Figure) -> Curve:
    """Returns steps [P] and values [P] of a run; none where the run's column is something else."""
    columns = run.held_out if figure.held_out else run.train
    values = columns.get(figure.column)
    if values is None or (figure.column == "kd_loss" and not minimises_kl(run)):
        return np.zeros(0), np.zeros(0)
    known = np.isfinite(values)
    return columns["step"][known], values[known] * figure.scale


def minimises_kl(run: Run) -> bool:
    """Tells whether kd_loss of a run is KL(teacher || student), which others may not be."""
    loss = run.record["config"]["loss"]
    plain = loss["temperature"] == 1 and loss.get("temperature_end") in (None, 1)
    plain = plain and loss.get("compat") != "torchtune"  # whose forward KL is a cross-entropy
    return loss["divergence"] == "forward_kl" and plain


def moving_average(steps: np.ndarray, values: np.ndarray, width: int) -> np.ndarray:
    """Returns the mean over the `width` steps around each step.

    Near the first step, where curves are steep, the window shrinks from both sides; near the last
    it only lacks the steps that are not there.
    """
    index = np.arange(len(steps))
    before = index - np.searchsorted(steps, steps - width / 2, side="left")
    after = np.searchsorted(steps, steps + width / 2, side="right") - 1 - index
    after = np.minimum(before, after)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    return (sums[index + after + 1] - sums[index - before]) / (before + after + 1)


def mean_of(curves: Sequence[Curve]) -> Curve:
    """Returns the mean over runs at the steps that all of them have; one run's where none is."""
    common = curves[0][0]
    for steps, _ in curves[1:]:
        common = np.intersect1d(common, steps)
    if not len(common):
        return curves[0]
    picked = [values[np.searchsorted(steps, common)] for steps, values in curves]
    return common, np.mean(picked, axis=0)


def _draw(figure: Figure, arms: Sequence[Arm], smooth: int | None) -> bytes:
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=(5.0, max(3.2, 1.2 + 0.15 * len(arms))), layout="constrained", dpi=200)
    axes: Any = canvas.add_subplot()
    longest = max(run.last_step for arm in arms for run in arm.runs)
    width = max(1, longest // 30) if smooth is None else smooth
    if figure.held_out or figure.column == "learning_rate":
        width = 1
    faint = 0.1 if len(arms) > 4 else 0.22
    ends, drawn = [], []
    for arm, style in zip(arms, make_styles(arms), strict=True):
        curves, shown = _draw_runs(axes, figure, arm, style, width, faint)
        if curves:
            ends.append((*_draw_mean(axes, figure, curves, style), style, _end_label(arm)))
            drawn += shown
    axes.set_ylim(*limits(drawn, longest))  # spikes of the raw values may leave it
    axes.set_xlim(0, longest)
    names = label_names(arms)
    axes.set_title(figure.title, loc="left", fontsize=10.5, fontweight="bold", pad=18)
    unit = f"{figure.unit}, by {names}" if names else figure.unit
    axes.annotate(
        unit, (0, 1), (0, 6), xycoords="axes fraction", textcoords="offset points", color="#555555"
    )
    axes.set_xlabel("optimizer steps")
    if len(arms) > 1:
        _label_ends(canvas, axes, ends)
    file = io.BytesIO()
    canvas.savefig(file, format="png", facecolor="white")
    return file.getvalue()


def _draw_runs(
    axes, figure: Figure, arm: Arm, style: Style, width: int, faint: float
) -> tuple[list[Curve], list[Curve]]:
    """Draws an arm's runs, thin; returns the smoothed curves to average, and all of them."""
    to_average, shown = [], []
    for run in arm.runs:
        steps, values = series(run, figure)
        if not len(steps):
            continue
        smoothed = moving_average(steps, values, width)
        if not figure.held_out:
            axes.plot(steps, values, color=style.colour, linewidth=0.6, alpha=faint)
        if len(arm.runs) > 1:
            axes.plot(steps, smoothed, color=style.colour, linewidth=0.7, alpha=0.45)
        shown.append((steps, smoothed))
        if run.finished or not arm.finished:
            to_average.append((steps, smoothed))
    return to_average, shown


def _draw_mean(axes, figure: Figure, curves: Sequence[Curve], style: Style) -> tuple[float, float]:
    """Draws an arm's mean in full ink, evaluations marked; returns its end."""
    marks: dict[str, Any] = {}
    if figure.held_out:
        marks = {"marker": style.marker, "markersize": 3.6, "markeredgewidth": 0, "clip_on": False}
    steps, values = mean_of(curves)
    axes.plot(steps, values, linewidth=1.7, **_line(style), **marks)
    return steps[-1], values[-1]


def _end_label(arm: Arm) -> str:
    left = len(arm.runs) - len(arm.finished)
    if not left:
        return arm.label
    return f"{arm.label} ({'' if left == len(arm.runs) else f'{left} '}unfinished)"


def limits(curves: Sequence[Curve], longest: int) -> tuple[float, float]:
    """Returns the range of the values, without a run's beginning where that would flatten the rest.

    The beginning is the first twentieth of the longest run; it is left out where the values after
    it take up less than a third of the whole range.
    """
    whole = np.concatenate([values for _, values in curves])
    rest = np.concatenate([values[steps > longest / 20] for steps, values in curves])
    shown = rest if len(rest) and np.ptp(whole) > 3 * np.ptp(rest) > 0 else whole
    low, high = float(shown.min()), float(shown.max())
    room = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    return low - room, high + room


def _label_ends(canvas, axes, ends: Sequence[tuple[float, float, Style, str]]) -> None:
    """Writes each arm's label right of the axes, level with its curve's end where that is free."""
    low, high = axes.get_ylim()
    last = axes.get_xlim()[1]
    size = canvas.get_size_inches()[1] - 0.95  # inches of the axes, below titles and above ticks
    heights = spread([(y - low) / (high - low) for _, y, _, _ in ends], 0.145 / size)
    for (x, y, style, label), height in zip(ends, heights, strict=True):
        level = (y - low) / (high - low)
        box = {"transform": axes.transAxes, "clip_on": False}
        axes.plot(
            [x / last, 1.04], [level, height], color="#bdbdbd", linewidth=0.6, zorder=1, **box
        )
        axes.plot([1.045, 1.105], [height, height], linewidth=1.7, **_line(style), **box)
        axes.text(1.12, height, label, va="center", transform=axes.transAxes)


def _line(style: Style) -> dict[str, Any]:
    strokes = tuple(map(float, style.dash.split()))
    return {"color": style.colour, "linestyle": (0, strokes) if strokes else "-"}


def spread(wanted: Sequence[float], gap: float) -> list[float]:
    """Returns positions in [0, 1] at least `gap` apart, in the order wanted and as near to it."""
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    groups: list[tuple[float, int]] = []  # mean of what its members want of the lowest, and members
    for rank, i in enumerate(order):
        centre, count = wanted[i] - rank * gap, 1
        while groups and groups[-1][0] > centre:
            other, number = groups.pop()
            centre = (centre * count + other * number) / (count + number)
            count += number
        groups.append((centre, count))
    top = max(0.0, 1 - (len(wanted) - 1) * gap)
    bases = [min(max(centre, 0.0), top) for centre, count in groups for _ in range(count)]
    found = [0.0] * len(wanted)
    for rank, i in enumerate(order):
        found[i] = bases[rank] + rank * gap
    return found
