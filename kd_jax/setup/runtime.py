"""What every command sets in jax before it looks for devices."""

import os
from pathlib import Path

import jax
from jax.sharding import Mesh

from kd_jax.config import Config, UserError
from kd_jax.parallel.mesh import platform
from kd_jax.planning.chips import GPU_MEMORY_SHARE


def start_jax(compilation_cache: str | None) -> None:
    """Sets what every command wants of jax: true float32 products, a GPU's memory, and the
    compilation cache. Before jax looks for devices."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", str(GPU_MEMORY_SHARE))
    jax.config.update("jax_default_matmul_precision", "highest")  # else float32 means TF32 on GPUs
    if compilation_cache is not None:
        remote = "://" in compilation_cache
        folder = compilation_cache if remote else str(Path(compilation_cache).expanduser())
        jax.config.update("jax_compilation_cache_dir", folder)


def check_attention(config: Config, mesh: Mesh) -> None:
    """Raises UserError where the mesh's devices do not have the attention kernel asked for."""
    needs = {"cudnn": "gpu", "splash": "tpu"}.get(config.attention, platform(mesh))
    if platform(mesh) != needs:
        raise UserError(
            f"attention: expected auto|xla on {platform(mesh)}, got {config.attention}, which "
            f"needs a {needs.upper()}"
        )
