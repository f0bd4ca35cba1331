"""What every command sets in jax before jax looks for devices."""

import os
from pathlib import Path

import jax
from jax.sharding import Mesh

from kd_jax.config import Config, UserError
from kd_jax.parallel.mesh import platform
from kd_jax.parallel.platforms import PLATFORMS

# jax refuses to start where both are set; the second is the older name.
_MEMORY_SHARE = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")


def start_jax(compilation_cache: str | None = None) -> None:
    """Sets float32 matmul precision, the share of a GPU's memory and the compilation cache.

    Call it before anything that looks for devices: the memory share is read only then. A share in
    the environment stays.

    Args:
      compilation_cache: folder or URL; None leaves it as it is.
    """
    if not any(map(os.environ.get, _MEMORY_SHARE)):
        os.environ[_MEMORY_SHARE[0]] = str(PLATFORMS["gpu"].memory_share)
    jax.config.update("jax_default_matmul_precision", "highest")  # else float32 means TF32 on GPUs
    if compilation_cache is not None:
        remote = "://" in compilation_cache
        folder = compilation_cache if remote else str(Path(compilation_cache).expanduser())
        jax.config.update("jax_compilation_cache_dir", folder)


def check_attention(config: Config, mesh: Mesh) -> None:
    """Raises UserError where the mesh's devices lack the attention kernel asked for."""
    here = platform(mesh)
    owners = [name for name, row in PLATFORMS.items() if row.attention == config.attention]
    if config.attention not in ("auto", "xla") and here not in owners:
        raise UserError(
            f"attention: expected auto|xla on {here}, got {config.attention}, which needs a "
            f"{owners[0].upper()}"
        )
