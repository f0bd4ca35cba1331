"""Tables of a report: arms, means over seeds, paired differences, costs. Needs no jax."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from kd_jax.reporting.arms import Arm, label_names
from kd_jax.workdir.history import Run

if TYPE_CHECKING:
    import pandas as pd

# Arguments of kd_jax.evaluate that must be equal in a comparison.
COMPARED = (
    "data", "split", "max_conversations", "seq_len", "chat_template", "teacher", "teacher_cache",
    "teacher_system", "teacher_messages", "dtype", "top_k",
)  # fmt: skip

Numbers = dict[str, float]
Frames = dict[str, "pd.DataFrame"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """Rows of plain text; the page aligns cells such as `a ± b` at the sign."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    keys: Sequence[int] = ()
    """Arm of each row, whose line style is drawn before it."""


@dataclass(frozen=True, slots=True)
class Metric:
    label: str
    unit: str
    decimals: int
    scale: float = 1.0
    compared: bool = True
    """Shown among the differences. Perplexity is not: it repeats CE."""

    @property
    def heading(self) -> str:
        return f"{self.label},\N{NO-BREAK SPACE}{self.unit}" if self.unit else self.label


METRICS = {
    "ce": Metric("CE", "nats", 4),
    "perplexity": Metric("Perplexity", "exp(CE)", 3, compared=False),
    "kl_forward": Metric("KL(teacher\N{NO-BREAK SPACE}‖ student)", "nats", 4),
    "kl_reverse": Metric("KL(student\N{NO-BREAK SPACE}‖ teacher)", "nats", 4),
    "top1_agreement": Metric("Top-1 agreement", "%", 2, scale=100),
    "acceptance": Metric("Acceptance", "%", 2, scale=100),
    "topk_overlap": Metric("Top-k overlap", "%", 2, scale=100),
    "ece": Metric("Calibration error", "%", 2, scale=100),
    "entropy_gap": Metric("Entropy gap", "nats", 4),
}
COSTS = {
    "seconds": Metric("training", "seconds", 1),
    "step_seconds": Metric("median step", "s", 3),
    "tokens_per_second": Metric("tokens/s, median", "", 0),
    "tokens": Metric("tokens, thousands", "", 1, scale=1e-3),
    "target_tokens": Metric("target tokens, thousands", "", 1, scale=1e-3),
    "memory": Metric("peak memory", "GiB", 2, scale=2**-30),
}


def number(value: float, decimals: int, sign: bool = False) -> str:
    """Returns a number with a true minus sign and with commas between thousands."""
    return f"{value:{'+' if sign else ''},.{decimals}f}".replace("-", "−")


def summary(values: ArrayLike, metric: Metric, *, error: bool = False, sign: bool = False) -> str:
    """Returns `mean ± spread` in the metric's unit, `mean` for one value, `–` if one is unknown.

    The spread is the sample standard deviation or, with `error`, the standard error of the mean.
    """
    scaled = metric.scale * np.asarray(values, np.float64)
    if not len(scaled) or np.isnan(scaled).any():
        return "–"
    mean = number(scaled.mean(), metric.decimals, sign)
    if len(scaled) == 1:
        return mean
    spread = scaled.std(ddof=1) / (len(scaled) ** 0.5 if error else 1.0)
    return f"{mean} ± {number(spread, metric.decimals)}"


def arms_table(arms: Sequence[Arm], controls: Mapping[str, Arm]) -> Table:
    numbered = not label_names(arms)
    rows = []
    for arm in arms:
        left = len(arm.runs) - len(arm.finished)
        is_control = any(arm is control for control in controls.values())
        cells = [
            *([arm.label] if numbered else []),
            *arm.values.values(),
            ", ".join(str(run.config.seed) for run in arm.runs),
            f"{left} of {len(arm.runs)} unfinished" if left else "finished",
            "control" if is_control else "distilled" if arm.distils else "no teacher",
        ]
        rows.append(cells)
    names = [name.replace("_", "-") for name in arms[0].values]
    return Table(
        title="Arms",
        header=[*(["arm"] if numbered else []), *names, "seeds", "status", "role"],
        rows=rows,
        note="The runs of an arm differ only in their seed.",
        keys=range(len(arms)),
    )


def _last(run: Run) -> Numbers:
    return {} if run.held_out.empty else run.held_out.iloc[-1].to_dict()


def _best(run: Run) -> Numbers:
    if "loss" not in run.held_out or run.held_out["loss"].isna().all():
        return {}
    return run.held_out.loc[run.held_out["loss"].idxmin()].to_dict()


def _evaluated(run: Run) -> Numbers:
    return run.evaluation


# Evaluations that held-out numbers of a run come from: name, note, function.
EVALUATIONS: tuple[tuple[str, str, Callable[[Run], Numbers]], ...] = (
    ("the last evaluation", "After the last step of each run.", _last),
    (
        "each run’s best evaluation",
        "At the step with the lowest held-out loss of each run. The step is chosen on the text it "
        "is measured on, so these numbers are slightly optimistic.",
        _best,
    ),
    ("kd_jax.evaluate", "From evaluation.json in the workdirs.", _evaluated),
)


