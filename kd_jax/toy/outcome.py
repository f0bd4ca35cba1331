"""What the demo found, as a table for the report and the terminal. Needs no jax."""

import math
import statistics
from collections.abc import Sequence
from typing import Any

from kd_jax.reporting.tables import Table

MODELS = {
    "teacher": "teacher",
    "untouched": "untouched",
    "finetune": "fine-tuned",
    "distil": "distilled",
}


# By the names of kd_jax.evaluate, and two of the demo's own: label, decimals, scale.
COLUMNS = {
    "ce": ("CE", 3, 1),
    "excess": ("above entropy", 3, 1),
    "kl_forward": ("KL to teacher", 3, 1),
    "top1_agreement": ("agreement %", 1, 100),
    "right": ("right %", 1, 100),
}


WHY = (
    "Fine-tuning sees one sampled answer to a question, now and then a slip, and learns it by "
    "heart. The teacher, who has read many, gives the odds of every answer, and so the same few "
    "questions teach the whole distribution."
)


def make_table(result: dict[str, Any]) -> Table:
    """Returns a row a model; with several seeds mean ± standard error."""
    rows = [
        [MODELS[model], *(_cell([x[name] for x in values if name in x], name) for name in COLUMNS)]
        for model, values in result["models"].items()
    ]
    entropy, num_seeds = result["entropy"]["held_out"], result["seeds"]
    note = f"CE and KL in nats per target token; the held-out answers' entropy is {entropy:.3f}."
    if num_seeds > 1:
        gains = differences(result)
        mean, error = spread(gains)
        note += (
            f" Mean ± standard error of {num_seeds} seeds; CE of distilled less fine-tuned, in "
            f"pairs: {mean:.3f} ± {error:.3f}."
        )
    return Table(
        title="Held-out examples of the language",
        header=["model", *(label for label, _, _ in COLUMNS.values())],
        rows=rows,
        note=f"{note} {WHY}",
    )


def differences(result: dict[str, Any]) -> list[float]:
    """Returns each seed's cross-entropy of distilled less fine-tuned."""
    models = result["models"]
    pairs = zip(models["distil"], models["finetune"], strict=True)
    return [ours["ce"] - theirs["ce"] for ours, theirs in pairs]


def spread(values: Sequence[float]) -> tuple[float, float]:
    """Returns the mean and its standard error."""
    return statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))


def _cell(values: Sequence[float], name: str) -> str:
    if not values:
        return "–"
    if len(values) == 1:
        return format_value(values[0], name)
    return " ± ".join(format_value(x, name) for x in spread(values))


def format_value(value: float, name: str) -> str:
    _, decimals, scale = COLUMNS[name]
    return f"{value * scale:.{decimals}f}"


def show(console: Any, result: dict[str, Any]) -> None:
    """Prints the table, where the report is, and what it all cost."""
    from rich.table import Table as Grid

    table = make_table(result)
    grid = Grid(box=None, padding=(0, 1, 0, 0))
    for i, name in enumerate(table.header):
        grid.add_column(name, justify="right" if i else "left")
    for row in table.rows:
        grid.add_row(*row)
    console.print("", grid, "", table.note, "", sep="\n", soft_wrap=False)
    console.print(f"Report: {result['report']}")
    console.print(
        f"{result['seconds']:.0f} s, {result['cpu_seconds']:.0f} s of CPU, at most "
        f"{result['peak_memory_bytes'] / 1e9:.2f} GB"
    )
