"""The demo's results as a table for the report and the terminal. Needs no jax."""

from typing import Any

from kd_jax.reporting.tables import Metric, Table, number, summary

MODELS = {
    "teacher": "teacher",
    "untouched": "untouched",
    "finetune": "fine-tuned",
    "distil": "distilled",
    "on_policy": "then on-policy",
}
# Names of kd_jax.evaluate, and three of the demo's own.
COLUMNS = {
    "ce": Metric("CE", "", 3),
    "excess": Metric("above entropy", "", 3),
    "kl_forward": Metric("KL to teacher", "", 3),
    "top1_agreement": Metric("agreement %", "", 1, scale=100),
    "right": Metric("right %", "", 1, scale=100),
    "possible": Metric("possible %", "", 1, scale=100),
}
WHY = (
    "Fine-tuning memorizes one sampled answer to each question, errors included. The teacher was "
    "trained on many and gives the probability of every answer, so the same few questions teach "
    "the whole distribution."
)


def make_table(result: dict[str, Any]) -> Table:
    """Returns a row for each model; with several seeds, mean ± standard error."""
    rows = []
    columns = {
        n: x for n, x in COLUMNS.items() if any(n in y[0] for y in result["models"].values())
    }
    for model, values in result["models"].items():
        found = {name: [x[name] for x in values if name in x] for name in columns}
        cells = [summary(some, columns[name], error=True) for name, some in found.items()]
        rows.append([MODELS[model], *cells])
    entropy = number(result["entropy"]["held_out"], 3)
    note = f"CE and KL in nats per target token; the held-out answers' entropy is {entropy}."
    if result["seeds"] > 1:
        gain = summary(differences(result), COLUMNS["ce"], error=True)
        note += (
            f" Mean ± standard error of {result['seeds']} seeds; CE of distilled less fine-tuned, "
            f"in pairs: {gain}."
        )
    return Table(
        title="Held-out examples of the language",
        header=["model", *(metric.label for metric in columns.values())],
        rows=rows,
        note=f"{note} {WHY}",
    )


def differences(result: dict[str, Any]) -> list[float]:
    """Returns the cross-entropy of distilled less fine-tuned, for each seed."""
    models = result["models"]
    pairs = zip(models["distil"], models["finetune"], strict=True)
    return [ours["ce"] - theirs["ce"] for ours, theirs in pairs]


def show(console: Any, result: dict[str, Any]) -> None:
    """Prints the table, the report's path, time and memory."""
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
