"""python -m kd_jax.sweep --config FILE --set FIELD VALUE VALUE --seeds N: a run for each choice."""

import dataclasses
import hashlib
import itertools
import json
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_origin

from kd_jax.config import Config, UserError
from kd_jax.config.command import (
    flag_groups,
    flag_name,
    parse_args,
    parse_config,
    run_command,
    split_flags,
)
from kd_jax.config.record import differences, dump, part_of
from kd_jax.reporting.arms import short_names
from kd_jax.workdir.history import completion


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepArgs:
    config: str
    """Python file with get_config(), the base of every run."""
    set: tuple[str, ...] = ()
    """A field and its values: --set loss.kd-ratio 0 0.5 1. Given once a field; the runs are all
    combinations."""
    seeds: int | None = None
    """Runs of each combination, with the seeds 0 to N - 1; None takes the file's seed."""
    workdir: str | None = None
    """Folder of the runs' workdirs; None takes the file's workdir with -sweep behind it."""
    keep_going: bool = False
    """Go on with the next run after one that failed."""
    dry_run: bool = False
    """Print the commands and start nothing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """A run to be: its folder, the flags that make it, and what they amount to."""

    folder: Path
    flags: list[str]
    config: Config


def main(argv: Sequence[str]) -> None:
    own, common, grid = _split(argv)
    prog = "python -m kd_jax.sweep"
    description = f"{__doc__}\n\nAny other flag of kd_jax.train is given to every run."
    args = parse_args(SweepArgs, own, prog=prog, description=description)
    plans = make_plans(args, grid, common)
    _check_workdirs(plans)
    failed: dict[Path, int] = {}
    for number, plan in enumerate(plans, start=1):
        flags = [*common, *plan.flags, "--workdir", str(plan.folder)]
        command = ["-m", "kd_jax.train", "--config", args.config, *flags]
        print(f"[{number}/{len(plans)}] python {shlex.join(command)}", flush=True)
        if completion(plan.folder):
            print("finished before: skipped", flush=True)
            continue
        if args.dry_run:
            continue
        status, stopped = _run(command)
        if status == 0 and completion(plan.folder) is False:
            status = 1  # a run that is told to stop saves, and ends well
        if status:
            failed[plan.folder] = status
        if stopped or (status and not args.keep_going):
            break
    _conclude(plans, failed)


def _split(argv: Sequence[str]) -> tuple[list[str], list[str], dict[str, list[str]]]:
    """Returns the sweep's own arguments, those of every run, and the values by field.

    Raises:
      UserError: a --set lacks its field or values, or names a field again.
    """
    flags, common = split_flags(SweepArgs, argv)
    own: list[str] = []
    grid: dict[str, list[str]] = {}
    problems = []
    for words in flag_groups(flags):
        if flag_name(words[0]) != "set":
            own += words
            continue
        field, values = "".join(words[1:2]).removeprefix("--").replace("_", "-"), words[2:]
        if not values:
            problems.append(f"--set: expected FIELD VALUE VALUE..., got {' '.join(words[1:])!r}")
        if field in grid:
            problems.append(f"--set {field}: given twice. Give all of its values at once")
        problems += [
            f"--set {field}: {value} is given twice"
            for value in dict.fromkeys(values)
            if values.count(value) > 1
        ]
        grid[field] = values
    problems += _conflicts(own, common, grid)
    if problems:
        raise UserError("\n".join(problems))
    return own, common, grid


def _conflicts(
    own: Sequence[str], common: Sequence[str], grid: dict[str, list[str]]
) -> Iterator[str]:
    """Yields what is said in two places."""
    fixed = {flag_name(word) for word in common}
    for field in grid:
        if field in fixed:
            yield f"--set {field}: expected it once, got --{field} for all runs too"
    if "workdir" in grid:
        yield "--set workdir: each run has a folder of its own below --workdir"
    flags = {word.split("=")[0] for word in own}
    if "--seeds" in flags and ("seed" in grid or "seed" in fixed):
        yield "--seeds: expected either --seeds N or values of seed, got both"


def make_plans(args: SweepArgs, grid: dict[str, list[str]], common: Sequence[str]) -> list[Plan]:
    """Returns the runs, all combinations with one seed before the next seed.

    Raises:
      UserError: with everything that any run's configuration is wrong in, or two runs are the same.
    """
    if args.seeds is not None and args.seeds < 1:
        raise UserError(f"--seeds: expected at least 1, got {args.seeds}")
    seeds = {} if args.seeds is None else {"seed": [str(seed) for seed in range(args.seeds)]}
    axes = {**seeds, **grid}
    if not axes:
        raise UserError("--set: expected a field with its values, or --seeds, got neither")
    names = short_names([*grid, *seeds])
    plans: list[Plan] = []
    problems: dict[str, None] = {}
    for values in itertools.product(*axes.values()):
        choice = dict(zip(axes, values, strict=True))
        try:
            flags = [word for field, value in choice.items() for word in _flag(field, value)]
            config = _parse(args.config, [*common, *flags])
        except UserError as error:
            problems |= dict.fromkeys(str(error).splitlines())
            continue
        root = Path(args.workdir or f"{config.workdir.rstrip('/')}-sweep").expanduser()
        folder = root / ",".join(f"{names[f]}={_file_name(choice[f])}" for f in names)
        plans.append(Plan(folder=folder, flags=flags, config=config))
    if problems:
        raise UserError("\n".join([*problems, "No run was started"]))
    _check_distinct(plans)
    return plans


def _parse(file: str, flags: Sequence[str]) -> Config:
    return parse_config(["--config", file, *flags], prog="python -m kd_jax.train", description="")


def _flag(field: str, value: str) -> list[str]:
    """Returns the words that give a field of a run's configuration its value."""
    kind = _kind(field)
    if kind is bool:
        if value not in ("true", "false"):
            raise UserError(f"--set {field}: expected true or false, got {value}")
        group, dot, name = field.rpartition(".")
        return [f"--{group}{dot}{'' if value == 'true' else 'no-'}{name}"]
    if get_origin(kind) is tuple:
        return [f"--{field}", *value.split()]
    return [f"--{field}", value]


