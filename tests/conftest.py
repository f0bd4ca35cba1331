"""Tests run offline on eight fake CPU devices, so that no sharding test can skip by accident."""

import importlib.util
import os
from functools import partial
from pathlib import Path

# Fake devices share one pool of threads, which collectives block. Where XLA runs independent ones
# side by side, each device in an order of its own, a program now and then waits for itself for
# ever; so does one whose pool has only as many threads as two cores bring.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=8"
    + " --xla_cpu_enable_concurrency_optimized_scheduler=false"
    + " --xla_cpu_collective_call_terminate_timeout_seconds=120"  # of busy cores, not 40
)
os.environ.setdefault("NPROC", "32")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"

import jax
import pytest
import tiny
from tiny_run import make_run_config

from kd_jax.config import DataConfig
from kd_jax.data.chat import load_tokenizer

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")

# Without the `test` extra's torch only the fast tests can run, and these files have none.
NEED_TORCH = [
    "inference/test_decoding.py", "models/test_decoder.py", "training/test_hidden_step.py",
    "training/test_step.py", "test_train.py",
]  # fmt: skip
collect_ignore = [] if importlib.util.find_spec("torch") else NEED_TORCH
if not importlib.util.find_spec("lm_eval"):
    collect_ignore = [*collect_ignore, "test_lm_eval.py"]

SHARED = Path(os.environ.get("KD_JAX_SHARED", Path(__file__).parents[2] / "shared"))


crashed: set[str] = set()


@pytest.hookimpl(optionalhook=True)
def pytest_handlecrashitem(crashitem, report, sched):
    """Runs a test again, once, whose worker died; the summary counts it as `rerun`.

    Now and then a collective on fake devices still waits for ever, and XLA aborts the process.
    """
    if crashitem not in crashed:
        crashed.add(crashitem)
        sched.mark_test_pending(crashitem)
        report.outcome = "rerun"


@pytest.fixture(autouse=True, scope="module")
def _forget_programs():
    """Frees a file's compiled programs: each keeps some 600 memory mappings of Linux's 65,530."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="session")
def real_data() -> Path:
    """A folder with gsm8k_alpaca.json, roleplay_chat.jsonl and llama3_tokenizer/."""
    folder = SHARED / "data"
    if not folder.is_dir():
        pytest.skip(f"real data is not at {folder}; set KD_JAX_SHARED")
    return folder


@pytest.fixture(scope="session")
def tiny_student(tmp_path_factory) -> Path:
    """A tied float32 Llama of transformers, logits with a deviation above 1. Read only."""
    return tiny.write_model(tmp_path_factory.mktemp("student"), seed=1, tie_word_embeddings=True)


@pytest.fixture(scope="session")
def tiny_teacher(tmp_path_factory) -> Path:
    """An untied, wider float32 Llama with the student's tokenizer. Read only."""
    shape = {"hidden_size": 96, "intermediate_size": 128, "head_dim": 16, "num_hidden_layers": 2}
    folder = tmp_path_factory.mktemp("teacher")
    return tiny.write_model(folder, seed=2, tie_word_embeddings=False, **shape)


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory) -> Path:
    """Alpaca records as JSON lines. Read only."""
    return tiny.write_data(tmp_path_factory.mktemp("data") / "train.jsonl")


@pytest.fixture(scope="session")
def make_config(tiny_student, tiny_teacher, tiny_data, tmp_path_factory):
    """Returns configs of runs of the tiny models, with the changes of make_run_config."""
    cache_dir = tmp_path_factory.mktemp("rows")
    return partial(make_run_config, tiny_student, tiny_teacher, tiny_data, cache_dir)


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    """The tiny tokenizer."""
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny.write_tokenizer(folder)
    return load_tokenizer(folder)


@pytest.fixture
def config(tmp_path) -> DataConfig:
    """A few records, and a row store of the test's own."""
    path = tiny.write_data(tmp_path / "train.jsonl")
    return DataConfig(path=str(path), seq_len=128, cache_dir=str(tmp_path / "cache"))


@pytest.fixture
def datasets_cache(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
