"""Imports from jax's experimental and private modules, which any new version may move."""

from typing import Any

from kd_jax.config import UserError

KNOWN_VERSIONS = ("0.10", "0.11", "0.12")
"""Versions of jax in which every name that the package asks for is known to exist."""


def experimental(module: str, name: str) -> Any:
    """Returns the object of `from module import name`, which may be a submodule.

    Raises:
      UserError: it is not there; names the versions of jax that have it.
    """
    try:
        return getattr(__import__(module, fromlist=[name]), name)
    except (ImportError, AttributeError) as error:
        import jax

        *others, last = KNOWN_VERSIONS
        raise UserError(
            f"jax: expected version {', '.join(others)} or {last}, which have {module}.{name}, got "
            f"{jax.__version__} without it ({error}). Install one of those versions"
        ) from error
