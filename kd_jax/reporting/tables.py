"""A report in numbers: arms, means over seeds, paired differences, costs. Needs no jax."""

import math
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from kd_jax.config.record import flatten
from kd_jax.reporting.arms import Arm, label_names
from kd_jax.workdir.history import COMPARED, Run


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """Plain text in rows; a cell `a ± b` is aligned at its sign."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    keys: Sequence[int] = field(default=())
    """The arm of each row, where a stroke in the arm's colour stands before it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Metric:
    label: str
    unit: str
    decimals: int
    scale: float = 1.0
    compared: bool = True
    """Whether it has a column among the differences; perplexity only repeats CE there."""


METRICS = {
    "ce": Metric(label="CE", unit="nats", decimals=4),
    "perplexity": Metric(label="Perplexity", unit="exp(CE)", decimals=3, compared=False),
    "kl_forward": Metric(label="KL(teacher\N{NO-BREAK SPACE}‖ student)", unit="nats", decimals=4),
    "kl_reverse": Metric(label="KL(student\N{NO-BREAK SPACE}‖ teacher)", unit="nats", decimals=4),
    "top1_agreement": Metric(label="Top-1 agreement", unit="%", decimals=2, scale=100),
    "acceptance": Metric(label="Acceptance", unit="%", decimals=2, scale=100),
    "topk_overlap": Metric(label="Top-k overlap", unit="%", decimals=2, scale=100),
    "ece": Metric(label="Calibration error", unit="%", decimals=2, scale=100),
    "entropy_gap": Metric(label="Entropy gap", unit="nats", decimals=4),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """A place that a run's held-out numbers come from."""

    name: str
    note: str
    read: Callable[[Run], dict[str, float]]


def _last(run: Run) -> dict[str, float]:
    return {name: float(x[-1]) for name, x in run.held_out.items()}


def _best(run: Run) -> dict[str, float]:
    if "loss" not in run.held_out or np.isnan(run.held_out["loss"]).all():
        return {}
    index = int(np.nanargmin(run.held_out["loss"]))
    return {name: float(x[index]) for name, x in run.held_out.items()}


def _evaluated(run: Run) -> dict[str, float]:
    return run.evaluation


SOURCES = (
    Source(
        name="the last evaluation",
        note="After the last step of each run.",
        read=_last,
    ),
    Source(
        name="each run’s best evaluation",
        note="Where the run’s own held-out loss was lowest. Chosen on the text that it is measured "
        "on, so these numbers flatter a little.",
        read=_best,
    ),
    Source(
        name="kd_jax.evaluate",
        note="From evaluation.json in the workdirs.",
        read=_evaluated,
    ),
)


def arms_table(arms: Sequence[Arm], controls: Mapping[str, Arm]) -> Table:
    by_value = bool(label_names(arms))
    rows = []
    for arm in arms:
        left = len(arm.runs) - len(arm.finished)
        status = f"{left} of {len(arm.runs)} unfinished" if left else "finished"
        name = [] if by_value else [arm.label]
        seeds = ", ".join(str(run.seed) for run in arm.runs)
        is_control = any(arm is other for other in controls.values())
        role = "control" if is_control else "distilled" if arm.distils else "no teacher"
        rows.append([*name, *arm.values.values(), seeds, status, role])
    names = ([] if by_value else ["arm"]) + [name.replace("_", "-") for name in arms[0].values]
    return Table(
        title="Arms",
        header=[*names, "seeds", "status", "role"],
        rows=rows,
        note="An arm is the runs that differ in their seed alone.",
        keys=range(len(arms)),
    )


def result_tables(arms: Sequence[Arm], controls: Mapping[str, Arm]) -> list[Table]:
    """Returns means and differences for each source that any finished run has numbers of."""
    tables = []
    finished = [run for arm in arms for run in arm.finished]
    for source in SOURCES:
        if source.read is _best and all(_best(run) == _last(run) for run in finished):
            continue  # it would repeat the table before
        values = [[source.read(run) for run in arm.finished] for arm in arms]
        names = [n for n in METRICS if any(n in run for runs in values for run in runs)]
        if names:
            tables.append(_means_table(source, arms, values, names))
        if names and controls:
            tables += _differences_table(source, arms, controls, names)
    return tables


def _means_table(
    source: Source,
    arms: Sequence[Arm],
    values: Sequence[Sequence[dict[str, float]]],
    names: Sequence[str],
) -> Table:
    rows = []
    for arm, runs in zip(arms, values, strict=True):
        known = [run for run in runs if run]
        row = [arm.label, str(len(known))]
        for name in names:
            found = [run[name] * METRICS[name].scale for run in known if name in run]
            complete = found if len(found) == len(known) else []
            row.append(mean_and_spread(complete, METRICS[name].decimals))
        rows.append(row)
    return Table(
        title=f"Held-out text, by {source.name}",
        header=["arm", "n", *(_heading(METRICS[name]) for name in names)],
        rows=rows,
        note=f"{source.note} Mean ± standard deviation over n seeds, per target token."
        + (_unlike(arms) if source.read is _evaluated else ""),
        keys=range(len(arms)),
    )


def _unlike(arms: Sequence[Arm]) -> str:
    """Returns a warning where kd_jax.evaluate was given different things to measure with."""
    used = [run.evaluated_with for arm in arms for run in arm.finished if run.evaluated_with]
    names = [name for name in COMPARED if len({str(one.get(name)) for one in used}) > 1]
    return f" Careful: not all with the same {', '.join(names)}." if names else ""


def _differences_table(
    source: Source, arms: Sequence[Arm], controls: Mapping[str, Arm], names: Sequence[str]
) -> list[Table]:
    """Returns each arm minus its control, seed by seed; nothing if no control has numbers."""
    bases = {
        name: {run.seed: source.read(run) for run in control.finished if source.read(run)}
        for name, control in controls.items()
    }
    found = [values for base in bases.values() for values in base.values()]
    names = [n for n in names if METRICS[n].compared and any(n in values for values in found)]
    if not names:
        return []
    labels = {control.label for control in controls.values()}
    rows, counts, keys = [], set(), []
    for key, arm in enumerate(arms):
        if arm.name not in controls:
            continue
        base = bases[arm.name]
        pairs = [(source.read(run), base[run.seed]) for run in arm.finished if run.seed in base]
        pairs = [(ours, theirs) for ours, theirs in pairs if ours]
        beside = [controls[arm.name].label] if len(labels) > 1 else []
        rows.append([arm.label, *beside, str(len(pairs)), *_difference_cells(pairs, names)])
        counts.add(len(pairs))
        keys.append(key)
    header = ["arm", *(["control"] if len(labels) > 1 else []), "n"]
    for name in names:
        header += [_heading(METRICS[name]), "t"]
    which = "each arm's control" if len(labels) > 1 else f"the control ({labels.pop()})"
    table = Table(
        title=f"Differences from {which}, by {source.name}",
        header=header,
        rows=rows,
        note="Mean difference ± its standard error over n pairs of runs with the same seed, and "
        f"their quotient t.{_critical(counts)}",
        keys=keys,
    )
    return [table]


def _difference_cells(
    pairs: Sequence[tuple[dict[str, float], dict[str, float]]], names: Sequence[str]
) -> list[str]:
    cells: list[str] = []
    for name in names:
        known = all(name in ours and name in theirs for ours, theirs in pairs)
        deltas = [ours[name] - theirs[name] for ours, theirs in pairs] if known else []
        metric = METRICS[name]
        cells += difference([metric.scale * delta for delta in deltas], metric.decimals)
    return cells


def _heading(metric: Metric) -> str:
    return f"{metric.label},\N{NO-BREAK SPACE}{metric.unit}"


def mean_and_spread(values: Sequence[float], decimals: int) -> str:
    """Returns `mean ± sample standard deviation`, of one value the value alone."""
    if not values:
        return "–"
    mean = number(statistics.fmean(values), decimals)
    if len(values) == 1:
        return mean
    return f"{mean} ± {number(statistics.stdev(values), decimals)}"


def difference(deltas: Sequence[float], decimals: int) -> tuple[str, str]:
    """Returns `mean ± standard error` of paired differences, and t; of one pair no error."""
    if not deltas:
        return "–", "–"
    mean = statistics.fmean(deltas)
    if len(deltas) == 1:
        return number(mean, decimals, sign=True), "–"
    error = statistics.stdev(deltas) / math.sqrt(len(deltas))
    text = f"{number(mean, decimals, sign=True)} ± {number(error, decimals)}"
    return text, number(mean / error, 1, sign=True) if error > 0 else "–"


def _critical(counts: set[int]) -> str:
    """Returns which t is beyond chance for each number of pairs."""
    from scipy.special import stdtrit  # 0.1 s that --help need not pay

    known = sorted(count for count in counts if count > 1)
    if not known:
        return " One pair has no standard error: run more seeds."
    bounds = "; ".join(f"n = {n}: beyond ±{stdtrit(n - 1, 0.975):.1f}" for n in known)
    return f" Chance alone passes these bounds once in twenty comparisons: {bounds}."


def number(value: float, decimals: int, sign: bool = False) -> str:
    """Returns a number with a true minus sign and, above a thousand, with groups."""
    return f"{value:{'+' if sign else ''},.{decimals}f}".replace("-", "−")


def train_seconds(run: Run) -> float:
    """Returns the time of all steps; those between the logged ones as long as these on average."""
    return float(np.nanmean(run.train["step_seconds"])) * run.last_step


def tokens(run: Run, rate: str = "tokens_per_second") -> float:
    """Returns the tokens processed in all steps, counted like `train_seconds`."""
    return float(np.nanmean(run.train[rate] * run.train["step_seconds"])) * run.last_step


def cost_table(arms: Sequence[Arm]) -> Table:
    runs = [run for arm in arms for run in arm.finished]
    unit, size = _time_unit(max((train_seconds(run) for run in runs), default=0.0))
    columns: list[tuple[str, int, Callable[[Run], float]]] = [
        (f"training,\N{NO-BREAK SPACE}{unit}", 1, lambda run: train_seconds(run) / size),
        (
            "median step,\N{NO-BREAK SPACE}s",
            3,
            lambda run: float(np.nanmedian(run.train["step_seconds"])),
        ),
        ("tokens/s, median", 0, lambda run: float(np.nanmedian(run.train["tokens_per_second"]))),
        ("tokens, thousands", 1, lambda run: tokens(run) / 1e3),
        ("target tokens, thousands", 1, lambda run: tokens(run, "target_tokens_per_second") / 1e3),
        ("peak memory,\N{NO-BREAK SPACE}GiB", 2, _peak_gib),
    ]
    rows = []
    for arm in arms:
        cells = [mean_and_spread([f(run) for run in arm.finished], d) for _, d, f in columns]
        rows.append([arm.label, str(len(arm.finished)), *cells])
    sparse = any(run.record["config"]["log"]["every_steps"] > 1 for run in runs)
    return Table(
        title="Cost of a run",
        header=["arm", "n", *(name for name, _, _ in columns)],
        rows=rows,
        note="Training is the sum of step_seconds: with the compilation of the first step, without "
        "loading, evaluations and checkpoints. Steps that a resumed run took again count once, so "
        "what an interruption cost is not in it. Memory is the device’s, or on CPU the process’s."
        + (" Steps that were not logged count like the mean of those that were." if sparse else ""),
        keys=range(len(arms)),
    )


def _peak_gib(run: Run) -> float:
    return float(np.nanmax(run.train["peak_memory_bytes"])) / 2**30


def _time_unit(longest: float) -> tuple[str, float]:
    if longest >= 3 * 3600:
        return "hours", 3600.0
    return ("minutes", 60.0) if longest >= 600 else ("seconds", 1.0)


def runs_table(arms: Sequence[Arm]) -> Table:
    names = run_names([run for arm in arms for run in arm.runs])
    measured = [f"last held-out {_heading(METRICS[n])}" for n in ("ce", "kl_forward")]
    rows, keys = [], []
    for key, arm in enumerate(arms):
        for run in arm.runs:
            last = _last(run)
            ce, kl = (number(last[n], 4) if n in last else "–" for n in ("ce", "kl_forward"))
            starts = "–" if run.num_starts is None else str(run.num_starts)
            seconds = number(train_seconds(run), 1)
            cells = [str(run.seed), run.status, str(run.last_step), starts, seconds, ce, kl]
            rows.append([names.pop(0), *cells])
            keys.append(key)
    return Table(
        title="Runs",
        header=[
            "workdir",
            "seed",
            "status",
            "steps",
            "starts",
            "training,\N{NO-BREAK SPACE}s",
            *measured,
        ],
        rows=rows,
        note="More than one start: the run was interrupted and resumed.",
        keys=keys,
    )


def run_names(runs: Sequence[Run]) -> list[str]:
    """Returns each folder's name, with as many parents as tell it from the others."""
    depth = 1
    places = [run.folder.resolve().parts for run in runs]
    while len({place[-depth:] for place in places}) < len(places):
        depth += 1
    return ["/".join(place[-depth:]) for place in places]


def setup_table(arms: Sequence[Arm]) -> Table:
    """Returns hardware, commit and versions; where runs differ, each value counted."""
    records = [
        {
            "devices": run.record.get("devices", "not recorded"),
            "commit": run.record.get("git_commit") or "not recorded",
            **run.record["versions"],
        }
        for arm in arms
        for run in arm.runs
    ]
    rows = []
    for name, found in _count_values(records).items():
        counted = [f"{x} ({n} run{'s' * (n > 1)})" for x, n in found.items()]
        rows.append([name, "; ".join(counted if len(counted) > 1 else found)])
    return Table(title="Hardware and software", header=["what", "value"], rows=rows)


def config_table(arms: Sequence[Arm]) -> Table:
    """Returns the fields that all runs agree on."""
    records = [
        {name.replace("_", "-"): _plain(x) for name, x in flatten(run.record["config"]).items()}
        for arm in arms
        for run in arm.runs
    ]
    found = _count_values(records).items()
    rows = [[name, *values] for name, values in found if len(values) == 1]
    return Table(title="Configuration of all runs", header=["field", "value"], rows=rows)


def _plain(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _count_values(records: Sequence[dict[str, str]]) -> dict[str, Counter[str]]:
    """Returns how many records have each value, by name."""
    names = {name: None for record in records for name in record}
    return {name: Counter(record.get(name, "–") for record in records) for name in names}
