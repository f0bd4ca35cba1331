"""Runs that differ in their seed alone are an arm; arms and their names. Needs no jax."""

import dataclasses
import difflib
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kd_jax.config import Config, UserError
from kd_jax.config.command import flag_names
from kd_jax.config.record import flatten
from kd_jax.workdir.history import Run, identity

# Fields that neither change what is learned nor what it costs.
IGNORED = re.compile(
    r"workdir|seed|data\.cache_dir|compilation_cache|eval\.every_steps|(log|checkpoint)\..*"
)


JOIN = " · "


LABEL_SIZE = 26  # characters that leave a figure its room


@dataclass(frozen=True, kw_only=True, slots=True)
class Arm:
    """Runs that differ in nothing but their seed."""

    name: str
    """Such as `kd-ratio=0.25, learning-rate=0.0001`."""
    label: str
    """The values alone, such as `0.25 · 0.0001`; `arm 1` and so on where these would be long."""
    values: dict[str, str]
    """By each field in which the arms differ, as shown."""
    runs: list[Run]

    @property
    def distils(self) -> bool:
        return self.runs[0].distils

    @property
    def finished(self) -> list[Run]:
        return [run for run in self.runs if run.finished]


def make_arms(runs: Sequence[Run]) -> list[Arm]:
    """Returns the arms, those without a teacher first, then by the values of their fields."""
    settings = [dict(_settings(run)) for run in runs]
    names = _differing(settings)
    shown = {name: _shown([setting.get(name) for setting in settings]) for name in names}
    short = short_names(names)
    groups: dict[tuple[str, ...], list[int]] = {}
    for i in range(len(runs)):
        groups.setdefault(tuple(shown[name][i] for name in names), []).append(i)
    arms = []
    for key, members in groups.items():
        values = dict(zip(names, key, strict=True))
        alone = runs[members[0]].folder.name if len(members) == 1 else "all runs"
        arms.append(
            Arm(
                name=", ".join(f"{short[name]}={v}" for name, v in values.items()) or alone,
                label=JOIN.join(values.values()) or _cut(alone, LABEL_SIZE),
                values=values,
                runs=sorted((runs[i] for i in members), key=lambda run: (run.seed, run.folder)),
            )
        )
    arms.sort(key=lambda arm: (arm.distils, [_rank(v) for v in arm.values.values()]))
    if max(len(arm.label) for arm in arms) <= LABEL_SIZE:
        return arms
    return [dataclasses.replace(arm, label=f"arm {i}") for i, arm in enumerate(arms, start=1)]


def label_names(arms: Sequence[Arm]) -> str:
    """Returns the names of the fields that the labels give; none where labels are numbers."""
    by_value = arms[0].label == JOIN.join(arms[0].values.values())
    return JOIN.join(short_names(list(arms[0].values)).values()) if by_value else ""


def short_names(names: Sequence[str]) -> dict[str, str]:
    """Returns each field's last word as a flag spells it, or all of its name where two have it."""
    flags = [name.replace("_", "-") for name in names]
    last = Counter(flag.split(".")[-1] for flag in {*flags, *flag_names(Config)})
    words = {name: flag.split(".")[-1] for name, flag in zip(names, flags, strict=True)}
    return {n: words[n] if last[words[n]] == 1 else n.replace("_", "-") for n in names}


def _settings(run: Run) -> Iterator[tuple[str, tuple[Any, str]]]:
    """Yields each field that counts: its value, and what tells it from others, such as a hash.

    Without a teacher the fields about it say nothing, and its share of the loss is 0.
    """
    for name, value in flatten(run.record["config"]).items():
        if IGNORED.fullmatch(name) or (name.split(".")[0] == "teacher" and not run.distils):
            continue
        if name == "loss.kd_ratio" and not run.distils:
            value = 0.0
        yield name, (value, run.record["inputs"].get(name, identity(value)))


