"""What the teacher's passes into a cache cost: cost.json beside the manifest."""

import json
import time
from typing import NamedTuple

import tensorstore as ts

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


class Stopwatch:
    """Measures a pass, batch by batch."""

    def __init__(self) -> None:
        self.begun = self.last = time.monotonic()
        self.first: float | None = None
        self.tokens = self.first_tokens = 0

    def batch(self, tokens: int) -> None:
        self.last = time.monotonic()
        self.tokens += tokens
        if self.first is None:
            self.first, self.first_tokens = self.last, tokens

    def cost(self, share: float) -> Cost:
        """Returns the cost of a whole pass, of which `share` was done since the start."""
        warm = self.last - self.first if self.first is not None else 0.0
        tokens = self.tokens - self.first_tokens
        whole = self.tokens / share, (self.last - self.begun) / share
        return Cost(round(whole[0]), whole[1], tokens, warm)


def add_cost(store: ts.KvStore, cost: Cost) -> None:
    """Adds a pass to what is recorded in the folder of a cache."""
    before = _read(store) or Cost()
    sums = Cost._make(a + b for a, b in zip(before, cost, strict=True))
    write_json(store, COST, sums._asdict())


def read_cost(path: str) -> Cost | None:
    """Returns what the cache in a folder, or at an address, cost; None if it is not recorded."""
    try:
        return _read(open_folder(path))
    except (ValueError, OSError):
        return None


def _read(store: ts.KvStore) -> Cost | None:
    text = read_file(store, COST)
    try:
        return None if text is None else Cost(**json.loads(text))
    except (ValueError, TypeError):
        return None
