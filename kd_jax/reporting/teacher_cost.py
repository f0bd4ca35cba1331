"""Cost of runs from a teacher's cache, compared with a live teacher. Needs no jax."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kd_jax.reporting.tables import Table, costs, number
from kd_jax.workdir.history import Run

NOTE = (
    "The teacher’s pass counts once, with compiling and writing. Live: the runs’ own seconds, and "
    "for each of their tokens what the teacher took for one when it filled the cache. Loading, "
    "evaluations and checkpoints are in neither. Finished runs alone. A dash: the cost is not "
    "recorded there, as of a cache that was made of a file or has moved."
)


@dataclass(frozen=True, kw_only=True, slots=True)
class SharedTeacher:
    """The finished runs of one cache, and seconds."""

    cache: str
    num_runs: int
    making: float
    """The teacher's passes into the cache."""
    runs: float
    """Training of all runs."""
    live: float
    """Estimate for the same runs with a live teacher, at the rate of those passes."""

    @property
    def together(self) -> float:
        return self.making + self.runs

    def __str__(self) -> str:
        count = f"{self.num_runs} run{'s' * (self.num_runs > 1)}"
        return (
            f"the teacher once {self.making:,.1f} s, {count} from its cache {self.runs:,.1f} s: "
            f"{self.together:,.1f} s; with a live teacher, at the rate of that pass, "
            f"{self.live:,.1f} s: {self.together / self.live:.0%} of it"
        )


def shared_teachers(runs: Sequence[Run]) -> list[SharedTeacher]:
    """Returns the costs of each cache that finished runs read, if what it cost is recorded."""
    from kd_jax.teachers.cost import read_cost  # imports tensorstore

    out = []
    for path, some in _readers(runs).items():
        if (cost := read_cost(path)) is None:
            continue
        own, tokens = _sums(some)
        live = own + tokens * cost.seconds_per_token
        out.append(
            SharedTeacher(cache=path, num_runs=len(some), making=cost.seconds, runs=own, live=live)
        )
    return out


def _readers(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Returns the finished runs of each cache; of its folder there is one name."""
    readers: dict[str, list[Run]] = {}
    for run in runs:
        teacher = run.config.teacher
        if teacher is not None and teacher.cache and run.config.distils and run.finished:
            path = teacher.cache
            place = path if "://" in path else str(Path(path).expanduser().resolve())
            readers.setdefault(place, []).append(run)
    return readers


def _sums(runs: Sequence[Run]) -> tuple[float, float]:
    """Returns the seconds and the tokens of all runs."""
    found = [costs(run) for run in runs]
    return sum(x["seconds"] for x in found), sum(x["tokens"] for x in found)


def shared_table(runs: Sequence[Run]) -> list[Table]:
    """Returns a table of the caches that finished runs read, none without one."""
    known = {one.cache: one for one in shared_teachers(runs)}
    rows = []
    for path, some in _readers(runs).items():
        own, one = _sums(some)[0], known.get(path)
        cells = ["–", number(own, 1), "–", "–", "–"]
        if one is not None:
            seconds = (one.making, own, one.together, one.live)
            cells = [*(number(x, 1) for x in seconds), number(100 * one.together / one.live, 1)]
        rows.append([path, str(len(some)), *cells])
    names = ("teacher once, s", "runs, s", "together, s", "live, s", "share of live, %")
    header = ["cache", "n", *(name.replace(", ", ",\N{NO-BREAK SPACE}") for name in names)]
    title = "Cost of runs that share a teacher’s cache"
    return [Table(title=title, header=header, rows=rows, note=NOTE)] if rows else []