def _differing(settings: Sequence[dict[str, tuple[Any, str]]]) -> list[str]:
    """Returns the fields that tell the arms apart; a run without a field takes no side in it.

    A path of which only the content differs, as it does with other options of the rows, is left
    out where the other fields tell the same arms apart.
    """
    names = {name: None for setting in settings for name in setting}
    found = {n: {setting[n][1] for setting in settings if n in setting} for n in names}
    differing = [name for name in names if len(found[name]) > 1]

    def num_arms(fields: Sequence[str]) -> int:
        return len({tuple(setting.get(n, (0, ""))[1] for n in fields) for setting in settings})

    for name in tuple(differing):
        values = {identity(setting[name][0]) for setting in settings if name in setting}
        others = [other for other in differing if other != name]
        if len(values) == 1 and num_arms(others) == num_arms(differing):
            differing = others
    return differing


def _shown(settings: Sequence[tuple[Any, str] | None]) -> list[str]:
    """Returns each value as short as it can be while different ones stay different."""
    ids = [None if setting is None else setting[1] for setting in settings]
    words: list[str] = []
    for shorten in (_brief, lambda value: _brief(value, 2), str):
        words = ["–" if setting is None else shorten(setting[0]) for setting in settings]
        if len(set(words)) == len(set(ids)):
            return words
    # The same path with another content: the beginning of its hash tells them apart.
    words = ["–" if setting is None else _brief(setting[0]) for setting in settings]
    return [f"{w} #{i[:6]}" if i else w for w, i in zip(words, ids, strict=True)]


def _brief(value: Any, parts: int = 1) -> str:
    """Returns a value in at most 28 characters: numbers plain, of a path its last `parts`."""
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list):
        return _cut("+".join(map(str, value)))
    return _cut("/".join(str(value).rstrip("/").split("/")[-parts:]))


def _cut(text: str, size: int = 28) -> str:
    return text if len(text) <= size else f"{text[: size // 2 - 1]}…{text[-size // 2 :]}"


def _rank(shown: str) -> tuple[int, float, str]:
    """Returns what numbers sort by as numbers, before words."""
    try:
        return 0, float(shown), ""
    except ValueError:
        return 1, 0.0, shown


def find_controls(arms: Sequence[Arm], wanted: str | None) -> tuple[dict[str, Arm], str]:
    """Returns the control of each arm that has one, by the arm's name, and a sentence about them.

    Without `wanted`, an arm's control is the one without a teacher that agrees with it in all that
    does not concern the teacher, or the only one without a teacher that there is.

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
    if len(plain) == 1:
        others = {arm.name: plain[0] for arm in arms if arm.distils}
        return others, f"The control is {plain[0].name}, the one arm without a teacher."
    pairs = {}
    for arm in arms:
        twins = [other for other in plain if _but_for_teacher(other) == _but_for_teacher(arm)]
        if arm.distils and len(twins) == 1:
            pairs[arm.name] = twins[0]
    if pairs:
        return pairs, "An arm's control is the one without a teacher that is otherwise like it."
    count = "No arm trains" if not plain else f"{len(plain)} arms train"
    return {}, f"{count} without a teacher, so there is no control; --control names one."


def _but_for_teacher(arm: Arm) -> dict[str, str]:
    return {n: v for n, v in arm.values.items() if n.split(".")[0] not in ("teacher", "loss")}


def _find_arm(arms: Sequence[Arm], wanted: str) -> Arm:
    place = Path(wanted).expanduser().resolve()
    for arm in arms:
        folders = [run.folder.resolve() for run in arm.runs]
        if wanted in (arm.name, arm.label) or place in folders:
            return arm
    known = "\n  ".join(arm.name for arm in arms)
    near = difflib.get_close_matches(wanted, [arm.name for arm in arms], 1)
    hint = f" Did you mean {near[0]}?" if near else ""
    raise UserError(
        f"--control: expected one of the runs or of the arms, got {wanted}.{hint} The arms:"
        f"\n  {known}"
    )
