"""Settings of jax that every command makes before jax initializes its devices; freed memory."""

import ctypes
import os
from contextlib import suppress
from pathlib import Path

import jax
from jax.sharding import Mesh

from kd_jax.config import Config, UserError
from kd_jax.parallel.mesh import platform
from kd_jax.parallel.platforms import PLATFORMS

# jax fails to start if both are set; the second is the older name.
_MEMORY_SHARE = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")


def start_jax(compilation_cache: str | None = None) -> None:
    """Sets float32 matmul precision, the share of GPU memory and the compilation cache.

    Call it before jax initializes its devices, since only then the memory share is read. A share
    set in the environment takes precedence.

    Args:
      compilation_cache: folder or URL; None: unchanged.
    """
    if not any(map(os.environ.get, _MEMORY_SHARE)):
        os.environ[_MEMORY_SHARE[0]] = str(PLATFORMS["gpu"].memory_share)
    jax.config.update("jax_default_matmul_precision", "highest")  # the default is TF32 on GPUs
    if compilation_cache is not None:
        remote = "://" in compilation_cache
        folder = compilation_cache if remote else str(Path(compilation_cache).expanduser())
        jax.config.update("jax_compilation_cache_dir", folder)


def release_freed_memory() -> None:
    """Returns freed memory to the system. glibc keeps it otherwise, most of it from compiling."""
    with suppress(AttributeError):  # of another C library
        ctypes.CDLL(None).malloc_trim(0)


def check_attention(config: Config, mesh: Mesh) -> None:
    """Raises UserError if the mesh's devices lack the configured attention kernel."""
    here = platform(mesh)
    owners: dict[str, str] = {}
    for name, row in PLATFORMS.items():
        owners |= {kernel.name: name for kernel in row.attention}
    choices = ["auto", "xla", *(kernel.name for kernel in PLATFORMS[here].attention)]
    if config.attention not in choices:
        raise UserError(
            f"attention: expected {'|'.join(choices)} on {here}, got {config.attention}, which "
            f"needs a {owners[config.attention].upper()}"
        )