def result_tables(arms: Sequence[Arm], controls: Mapping[str, Arm]) -> list[Table]:
    """Returns means and differences by each evaluation with numbers, unless it repeats another."""
    tables = []
    before: Frames = {}
    for evaluation, note, read in EVALUATIONS:
        frames = {arm.name: _frame(arm, read, METRICS) for arm in arms}
        names = [n for n in METRICS if any(n in frame for frame in frames.values())]
        repeats = before and all(frames[name].equals(before[name]) for name in frames)
        if not names or repeats:
            continue
        before = frames
        note += " Mean ± standard deviation over n seeds, per target token."
        note += _unlike(arms, read)
        note += _of_entries(arms, read)
        metrics = {name: METRICS[name] for name in names}
        tables.append(_means_table(f"Held-out text, by {evaluation}", arms, frames, metrics, note))
        known = {name for control in controls.values() for name in frames[control.name]}
        if shared := [n for n in names if n in known and METRICS[n].compared]:
            tables.append(_differences_table(evaluation, arms, frames, controls, shared))
    return tables


def _frame(arm: Arm, read: Callable[[Run], Numbers], names: Mapping[str, Metric]) -> "pd.DataFrame":
    """Returns numbers of the finished runs that have any: index seed, NaN where one is missing."""
    import pandas as pd

    rows = [{n: x for n, x in read(run).items() if n in names} for run in arm.finished]
    return pd.DataFrame(rows, index=[run.config.seed for run in arm.finished]).dropna(how="all")


def _means_table(
    title: str, arms: Sequence[Arm], frames: Frames, metrics: Mapping[str, Metric], note: str
) -> Table:
    rows = []
    for arm in arms:
        frame = frames[arm.name]
        cells = [summary(frame.get(n, ()), metric) for n, metric in metrics.items()]
        rows.append([arm.label, str(len(frame)), *cells])
    header = ["arm", "n", *(metric.heading for metric in metrics.values())]
    return Table(title=title, header=header, rows=rows, note=note, keys=range(len(arms)))


def _unlike(arms: Sequence[Arm], read: Callable[[Run], Numbers]) -> str:
    """Returns a warning if evaluations had different arguments or, as with rows of another length,
    target tokens, and one if some are of an earlier step than a run's last."""
    finished = [run for arm in arms for run in arm.finished]
    found: list[dict[str, Any]] = [dict(read(run)) for run in finished]
    used = [one["arguments"] for one in found if one.get("arguments")]
    # A flag that is off, and one that an earlier version had not, are the same.
    names = [name for name in COMPARED if len({str(one.get(name) or None) for one in used}) > 1]
    counts = {one["target_tokens"] for one in found if one.get("target_tokens")}
    names += ["target_tokens"] if len(counts) > 1 else []
    steps = [(one.get("arguments") or {}).get("step") for one in found]
    pairs = zip(finished, steps, strict=True)
    early = [run.folder.name for run, step in pairs if step not in (None, run.num_steps)]
    note = f" Careful: these evaluations differ in {', '.join(names)}." if names else ""
    note += f" Careful: of an earlier step than the last: {', '.join(early)}." if early else ""
    return note


def _of_entries(arms: Sequence[Arm], read: Callable[[Run], Numbers]) -> str:
    """Returns a warning if some numbers compare with a cache that has parts of distributions."""
    from kd_jax.teachers.manifest import read_kind  # imports tensorstore

    runs = [run for arm in arms for run in arm.finished]
    if read is _evaluated:
        caches = {(run.evaluation.get("arguments") or {}).get("teacher_cache") for run in runs}
    else:
        teachers = [run.config.teacher for run in runs if run.config.reads_cache]
        caches = {teacher.cache for teacher in teachers if teacher is not None}
    found = {read_kind(path) for path in caches if path}
    kinds = " or ".join(kind for kind in ("topk", "sampled") if kind in found)
    return (
        f" Careful: with a {kinds} cache KL, agreement and the like compare with what is stored, "
        "not with the whole teacher."
        if kinds
        else ""
    )


def _differences_table(
    evaluation: str,
    arms: Sequence[Arm],
    frames: Frames,
    controls: Mapping[str, Arm],
    names: Sequence[str],
) -> Table:
    """Returns each arm minus its control, seed by seed."""
    labels = sorted({control.label for control in controls.values()})
    several = len(labels) > 1
    rows, counts = [], set()
    for arm in (arm for arm in arms if arm.name in controls):
        control = controls[arm.name]
        deltas = _paired_deltas(frames[arm.name], frames[control.name])
        cells = [cell for name in names for cell in _delta_cells(deltas.get(name, ()), name)]
        rows.append([arm.label, *([control.label] if several else []), str(len(deltas)), *cells])
        counts.add(len(deltas))
    which = "each arm's control" if several else f"the control ({labels[0]})"
    headings = [heading for name in names for heading in (METRICS[name].heading, "t")]
    return Table(
        title=f"Differences from {which}, by {evaluation}",
        header=["arm", *(["control"] if several else []), "n", *headings],
        rows=rows,
        note="Mean difference ± its standard error over n pairs of runs with equal seeds, and t, "
        f"their quotient.{_critical(counts)}",
        keys=[key for key, arm in enumerate(arms) if arm.name in controls],
    )


