"""Entries of the teacher's distributions at the positions of a document, read as arrays."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np


class Group(NamedTuple):
    """Positions with equally many entries."""

    rows: np.ndarray
    """[n] int64: which of the positions that were asked for."""
    ids: np.ndarray
    """[n, m] int64."""
    log_probs: np.ndarray
    """[n, m] float64."""


class Entries(Protocol):
    """Entries of the tokens at some positions, given the tokens before."""

    @property
    def positions(self) -> np.ndarray:
        """All positions that have entries, [N] int64."""

    def read(self, positions: np.ndarray) -> Iterator[Group]:
        """Yields the entries at some of them, in groups of equal numbers."""


@dataclass(frozen=True, slots=True)
class Listed:
    """Entries that are listed position by position."""

    found: dict[int, tuple[np.ndarray, np.ndarray]]
    """(ids [m], log-probabilities [m]) by position."""

    @property
    def positions(self) -> np.ndarray:
        return np.fromiter(self.found, np.int64, len(self.found))

    def read(self, positions: np.ndarray) -> Iterator[Group]:
        wanted = [self.found[position] for position in positions.tolist()]
        groups: dict[tuple[int, int], list[int]] = {}
        for row, (ids, log_probs) in enumerate(wanted):
            groups.setdefault((len(ids), len(log_probs)), []).append(row)
        for rows in groups.values():
            ids, log_probs = (np.stack([wanted[row][i] for row in rows]) for i in (0, 1))
            yield Group(np.array(rows), ids, log_probs)
