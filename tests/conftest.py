"""Fixtures. Tests run offline on two fake CPU devices, files with `devices(8)` on eight."""

import atexit
import gc
import importlib.util
import os
import shutil
import tempfile
from functools import partial
from importlib.metadata import version
from pathlib import Path

# Most test time is compilation: no LLVM optimization, and in jax 0.10 the older fusion emitter,
# whose code LLVM compiles faster.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_backend_optimization_level=0"
    + (" --xla_cpu_use_fusion_emitters=false" if version("jax").startswith("0.10.") else "")
    # Independent collectives run in program order: the same order on every device.
    + " --xla_cpu_enable_concurrency_optimized_scheduler=false"
    + " --xla_cpu_collective_call_terminate_timeout_seconds=100"  # then XLA aborts
)
os.environ["JAX_NUM_CPU_DEVICES"] = "2"
os.environ.setdefault("NPROC", "32")  # threads of all fake devices; collectives block them
os.environ.setdefault("OMP_NUM_THREADS", "1")  # torch's threads spin beside the other worker
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"

# One compilation cache for pytest's workers and the processes that tests start.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="kd_jax-xla-")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

# Rows that commands keep in ~/.cache/kd_jax are made anew: those of other code could be there.
if "PYTEST_XDIST_WORKER" not in os.environ:  # workers have it from here
    os.environ.setdefault("XDG_CACHE_HOME", str(Path.home() / ".cache"))  # of other libraries
    os.environ["HOME"] = tempfile.mkdtemp(prefix="kd_jax-home-")
    atexit.register(shutil.rmtree, os.environ["HOME"], ignore_errors=True)

import jax
import pytest
import tiny
from jax.extend.backend import clear_backends
from samples import write_stand_ins
from tiny_run import make_run_config

from kd_jax.config import DataConfig
from kd_jax.data.chat import load_tokenizer

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")

# Files that need torch or lm_eval (extra `test`); what needs neither runs without them.
NEED_TORCH = [
    "inference/test_decoding.py", "inference/test_sampling.py", "inference/test_speculative.py",
    "models/test_decoder.py", "training/test_hidden_step.py", "training/test_prompted_step.py",
    "training/test_step.py", "test_lm_eval.py", "test_train.py",
]  # fmt: skip
collect_ignore = [] if importlib.util.find_spec("torch") else NEED_TORCH
if not importlib.util.find_spec("lm_eval"):
    collect_ignore = [*collect_ignore, "test_lm_eval.py"]

SHARED = Path(os.environ.get("KD_JAX_SHARED", Path(__file__).parents[2] / "shared"))

# The slowest files start first, so that all workers end at about the same time.
SLOW = [
    "test_demo.py", "test_tutorial.py", "test_train.py", "test_processes.py", "test_generate.py",
    "test_decoder.py", "test_step.py", "test_decoding.py", "test_cache.py", "test_fused_head.py",
    "test_hidden_step.py", "test_sampling.py", "test_commands.py", "test_layouts.py",
    "test_divergences.py", "test_self_distillation.py", "test_convert.py", "test_lm_eval.py",
]  # fmt: skip


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    def rank(item):
        return SLOW.index(item.path.name) if item.path.name in SLOW else len(SLOW)

    items.sort(key=rank)
    for item in items:
        if item.path.relative_to(Path(__file__).parent).as_posix() in NEED_TORCH:
            item.add_marker(pytest.mark.torch)
        if item.path.name in ("test_demo.py", "test_tutorial.py"):  # one test has a dozen runs
            item.add_marker(pytest.mark.timeout(480))


def pytest_collection_finish(session):
    """Opens the compilation cache, and keeps the garbage collector from what is imported.

    The cache stays that of the first program: a command's would be the one in the user's home.
    """
    jax.jit(lambda x: x + 1)(0.0)
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


def pytest_configure(config):
    """A worker that crashed is not started again: its test has failed and the run ends."""
    if hasattr(config.option, "maxworkerrestart"):
        config.option.maxworkerrestart = "0"


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Assigns each file to one worker: its tests share fixtures and compiled programs."""
    from xdist.scheduler import LoadFileScheduling

    config.option.loadscopereorder = False
    return LoadFileScheduling(config, log)


@pytest.fixture(autouse=True, scope="module")
def _devices(request):
    """The fake devices of a file and of the processes it starts; two compile faster than eight.

    Afterwards a file's compiled programs are freed: each uses about 600 of Linux's 65,530 memory
    mappings.
    """
    marker = request.node.get_closest_marker("devices")
    count = marker.args[0] if marker else 2
    if count != jax.config.jax_num_cpu_devices:
        clear_backends()
        jax.config.update("jax_num_cpu_devices", count)
        os.environ["JAX_NUM_CPU_DEVICES"] = str(count)
    yield
    jax.clear_caches()


@pytest.fixture(scope="session")
def real_data(tmp_path_factory) -> Path:
    """A folder with gsm8k_alpaca.json, roleplay_chat.jsonl and llama3_tokenizer/.

    Real files from KD_JAX_SHARED or ../shared if present, otherwise small stand-ins.
    """
    folder = SHARED / "data"
    return folder if folder.is_dir() else write_stand_ins(tmp_path_factory.mktemp("stand_ins"))


@pytest.fixture(scope="session")
def tiny_student(tmp_path_factory) -> Path:
    """A tied float32 Llama; logits have a standard deviation above 1. Read only."""
    return tiny.write_model(tmp_path_factory.mktemp("student"), seed=1, tie_word_embeddings=True)


@pytest.fixture(scope="session")
def tiny_teacher(tmp_path_factory) -> Path:
    """A wider, untied float32 Llama with the student's tokenizer. Read only."""
    shape = {"hidden_size": 96, "intermediate_size": 128, "head_dim": 16, "num_hidden_layers": 2}
    folder = tmp_path_factory.mktemp("teacher")
    return tiny.write_model(folder, seed=2, tie_word_embeddings=False, **shape)


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory) -> Path:
    """A file of Alpaca records in JSON lines. Read only."""
    return tiny.write_data(tmp_path_factory.mktemp("data") / "train.jsonl")


@pytest.fixture(scope="session")
def make_config(tiny_student, tiny_teacher, tiny_data, tmp_path_factory):
    """Returns make_run_config for the tiny models and data."""
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
    """A data configuration with a few records and its own row store."""
    path = tiny.write_data(tmp_path / "train.jsonl")
    return DataConfig(path=str(path), seq_len=128, cache_dir=str(tmp_path / "cache"))


@pytest.fixture
def datasets_cache(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
