"""Tokens and seconds of the teacher's passes into a cache: cost.json in the folder of each part."""

import json
from typing import NamedTuple

import tensorstore as ts

from kd_jax.config import UserError
from kd_jax.parallel.progress import Progress
from kd_jax.teachers.storage import list_files, open_folder, read_file, write_json

COST = "cost.json"


class Cost(NamedTuple):
    """Sums over all passes into a cache."""

    tokens: int = 0
    """Tokens that the teacher read, prompts and padding among them."""
    seconds: float = 0.0
    """With compiling and writing, without loading."""
    warm_tokens: int = 0
    """Those of all batches but the first of each pass, which compiles."""
    warm_seconds: float = 0.0

    @property
    def seconds_per_token(self) -> float:
        if self.warm_tokens:
            return self.warm_seconds / self.warm_tokens
        return self.seconds / self.tokens if self.tokens else 0.0


def cost_of(measured: Progress, share: float) -> Cost:
    """Returns the cost of a whole pass, of which `share` was done since the start."""
    whole = round(measured.tokens / share), measured.seconds / share
    return Cost(*whole, measured.warm_tokens, measured.warm_seconds)


def write_cost(part: ts.KvStore, cost: Cost) -> None:
    """Writes what a part cost into its folder."""
    write_json(part, COST, cost._asdict())


def read_cost(path: str) -> Cost | None:
    """Returns what the cache in a folder, or at an address, cost; None if it is not recorded."""
    try:
        store = open_folder(path)
        # Caches of before have one file for all parts, beside the manifest.
        names = [x for x in list_files(store) if x.split("/")[-1] == COST]
        costs = [Cost(**json.loads(read_file(store, x) or b"")) for x in names]
        return Cost._make(sum(x) for x in zip(*costs, strict=True)) if costs else None
    except (ValueError, TypeError, OSError, UserError):
        return None