def _kind(field: str) -> Any:
    """Returns the annotated type of a field by its flag's name; None where there is none."""
    kind: Any = Config
    for name in field.replace("-", "_").split("."):
        kind = part_of(kind)
        fields = {} if kind is None else {e.name: e.type for e in dataclasses.fields(kind)}
        kind = fields.get(name)
    return kind


def _file_name(value: str) -> str:
    """Returns a value as part of a folder's name: of a path the end, and a hash of what is lost."""
    plain = re.sub(r"[^\w.+-]+", "_", value.rstrip("/").split("/")[-1])[-40:]
    return plain if plain == value else f"{plain}-{hashlib.sha256(value.encode()).hexdigest()[:6]}"


def _check_distinct(plans: Sequence[Plan]) -> None:
    """Raises UserError where values that are spelt differently make the same run."""
    first: dict[str, str] = {}
    problems = []
    for plan in plans:
        key = json.dumps({**dump(plan.config), "workdir": ""}, sort_keys=True)
        if key in first:
            problems.append(
                f"--set: expected different runs, got the same one as {first[key]} and as "
                f"{plan.folder.name}"
            )
        first.setdefault(key, plan.folder.name)
    if problems:
        raise UserError("\n".join(problems))


def _check_workdirs(plans: Sequence[Plan]) -> None:
    """Raises UserError where a folder belongs to a run of another configuration."""
    problems = []
    root = plans[0].folder.parent
    if (root / "config.json").exists():
        problems.append(f"--workdir: expected a folder for many runs, got {root}, which is one run")
    for plan in plans:
        try:
            old = json.loads((plan.folder / "config.json").read_text())["config"]
        except FileNotFoundError:
            continue
        except (OSError, ValueError, KeyError, TypeError) as error:
            problems.append(f"{plan.folder}: expected a workdir of kd_jax.train, got {error!r}")
            continue
        changed = differences(old, dump(plan.config))
        if changed and any(plan.folder.glob("checkpoints/[0-9]*")):
            problems.append(
                f"{plan.folder}: belongs to a run with another configuration: {'; '.join(changed)}"
            )
    if problems:
        raise UserError("\n".join([*problems, "Give another --workdir, or the old values"]))


def _run(command: Sequence[str]) -> tuple[int, bool]:
    """Returns a run's exit status, and whether a SIGTERM came, which is passed on to it."""
    child = subprocess.Popen([sys.executable, *command])
    received: list[int] = []

    def pass_on(number: int, _: Any) -> None:
        received.append(number)
        child.terminate()

    before = signal.signal(signal.SIGTERM, pass_on)
    try:
        return child.wait(), bool(received)
    except BaseException:
        child.terminate()
        child.wait()
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


def _conclude(plans: Sequence[Plan], failed: dict[Path, int]) -> None:
    """Prints what failed and what comes next; raises SystemExit with the first failure's status."""
    for folder, status in failed.items():
        how = f"ended with status {status}" if status > 0 else f"was killed by signal {-status}"
        print(f"{folder}: {how}", file=sys.stderr)
    if failed:
        print("the same command goes on with what is not finished", file=sys.stderr)
    print(f"report: python -m kd_jax.report {shlex.quote(str(plans[0].folder.parent))}/*")
    if failed:
        raise SystemExit(max(next(iter(failed.values())), 1))


if __name__ == "__main__":
    sys.exit(run_command(main))
