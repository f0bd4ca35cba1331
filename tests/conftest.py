"""Tests run offline on eight fake CPU devices, so that no sharding test can skip by accident."""

import os
from pathlib import Path

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["HF_HUB_OFFLINE"] = "1"

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")

SHARED = Path(os.environ.get("KD_JAX_SHARED", Path(__file__).parents[2] / "shared"))


@pytest.fixture(scope="session")
def real_data() -> Path:
    """A folder with gsm8k_alpaca.json, roleplay_chat.jsonl and llama3_tokenizer/."""
    folder = SHARED / "data"
    if not folder.is_dir():
        pytest.skip(f"real data is not at {folder}; set KD_JAX_SHARED")
    return folder
