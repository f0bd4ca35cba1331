"""Arrays of an Orbax checkpoint, read one at a time or straight into shards."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kd_jax.config import UserError
from kd_jax.config.errors import first_line


@dataclass(frozen=True, kw_only=True, slots=True)
class OrbaxArrays:
    """Arrays of one checkpoint by dotted path; opening it reads none of them."""

    place: Path
    saved: dict[str, Any]
    """Orbax's metadata of each array."""
    parents: tuple[str, ...] = ()
    """Keys of the nested dicts that hold the arrays in the checkpoint's tree."""

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {path: tuple(leaf.shape) for path, leaf in self.saved.items()}

    @property
    def dtypes(self) -> dict[str, np.dtype]:
        return {path: np.dtype(leaf.dtype) for path, leaf in self.saved.items()}

    def load(self, abstract: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the arrays named in `abstract`; the others are not read.

        Args:
          abstract: a ShapeDtypeStruct for an array that is read into its shards and rounded to its
            dtype, a NumPy array of shape and dtype for one in host memory.
        """
        from orbax.checkpoint import v1 as ocp

        # Orbax returns uninitialised memory for a path that the checkpoint lacks.
        assert abstract.keys() <= self.saved.keys(), abstract.keys() - self.saved.keys()
        if not abstract:
            return {}
        tree = dict(abstract)
        for key in reversed(self.parents):
            tree = {key: tree}
        options = ocp.options.PyTreeOptions
        partial = options(loading=options.Loading(partial_load=True))
        try:
            with absl_silent(), ocp.Context(pytree_options=partial):
                tree = ocp.load(self.place, tree)
        except Exception as error:  # Orbax raises no narrower class for a damaged file
            reason = first_line(error.__cause__ or error)
            if not self.place.exists():
                raise UserError(
                    f"{self.place}: was deleted while it was read, by a run that trains there. "
                    "Run the command again, or raise --checkpoint.keep of the run"
                ) from error
            raise UserError(f"{self.place}: cannot be read ({reason})") from error
        for key in self.parents:
            tree = tree[key]
        return tree

    def read(self, path: str) -> np.ndarray:
        """Returns one array in host memory, in its stored dtype."""
        return self.load({path: np.empty(self.shapes[path], self.dtypes[path])})[path]


@contextmanager
def absl_silent() -> Iterator[None]:
    """Keeps Orbax from printing the traceback of an error that it also raises."""
    loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
    before = [logger.disabled for logger in loggers]
    for logger in loggers:
        logger.disabled = True
    yield
    for logger, disabled in zip(loggers, before, strict=True):
        logger.disabled = disabled  # not after an error: threads of the failed call still print
