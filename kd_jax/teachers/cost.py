"""Tokens and seconds of the teacher's passes into a cache: cost.json beside the manifest."""

import json
from typing import NamedTuple

import tensorstore as ts

from kd_jax.config import UserError
from kd_jax.parallel.progress import Progress
from kd_jax.teachers.storage import open_folder, read_file, write_json

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


def add_cost(store: ts.KvStore, cost: Cost) -> None:
    """Adds a pass to what is recorded in the folder of a cache."""
    before = _read(store) or Cost()
    sums = Cost._make(a + b for a, b in zip(before, cost, strict=True))
    write_json(store, COST, sums._asdict())


def read_cost(path: str) -> Cost | None:
    """Returns what the cache in a folder, or at an address, cost; None if it is not recorded."""
    try:
        return _read(open_folder(path))
    except (ValueError, OSError, UserError):
        return None


def _read(store: ts.KvStore) -> Cost | None:
    text = read_file(store, COST)
    try:
        return None if text is None else Cost(**json.loads(text))
    except (ValueError, TypeError):
        return None