def _paired_deltas(ours: "pd.DataFrame", control: "pd.DataFrame") -> "pd.DataFrame":
    """Returns the differences of runs with equal seeds; NaN where one of the two lacks a metric."""
    control = control[~control.index.duplicated(keep="last")]
    ours = ours[ours.index.isin(control.index)]
    return ours - control.reindex(ours.index)


def _delta_cells(deltas: ArrayLike, name: str) -> tuple[str, str]:
    """Returns `mean ± standard error` of paired differences, and t; one pair has no error."""
    values = np.asarray(deltas, np.float64)
    cell, t = summary(values, METRICS[name], error=True, sign=True), "–"
    if len(values) > 1 and (spread := values.std(ddof=1)) > 1e-12 * abs(values.mean()):
        t = number(values.mean() / spread * len(values) ** 0.5, 1, sign=True)
    return cell, t


def _critical(counts: set[int]) -> str:
    """Returns the two-sided 5 % bounds of t for each number of pairs."""
    from scipy.special import stdtrit  # takes 0.1 s, which --help avoids

    known = sorted(count for count in counts if count > 1)
    if not known:
        return " One pair has no standard error: run more seeds."
    bounds = "; ".join(f"n = {n}: beyond ±{stdtrit(n - 1, 0.975):.1f}" for n in known)
    return f" Chance alone exceeds these bounds once in twenty comparisons: {bounds}."


def costs(run: Run) -> Numbers:
    """Returns a run's costs; steps that were not logged count as the mean of those that were."""
    train, seconds = run.train, run.train["step_seconds"]
    return {
        "seconds": seconds.mean() * run.last_step,
        "step_seconds": seconds.median(),
        "tokens_per_second": train["tokens_per_second"].median(),
        "tokens": (train["tokens_per_second"] * seconds).mean() * run.last_step,
        "target_tokens": (train["target_tokens_per_second"] * seconds).mean() * run.last_step,
        "memory": train["peak_memory_bytes"].max(),
    }


def cost_table(arms: Sequence[Arm]) -> Table:
    frames = {arm.name: _frame(arm, costs, COSTS) for arm in arms}
    longest = max((frame["seconds"].max() for frame in frames.values() if len(frame)), default=0.0)
    unit, size = "seconds", 1
    if longest >= 600:
        unit, size = ("hours", 3600) if longest >= 3 * 3600 else ("minutes", 60)
    metrics = {**COSTS, "seconds": replace(COSTS["seconds"], unit=unit, scale=1 / size)}
    runs = [run for arm in arms for run in arm.finished]
    sparse = any(run.config.log.every_steps > 1 for run in runs)
    note = (
        "Training time is the sum of step_seconds. It includes the compilation in the first step, "
        "and leaves out loading, evaluations and checkpoints. Steps repeated after an interruption "
        "count once. Memory is the device’s, or on CPU the process’s."
    )
    note += " Steps that were not logged count as the mean of those that were." if sparse else ""
    return _means_table("Cost of a run", arms, frames, metrics, note)


def runs_table(arms: Sequence[Arm]) -> Table:
    runs = [(key, run) for key, arm in enumerate(arms) for run in arm.runs]
    names = run_names([run for _, run in runs])
    measured = {name: METRICS[name] for name in ("ce", "kl_forward")}
    rows = []
    for name, (_, run) in zip(names, runs, strict=True):
        last, seed = _last(run), str(run.config.seed)
        cells = [name, seed, run.status, str(run.last_step), str(run.num_starts or "–")]
        cells.append(summary([costs(run)["seconds"]], COSTS["seconds"]))
        cells += [summary([last.get(n, np.nan)], metric) for n, metric in measured.items()]
        rows.append(cells)
    columns = ["workdir", "seed", "status", "steps", "starts", "training,\N{NO-BREAK SPACE}s"]
    return Table(
        title="Runs",
        header=[*columns, *(f"last held-out {metric.heading}" for metric in measured.values())],
        rows=rows,
        note="A run with more than one start was interrupted and resumed.",
        keys=[key for key, _ in runs],
    )


def run_names(runs: Sequence[Run]) -> list[str]:
    """Returns each folder's name, with as many parents as tell it from the others."""
    depth = 1
    places = [run.folder.resolve().parts for run in runs]
    while len({place[-depth:] for place in places}) < len(places):
        depth += 1
    return ["/".join(place[-depth:]) for place in places]
