"""Flags as words: names, groups, switches, and the unknown ones."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, get_origin

from kd_jax.config.checks import plain_type
from kd_jax.config.errors import UserError, did_you_mean, raise_all
from kd_jax.config.record import part_of


def plain_switches(cls: type, argv: Sequence[str]) -> list[str]:
    """Returns the arguments with `--data.pack False` and `--data.pack=False` as --data.no-pack."""
    opposite: dict[str, str] = {}
    for name in flag_names(cls, only=bool):
        part, dot, last = name.rpartition(".")
        off = f"{part}{dot}no-{last}"
        opposite |= {name: off, off: name}
    words: list[str] = []
    for group in flag_groups(argv):
        name, value, rest = flag_name(group[0]), group[0].partition("=")[2], group[1:]
        given = [value, *rest] if value else rest
        if name not in opposite or not given:
            words += group
        elif len(given) == 1 and given[0].lower() in ("true", "false"):
            words.append(f"--{name if given[0].lower() == 'true' else opposite[name]}")
        else:
            raise UserError(
                f"--{name}: expected --{name} or --{opposite[name]}, got {' '.join(group)}"
            )
    return words


def check_flags(cls: type, argv: Sequence[str]) -> None:
    """Raises UserError with every unknown flag and the nearest known ones."""
    known = {"help", *flag_names(cls)}
    problems = []
    given = [flag_name(word) for word in argv if word.startswith("--")]
    for name in flag_names(cls, only=tuple):  # tyro would keep only the last values
        if given.count(name) > 1:
            problems.append(f"--{name}: given twice. Give all of its values after one --{name}")
    problems += [_unknown(name, known) for name in given if name not in known]
    raise_all(problems)


def _unknown(name: str, known: set[str]) -> str:
    group = f"{name.split('.')[0]}."
    others = ", ".join(f"--{flag}" for flag in sorted(known) if flag.startswith(group))
    hint = f" There are {others}" if others else " --help lists the flags"
    return f"--{name}: no such flag.{did_you_mean(name, known, '--') or hint}"


def flag_names(cls: Any, prefix: str = "", only: type | None = None) -> Iterator[str]:
    """Yields the names of a dataclass's flags, the `--no-` forms of switches included.

    Args:
      only: type of the fields to yield, such as tuple for flags of several values; None: all.
    """
    for entry in dataclasses.fields(cls):
        name, kind = entry.name.replace("_", "-"), plain_type(entry.type)
        if part := part_of(entry.type):
            yield from flag_names(part, f"{prefix}{name}.", only)
        elif only is None or only in (kind, get_origin(kind)):
            yield prefix + name
        if kind is bool and only is None:
            yield f"{prefix}no-{name}"


def split_flags(cls: type, other: type, argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Returns the words of `cls`'s flags and of --help, and the words of the other class's flags.

    Raises:
      UserError: a flag is of neither; the message names the nearest.
    """
    names = set(flag_names(cls)) | {"help"}
    known = {*names, "config", *flag_names(other)}  # its file is read beside its flags
    given = [flag_name(word) for word in argv if word.startswith("--")]
    raise_all([_unknown(name, known) for name in given if name not in known])
    own: list[str] = []
    others: list[str] = []
    for words in flag_groups(argv):
        mine = flag_name(words[0]) in names or words[0] == "-h"
        (own if mine else others).extend(words)
    return own, others


def flag_groups(argv: Sequence[str]) -> Iterator[list[str]]:
    """Yields each flag with the words up to the next one."""
    group: list[str] = []
    for word in argv:
        if word.startswith("--") and group:
            yield group
            group = []
        group.append(word)
    if group:
        yield group


def flag_name(word: str) -> str:
    """Returns the name of `--some_flag=value`, some-flag."""
    return word.removeprefix("--").split("=")[0].replace("_", "-")
