"""A configuration as JSON, and the fields that a resumed run may change."""

import dataclasses
import json
import re
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, get_args

from kd_jax.config.checks import IS_PATH, metadata
from kd_jax.config.errors import UserError
from kd_jax.config.run import Config

# Fields that a resumed run may change: paths, memory and speed, never results. Files behind a path
# are compared by content (workdir.record).
RESUMABLE = re.compile(
    r"workdir|(teacher|student)\.(path|adapter|shard_over)|teacher\.cache(_missing)?"
    r"|data\.(path|cache_dir|chat_template|num_processes)"
    r"|compilation_cache|remat|attention|loss\.chunk_tokens|on_policy\.log_samples"
    r"|(log|mesh|distributed|checkpoint)\..*|eval\.(?!fraction).*"
)


def dump(config: Config) -> dict[str, Any]:
    """Returns the config as JSON types; `from_json` is its inverse."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_json(tree: dict[str, Any]) -> Config:
    """Returns the Config that `dump` made `tree` from."""
    kinds: dict[str, Any] = {
        entry.name: part_of(entry.type) for entry in dataclasses.fields(Config)
    }

    def value(name: str, x: Any) -> Any:
        if not isinstance(x, dict):
            return x
        return kinds[name](**{n: tuple(y) if isinstance(y, list) else y for n, y in x.items()})

    return Config(**{name: value(name, x) for name, x in tree.items()})


def keep_chosen(config: Config, old: dict[str, Any]) -> Config:
    """Returns the config with a dump's values of dtype and remat where it says "auto"."""
    changes: dict[str, Any] = {}
    if config.remat == "auto" and "remat" in old:
        changes["remat"] = old["remat"]
    for name in ("teacher", "student"):
        part, before = getattr(config, name), old.get(name)
        if part is not None and part.dtype == "auto" and before and "dtype" in before:
            changes[name] = dataclasses.replace(part, dtype=before["dtype"])
    return dataclasses.replace(config, **changes)


def part_of(kind: Any) -> Any:
    """Returns the dataclass of an annotation such as `Part` or `Part | None`; else None."""
    kinds = [k for k in (kind, *get_args(kind)) if isinstance(k, type)]
    return next(filter(dataclasses.is_dataclass, kinds), None)


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Returns `field: old -> new` for each field of two dumps that a resumed run may not change.

    Fields that `old` lacks, since it is of an earlier version of kd_jax, have their defaults.
    """
    with suppress(UserError, KeyError, TypeError):  # a field is unknown or has another type
        old = dump(from_json(old))
    old_fields, new_fields = flatten(old), flatten(new)
    changed = []
    for name in sorted(old_fields.keys() | new_fields.keys()):
        before, after = old_fields.get(name), new_fields.get(name)
        if before != after and not RESUMABLE.fullmatch(name):
            changed.append(f"{name}: {before!r} -> {after!r}")
    return changed


def path_fields(cls: Any = Config, prefix: str = "") -> Iterator[str]:
    """Yields the dotted names of the fields whose value is a path, an address or a hub id."""
    for entry in dataclasses.fields(cls):
        if part := part_of(entry.type):
            yield from path_fields(part, f"{prefix}{entry.name}.")
        elif IS_PATH in metadata(entry.type):
            yield prefix + entry.name


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns a nested dict's leaves by dotted name."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat
