"""Arms: runs that differ only in their seed, their names and their controls. Needs no jax."""

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kd_jax.config import Config, UserError
from kd_jax.config.errors import did_you_mean
from kd_jax.config.flags import flag_names
from kd_jax.config.record import flatten, path_fields
from kd_jax.workdir.history import NEUTRAL, Run, identity

JOIN = " · "
LABEL_SIZE = 26  # longer labels leave a figure too little room


@dataclass(frozen=True, kw_only=True, slots=True)
class Arm:
    """Runs that differ only in their seed."""

    name: str
    """Fields and values, such as `kd-ratio=0.25, learning-rate=0.0001`."""
    label: str
    """Only the values, such as `0.25 · 0.0001`; `arm 1`, `arm 2`, ... if these are long."""
    values: dict[str, str]
    """Shown value of each field in which the arms differ."""
    runs: list[Run]

    @property
    def distils(self) -> bool:
        return self.runs[0].config.distils

    @property
    def finished(self) -> list[Run]:
        return [run for run in self.runs if run.finished]


def make_arms(runs: Sequence[Run]) -> list[Arm]:
    """Returns the arms, those without a teacher first, then by the values of their fields."""
    settings = [_settings(run) for run in runs]
    fields = _differing(settings)
    paths = set(path_fields())
    shown = {f: _shown([setting.get(f) for setting in settings], f in paths) for f in fields}
    names = short_names(fields)
    groups: dict[tuple[str, ...], list[Run]] = {}
    for i, run in enumerate(runs):
        groups.setdefault(tuple(words[i] for words in shown.values()), []).append(run)
    arms = []
    for values, members in groups.items():
        alone = members[0].folder.name if len(members) == 1 else "all runs"
        name = ", ".join(f"{names[f]}={v}" for f, v in zip(fields, values, strict=True))
        arm = Arm(
            name=name or alone,
            label=JOIN.join(values) or _cut(alone, LABEL_SIZE),
            values=dict(zip(fields, values, strict=True)),
            runs=sorted(members, key=lambda run: (run.config.seed, run.folder)),
        )
        arms.append(arm)
    arms.sort(key=lambda arm: (arm.distils, [_rank(v) for v in arm.values.values()]))
    if max(len(arm.label) for arm in arms) <= LABEL_SIZE:
        return arms
    return [dataclasses.replace(arm, label=f"arm {i}") for i, arm in enumerate(arms, start=1)]


def label_names(arms: Sequence[Arm]) -> str:
    """Returns the names of the fields in the labels; "" where labels are not field values."""
    has_values = arms[0].label == JOIN.join(arms[0].values.values())
    return JOIN.join(short_names(list(arms[0].values)).values()) if has_values else ""


def short_names(fields: Sequence[str]) -> dict[str, str]:
    """Returns the last word of each field's flag, or the whole flag where the word is ambiguous."""
    flags = {field: field.replace("_", "-") for field in fields}
    count = Counter(flag.split(".")[-1] for flag in {*flags.values(), *flag_names(Config)})
    words = {field: flag.split(".")[-1] for field, flag in flags.items()}
    return {f: words[f] if count[words[f]] == 1 else flags[f] for f in fields}


def _settings(run: Run) -> dict[str, tuple[Any, str]]:
    """Returns the value and the identity of each field that counts.

    The identity of an input is the hash of its content. A run without a teacher has no fields of
    the teacher, and a kd_ratio of 0.
    """
    found, distils = {}, run.config.distils
    for field, value in flatten(run.record["config"]).items():
        if field == "seed" or NEUTRAL.fullmatch(field):
            continue
        if field.split(".")[0] == "teacher" and not distils:
            continue
        if field == "loss.kd_ratio" and not distils:
            value = 0.0
        found[field] = value, run.record["inputs"].get(field, identity(value))
    return found


