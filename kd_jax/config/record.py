"""A configuration as JSON, and which of its fields a resumed run may change."""

import dataclasses
import json
from typing import Any, get_args

from kd_jax.config.run import Config

# Fields that may differ when a run is resumed: where, how and in how much memory, never what is
# computed. Of what a path names, the content counts (checkpoint.claim_workdir).
RESUMABLE = frozenset(
    {
        "workdir",
        "teacher.path",
        "teacher.adapter",
        "teacher.shard_over",
        "student.path",
        "student.adapter",
        "student.shard_over",
        "data.path",
        "data.cache_dir",
        "compilation_cache",
        "remat",
        "attention",
        "loss.chunk_tokens",
        "log.*",
        "mesh.*",
        "distributed.*",
        "checkpoint.*",
        "eval.*",
    }
)


def dump(config: Config) -> dict[str, Any]:
    """Returns the config as what JSON holds; `from_json` is its inverse."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_json(tree: dict[str, Any]) -> Config:
    """Returns the Config that `dump` made `tree` from."""
    kinds: dict[str, Any] = {
        entry.name: part_of(entry.type) for entry in dataclasses.fields(Config)
    }
    return Config(
        **{n: kinds[n](**_tuples(v)) if isinstance(v, dict) else v for n, v in tree.items()}
    )


def _tuples(part: dict[str, Any]) -> dict[str, Any]:
    """Returns the fields of a part with tuples for the lists that JSON made of them."""
    return {name: tuple(x) if isinstance(x, list) else x for name, x in part.items()}


def part_of(kind: Any) -> Any:
    """Returns the dataclass that an annotation names, alone or beside None; else None."""
    return next((k for k in get_args(kind) or (kind,) if dataclasses.is_dataclass(k)), None)


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Returns `field: old -> new` for each field of two dumps that resuming may not change."""
    old_fields, new_fields = flatten(old), flatten(new)
    changed = []
    for name in sorted(old_fields.keys() | new_fields.keys()):
        before, after = old_fields.get(name), new_fields.get(name)
        free = name in RESUMABLE or f"{name.split('.')[0]}.*" in RESUMABLE
        if before != after and not free:
            changed.append(f"{name}: {before!r} -> {after!r}")
    return changed


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns a nested dict's leaves by dotted name."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat
