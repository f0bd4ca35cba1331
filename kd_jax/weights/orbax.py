"""The Orbax form of a model's weights."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax

from kd_jax.config import UserError
from kd_jax.config.errors import first_line
from kd_jax.models.architecture import Architecture
from kd_jax.models.table import weights
from kd_jax.weights.folder import ORBAX
from kd_jax.weights.names import check_shapes


def orbax_leaves(folder: Path, arch: Architecture) -> dict[str, Any]:
    """Returns shape and dtype of what convert.from_hf wrote, once they fit the architecture."""
    from orbax.checkpoint import v1 as ocp

    place = (folder / ORBAX).absolute()
    try:
        saved = ocp.metadata(place).metadata
        shapes = {path: leaf.shape for path, leaf in saved.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = first_line(error)
        raise UserError(f"{place}: expected what convert.from_hf wrote ({reason})") from error
    check_shapes(shapes, {path: w.shape for path, w in weights(arch).items()}, place)
    return saved


def _load_orbax(folder, arch, layout, dtype):
    saved = orbax_leaves(folder, arch)
    abstract = {
        path: jax.ShapeDtypeStruct(
            weight.shape,
            saved[path].dtype if dtype is None else dtype,
            sharding=layout.sharding(weight.dims, weight.shape),
        )
        for path, weight in weights(arch).items()
    }
    return read_orbax(folder, abstract)


def read_orbax(folder: Path, abstract: dict[str, Any]) -> dict[str, Any]:
    from orbax.checkpoint import v1 as ocp

    place = (folder / ORBAX).absolute()
    try:
        with absl_silent():
            return ocp.load(place, abstract)
    except Exception as error:  # Orbax raises no narrower class for a damaged file
        reason = first_line(error.__cause__ or error)
        raise UserError(f"{place}: cannot be read ({reason})") from error


@contextmanager
def absl_silent() -> Iterator[None]:
    """Keeps Orbax from printing the traceback of what it raises as well."""
    logger = logging.getLogger("absl")
    before, logger.disabled = logger.disabled, True
    yield
    logger.disabled = before  # but not after an error: threads of the failed call still print
