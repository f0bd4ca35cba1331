"""start_jax comes before jax looks for devices, in every command."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from paths import CONFIGS, ROOT

from kd_jax.setup import runtime
from kd_jax.setup.runtime import start_jax

pytestmark = pytest.mark.fast

# Ends each command where it looks for devices, and tells whether the memory share was set by then,
# or at the command's end.
PROGRAM = """
import importlib, json, os, sys
import jax
from jax._src import xla_bridge

class Found(BaseException):
    pass

def look(*_, **__):
    raise Found(os.environ.get("XLA_CLIENT_MEM_FRACTION"))

xla_bridge.backends = look
jax.distributed.initialize = lambda **_: None
for name, arguments in json.loads(sys.argv[1]).items():
    os.environ.pop("XLA_CLIENT_MEM_FRACTION", None)
    looked, ended = False, None
    try:
        module, _, function = name.partition(":")
        getattr(importlib.import_module(module), function)(arguments)
    except Found as found:
        looked, ended = True, found.args[0]
    except BaseException as error:
        ended = os.environ.get("XLA_CLIENT_MEM_FRACTION")
        print(name, repr(error), file=sys.stderr)
    print(json.dumps([name, looked, ended]))
"""
LM_EVAL = "kd_jax.inference.lm_eval_model:KdJaxLM"  # of kd_jax.lm_eval, without reading tasks


@pytest.fixture(scope="module")
def commands(tmp_path_factory):
    """Returns arguments by command, module:function."""
    root = tmp_path_factory.mktemp("commands")
    model = str(tiny.write_plain_model(root / "model", seed=1))
    data = str(tiny.write_data(root / "train.jsonl"))
    config = str(CONFIGS / "8b_to_1b.py")
    many = ["--distributed.coordinator", "localhost:1", "--distributed.num-processes", "2"]
    return {
        "kd_jax.train:main": ["--config", config, *many, "--distributed.process-id", "0"],
        "kd_jax.plan:main": ["--config", config, "--topology", "local"],
        "kd_jax.evaluate:main": ["--model", model, "--data", data],
        "kd_jax.generate:main": ["--model", model, "--prompt", "hi"],
        "convert.from_hf:main": ["--source", model, "--out", str(root / "orbax")],
        "convert.to_hf:main": ["--workdir", str(root / "none"), "--out", str(root / "out")],
        **({LM_EVAL: model} if importlib.util.find_spec("lm_eval") else {}),
    }


def test_every_command_starts_jax_before_it_looks_for_devices(commands):
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(commands)],
        capture_output=True, text=True, env=environ, cwd=ROOT, check=True,
    )  # fmt: skip
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    assert [name for name, _, _ in found] == list(commands)
    assert {name for name, _, share in found if share != "0.92"} == set(), done.stderr
    quiet = {name for name, looks, _ in found if not looks}
    assert quiet <= {"convert.from_hf:main", "convert.to_hf:main"}, done.stderr


def test_the_command_that_starts_runs_uses_no_devices():
    code = "import sys; from kd_jax import sweep, report; print('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "False\n", done.stderr


NEW, OLD = runtime._MEMORY_SHARE


@pytest.mark.parametrize(
    "given, want",
    [({}, {NEW: "0.92"}), ({NEW: "0.5"}, {NEW: "0.5"}), ({OLD: "0.5"}, {OLD: "0.5"})],
)
def test_the_memory_share_is_set_where_neither_name_has_one(monkeypatch, given, want):
    environ = {name: x for name, x in os.environ.items() if name not in (NEW, OLD)}
    monkeypatch.setattr(runtime.os, "environ", {**environ, **given})
    start_jax()
    assert {name: x for name, x in os.environ.items() if name in (NEW, OLD)} == want


def test_the_names_are_those_that_jax_reads():
    import jaxlib.xla_client

    text = Path(jaxlib.xla_client.__file__).read_text()
    assert all(f"'{name}'" in text for name in (NEW, OLD))


def test_freed_memory_goes_back_to_the_system():
    """A block that stays keeps what lies below it from going back by itself."""
    blocks = [bytes(2000) for _ in range(50_000)]
    last, full = bytes(2000), resident_bytes()
    del blocks
    kept = resident_bytes()
    runtime.release_freed_memory()
    assert full - resident_bytes() > 80e6 > full - kept and last


def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
