"""Tables of a report: what the runs ran on, and their common configuration. Needs no jax."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from kd_jax.config.record import flatten
from kd_jax.reporting.arms import Arm
from kd_jax.reporting.tables import Table, run_names
from kd_jax.workdir.history import Run, list_starts


def setup_table(arms: Sequence[Arm]) -> Table:
    """Returns what runs began on; where they differ, each value with its count."""
    runs = [run for arm in arms for run in arm.runs]
    records = [_shown(run.record) for run in runs]
    rows = []
    for name, found in _count_values(records).items():
        counted = [f"{x} ({n} run{'s' * (n > 1)})" for x, n in found.items()]
        rows.append([name, "; ".join(counted if len(counted) > 1 else found)])
    title, header = "Hardware and software", ["what", "value"]
    return Table(title=title, header=header, rows=rows, note=_later_starts(runs))


def _shown(start: dict[str, Any]) -> dict[str, str]:
    """Returns devices, commit and versions of a start, or of a run's first one."""
    return {
        "devices": start.get("devices") or "not recorded",
        "commit": start.get("git_commit") or "not recorded",
        **start["versions"],
    }


def _later_starts(runs: Sequence[Run]) -> str:
    """Returns what differed when a run resumed; "" if nothing did."""
    found = []
    for name, run in zip(run_names(runs), runs, strict=True):
        first, *later = list_starts(run.record)
        for start in later:
            before, now = _shown(first), _shown(start)
            changed = [f"{x} {now.get(x)}" for x in now | before if now.get(x) != before.get(x)]
            if changed:
                found.append(f"{name} from step {start['step']} on: {', '.join(changed)}")
    return f"As each run began. Resumed on others: {'; '.join(found)}." if found else ""


def config_table(arms: Sequence[Arm]) -> Table:
    """Returns the fields with one value in all runs."""
    found = _count_values([flatten(run.record["config"]) for arm in arms for run in arm.runs])
    rows = [[name.replace("_", "-"), *values] for name, values in found.items() if len(values) == 1]
    return Table(title="Configuration of all runs", header=["field", "value"], rows=rows)


def _count_values(records: Sequence[dict[str, Any]]) -> dict[str, Counter[str]]:
    """Returns the number of records with each value, by name."""
    names = {name: None for record in records for name in record}
    return {name: Counter(_plain(record.get(name, "–")) for record in records) for name in names}


def _plain(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