def _differing(settings: Sequence[dict[str, tuple[Any, str]]]) -> list[str]:
    """Returns the fields that distinguish arms; a run without a field matches any value.

    The content of a path also changes with the options of the rows. A path that differs only in
    its content is omitted if the other fields distinguish the same arms.
    """
    columns = {f: [s[f] for s in settings if f in s] for s in settings for f in s}
    fields = [f for f, found in columns.items() if len({key for _, key in found}) > 1]

    def num_arms(fields: Sequence[str]) -> int:
        return len({tuple(s.get(f, (None, ""))[1] for f in fields) for s in settings})

    for field in tuple(fields):
        others = [other for other in fields if other != field]
        same_value = len({identity(value) for value, _ in columns[field]}) == 1
        if same_value and num_arms(others) == num_arms(fields):
            fields = others
    return fields


def _shown(settings: Sequence[tuple[Any, str] | None], is_path: bool) -> list[str]:
    """Returns each value as short as possible while different values stay different.

    Equal contents have the name of the first.
    """
    first: dict[str, Any] = {}
    for value, key in filter(None, settings):
        first.setdefault(key, value)
    one, two = (1, 2) if is_path else (0, 0)
    forms: tuple[Callable[[Any, str], str], ...] = (
        lambda value, _: _brief(value, one),
        lambda value, _: _brief(value, two),
        lambda value, _: str(value),
        lambda value, identity: _brief(value, one) + f" #{identity[:6]}" * (value is not None),
    )
    count = len({setting and setting[1] for setting in settings})
    for form in forms:
        words = ["–" if x is None else form(first[x[1]], x[1]) for x in settings]
        if len(set(words)) == count:
            break
    return words


def _brief(value: Any, parts: int) -> str:
    """Returns a value in at most 28 characters; of paths their last `parts`, 0: it is none."""
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list):
        return _cut("+".join(map(str, value)))
    paths = str(value).split(",") if parts else []
    short = ["/".join(path.rstrip("/").split("/")[-parts:]) for path in paths]
    return _cut(", ".join(short) or str(value))


def _cut(text: str, size: int = 28) -> str:
    return text if len(text) <= size else f"{text[: size // 2 - 1]}…{text[-size // 2 :]}"


def _rank(shown: str) -> tuple[int, float, str]:
    """Returns a sort key that puts numbers, by value, before words."""
    try:
        return 0, float(shown), ""
    except ValueError:
        return 1, 0.0, shown


def find_controls(arms: Sequence[Arm], wanted: str | None) -> tuple[dict[str, Arm], str]:
    """Returns each arm's control by the arm's name, and a sentence that says how it was chosen.

    Without `wanted`, the control is the only arm without a teacher. Of several, it is the one with
    equal values in all fields outside `teacher` and `loss`.

    Raises:
      UserError: `wanted` is neither an arm's name nor the folder of one of its runs.
    """
    if wanted is not None:
        control = _find_arm(arms, wanted)
        others = {arm.name: control for arm in arms if arm is not control}
        return others, f"The control is {control.name}, as chosen."
    if len(arms) == 1:
        return {}, ""
    plain = [arm for arm in arms if not arm.distils]
    distilled = [arm for arm in arms if arm.distils]
    if len(plain) == 1:
        others = {arm.name: plain[0] for arm in distilled}
        return others, f"The control is {plain[0].name}, the one arm without a teacher."
    twins = {
        a.name: [p for p in plain if _shared_values(p) == _shared_values(a)] for a in distilled
    }
    pairs = {name: found[0] for name, found in twins.items() if len(found) == 1}
    if pairs:
        return pairs, "Each arm's control is the arm without a teacher that is otherwise like it."
    count = "No arm trains" if not plain else f"{len(plain)} arms train"
    return {}, f"{count} without a teacher, so there is no control. Choose one with --control."


def _shared_values(arm: Arm) -> dict[str, str]:
    return {n: v for n, v in arm.values.items() if n.split(".")[0] not in ("teacher", "loss")}


def _find_arm(arms: Sequence[Arm], wanted: str) -> Arm:
    place = Path(wanted).expanduser().resolve()
    for arm in arms:
        folders = [run.folder.resolve() for run in arm.runs]
        if wanted in (arm.name, arm.label) or place in folders:
            return arm
    names = [arm.name for arm in arms]
    hint = did_you_mean(wanted, names)
    raise UserError(
        f"--control: expected a run or an arm, got {wanted}.{hint} The arms:\n  "
        + "\n  ".join(names)
    )
