"""python -m kd_jax.sweep --config FILE --set FIELD VALUE VALUE: a run for each value and seed."""

import hashlib
import itertools
import json
import re
import shlex
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from kd_jax.config import Config, UserError
from kd_jax.config.checks import Checked, OptionalPath, PathText, Range
from kd_jax.config.command import parse_args, parse_config, run_command
from kd_jax.config.errors import raise_all
from kd_jax.config.flags import flag_groups, flag_name, flag_names, split_flags
from kd_jax.config.record import differences, dump, flatten, keep_chosen, path_fields
from kd_jax.config.streams import outlive_readers
from kd_jax.parallel.signals import handled, stop_numbers
from kd_jax.reporting.arms import short_names
from kd_jax.workdir.history import check_no_foreign_files, is_workdir, read_record, read_runs
from kd_jax.workdir.integrity import completion

_RESUMES = "the same command resumes the unfinished runs"


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepArgs(Checked):
    config: PathText
    """Python file with get_config(); every run starts from it."""
    set: tuple[str, ...] = ()
    """A field and its values: --set loss.kd-ratio 0 0.5 1. Repeat the flag for other fields; there
    is one run for each combination."""
    seeds: Annotated[int | None, Range(least=1)] = None
    """Runs of each combination, with seeds 0 to N - 1. None: one run with the file's seed."""
    workdir: OptionalPath = None
    """Folder for the workdirs of all runs. None: the file's workdir with -sweep appended."""
    cache: OptionalPath = None
    """Folder of a teacher's cache: kd_jax.cache first fills it with what the runs' documents lack,
    then every run reads it. The runs must have one teacher."""
    keep_going: bool = False
    """Continue with the next run after a failure."""
    dry_run: bool = False
    """Print the commands without running them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """A planned run: its folder, its own flags, and the configuration they result in."""

    folder: Path
    flags: list[str]
    config: Config


def main(argv: Sequence[str]) -> None:
    with outlive_readers():
        sweep(argv)


def sweep(argv: Sequence[str]) -> None:
    own, common, grid = _split(argv)
    description = f"{__doc__}\n\nEvery run gets all other flags, which are those of kd_jax.train."
    args = parse_args(SweepArgs, own, description)
    plans = make_plans(args, grid, common)
    _check_workdirs(plans)
    if args.cache is not None:
        _fill_cache(args, args.cache, plans, common)
    elif (count := sum(x.config.distils and not x.config.reads_cache for x in plans)) > 1:
        print(f"--cache DIR would run the teacher once for these {count} runs")
    failed: dict[Path, int] = {}
    for number, plan in enumerate(plans, start=1):
        flags = [*common, *plan.flags, "--workdir", str(plan.folder)]
        if args.cache is not None and plan.config.teacher is not None:
            flags += ["--teacher.cache", args.cache]
        command = ["-m", "kd_jax.train", "--config", args.config, *flags]
        print(f"[{number}/{len(plans)}] python {shlex.join(command)}", flush=True)
        if completion(plan.folder):
            print("finished before: skipped", flush=True)
            continue
        if args.dry_run:
            continue
        status = _run(command)
        if status == 0 and not completion(plan.folder):
            status = 1  # a run that itself got a SIGTERM saves and exits with 0
        if status:
            failed[plan.folder] = status
            if not args.keep_going:
                break
    if args.cache is not None:
        _tell_costs(plans)
    _conclude(plans, failed)


def _split(argv: Sequence[str]) -> tuple[list[str], list[str], dict[str, list[str]]]:
    """Returns the sweep's own arguments, the arguments of every run, and the values by field.

    Raises:
      UserError: a --set lacks a field or values, repeats one, or contradicts another flag.
    """
    flags, common = split_flags(SweepArgs, Config, argv)
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
        repeated = [value for value, count in Counter(values).items() if count > 1]
        problems += [f"--set {field}: {value} is given twice" for value in repeated]
        grid[field] = values
    fixed = {flag_name(word) for word in common}
    problems += [
        f"--set {field}: expected it once, got --{field} for all runs too"
        for field in grid
        if field in fixed
    ]
    if "workdir" in grid:
        problems.append("--set workdir: each run has a folder of its own below --workdir")
    if "seeds" in map(flag_name, own) and ("seed" in grid or "seed" in fixed):
        problems.append("--seeds: expected either --seeds N or values of seed, got both")
    raise_all(problems)
    return own, common, grid


def make_plans(args: SweepArgs, grid: dict[str, list[str]], common: Sequence[str]) -> list[Plan]:
    """Returns the planned runs: all combinations with the first seed, then with the next.

    Raises:
      UserError: lists every problem of every configuration, or the runs that are equal.
    """
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
            argv = ["--config", args.config, *common, *flags]
            config = parse_config(argv)
            _check_cached(config, args.cache)
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


def _check_cached(config: Config, cache: str | None) -> None:
    """Raises UserError for a run that cannot read the sweep's cache, before any run starts."""
    if cache is None or config.teacher is None or not config.distils:
        return
    if config.reads_cache:
        raise UserError(
            f"--teacher.cache: expected none beside --cache, got {config.teacher.cache}"
        )
    replace(config, teacher=replace(config.teacher, cache=cache))


def _flag(field: str, value: str) -> list[str]:
    """Returns the command-line words that set a field to a value."""
    if field in flag_names(Config, only=bool):
        if value not in ("true", "false"):
            raise UserError(f"--set {field}: expected true or false, got {value}")
        group, dot, name = field.rpartition(".")
        return [f"--{group}{dot}{'' if value == 'true' else 'no-'}{name}"]
    if field in flag_names(Config, only=tuple):
        return [f"--{field}", *value.split()]
    return [f"--{field}", value]


def _file_name(value: str) -> str:
    """Returns a value as part of a folder's name; a shortened one gets a hash of the whole."""
    plain = re.sub(r"[^\w.+-]+", "_", value.rstrip("/").split("/")[-1])[-40:]
    return plain if plain == value else f"{plain}-{hashlib.sha256(value.encode()).hexdigest()[:6]}"


def _check_distinct(plans: Sequence[Plan]) -> None:
    """Raises UserError for runs that are equal, such as those of 0.5 and .5."""
    first: dict[str, str] = {}
    problems = []
    for plan in plans:
        fields = flatten(dump(plan.config)) | {"workdir": ""}
        given = {name: fields.get(name) for name in path_fields()}
        places = {x: str(Path(y).expanduser().resolve()) for x, y in given.items() if y}
        key = json.dumps(fields | places, sort_keys=True)
        name = plan.folder.name
        if (other := first.setdefault(key, name)) != name:
            problems.append(f"--set: expected different runs, got {other} and {name}, one run")
    raise_all(problems)


def _check_workdirs(plans: Sequence[Plan]) -> None:
    """Raises UserError for folders that hold a run with another configuration."""
    problems = []
    root = plans[0].folder.parent
    if other := _other_content(root):
        problems.append(f"--workdir: expected a folder for many runs, got {root}, {other}")
    for plan in plans:
        try:
            check_no_foreign_files(plan.folder)
            if not any(plan.folder.glob("checkpoints/[0-9]*")):
                continue
            old = read_record(plan.folder / "config.json")["config"]
        except UserError as error:
            problems.append(str(error))
            continue
        if changed := differences(old, dump(keep_chosen(plan.config, old))):
            problems.append(
                f"{plan.folder}: belongs to a run with another configuration: {'; '.join(changed)}"
            )
    if problems:
        raise UserError("\n".join([*problems, "Give another --workdir, or the old values"]))


def _other_content(root: Path) -> str:
    """Returns what a folder is, "" if it is absent, empty, or holds workdirs."""
    if not root.is_dir():
        return "which is a file" if root.exists() else ""
    if is_workdir(root):
        return "which is one run"
    if not any(root.iterdir()) or any(map(is_workdir, root.iterdir())):
        return ""
    return "which holds other files and no run"


def _fill_cache(args: SweepArgs, cache: str, plans: Sequence[Plan], common: Sequence[str]) -> None:
    """Runs kd_jax.cache once for each data set of the runs that distil and are not finished.

    A cache that is there in another form than the default is used as it is.

    Raises:
      UserError: the runs have several teachers, or a loss that the cache does not serve.
      SystemExit: the command failed.
    """
    from kd_jax.setup.cached import loss_problems
    from kd_jax.teachers.manifest import read_cache

    distilling = [plan for plan in plans if plan.config.distils]
    teachers = {
        replace(x.config.teacher, cache=None, cache_rest="bucket")
        for x in distilling
        if x.config.teacher
    }
    if len(teachers) > 1:
        raise UserError(
            f"--cache: expected runs with one teacher, got {len(teachers)}. Sweep each teacher "
            "alone, with a cache of its own"
        )
    there = read_cache(cache, "--cache")
    if there is not None and (there.kind != "hidden" or "scales" in there.fields):
        problems = [x for plan in distilling for x in loss_problems(there, plan.config)]
        raise_all([*dict.fromkeys(problems)])
        print(f"[cache] {cache} is used as it is: {there.kind} of {', '.join(there.fields)}")
        return
    first: dict[tuple, Plan] = {}
    for plan in distilling:
        if not completion(plan.folder):
            config = plan.config
            first.setdefault((config.data, config.eval, config.student.path), plan)
    for plan in first.values():
        flags = [*common, *plan.flags, "--out", cache]
        command = ["-m", "kd_jax.cache", "--config", args.config, *flags]
        print(f"[cache] python {shlex.join(command)}", flush=True)
        if args.dry_run:
            continue
        start = time.monotonic()
        if status := _run(command):
            raise SystemExit(max(status, 1))
        print(f"[cache] {time.monotonic() - start:,.0f} s, once for all runs", flush=True)


def _tell_costs(plans: Sequence[Plan]) -> None:
    """Prints what the finished runs took with the cache, and what a live teacher would take."""
    from kd_jax.reporting.teacher_cost import shared_teachers

    finished = [plan.folder for plan in plans if completion(plan.folder)]
    try:
        for one in shared_teachers(read_runs(finished)):
            print(f"[cache] {one}")
    except UserError as error:
        print(f"[cache] no costs: {error}")


def _run(command: Sequence[str]) -> int:
    """Returns a run's exit status.

    The run has a process group of its own: Ctrl-C reaches it once, and it saves.

    Raises:
      KeyboardInterrupt: a signal arrived, which the run got as well.
    """
    child = subprocess.Popen([sys.executable, *command], process_group=0)
    received: list[int] = []

    def forward(number: int, _: Any) -> None:
        received.append(number)
        child.send_signal(number)

    with handled(stop_numbers(), forward):
        status = child.wait()
    if received:
        print(_RESUMES, file=sys.stderr)
        raise KeyboardInterrupt
    return status


def _conclude(plans: Sequence[Plan], failed: dict[Path, int]) -> None:
    """Prints failures and the next command; raises SystemExit with the first failure's status."""
    for folder, status in failed.items():
        how = f"ended with status {status}" if status > 0 else f"was killed by signal {-status}"
        print(f"{folder}: {how}", file=sys.stderr)
    if failed:
        print(_RESUMES, file=sys.stderr)
    print(f"report: python -m kd_jax.report {shlex.quote(str(plans[0].folder.parent))}/*")
    if failed:
        raise SystemExit(max(next(iter(failed.values())), 1))


if __name__ == "__main__":
    sys.exit(run_command(main))
