"""What holds the package together: who may import whom, and what importing costs."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.fast

ROOT = Path(__file__).parents[1]
# A file imports only from files above it.
ORDER = [
    "config", "command", "sharding", "attention", "model", "lora", "losses", "kd_head", "text",
    "data", "optim", "hf",
    "step", "checkpoint", "metrics", "build", "loop", "train", "evaluate",
]  # fmt: skip


def imported(file):
    """Returns the modules of kd_jax that a file imports anywhere."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "kd_jax":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("kd_jax."):
            found.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("kd_jax.")}
    return found


def test_the_order_names_every_file():
    files = {file.stem for file in (ROOT / "kd_jax").glob("*.py")} - {"__init__"}
    assert files == set(ORDER)


@pytest.mark.parametrize("name", ORDER)
def test_a_file_imports_only_from_files_above_it(name):
    assert imported(ROOT / "kd_jax" / f"{name}.py") <= set(ORDER[: ORDER.index(name)])


def test_importing_does_nothing_and_takes_no_heavy_library():
    modules = ", ".join(f"kd_jax.{name}" for name in ORDER)
    heavy = "{'torch', 'transformers', 'datasets', 'tensorboard', 'tyro', 'peft'}"
    code = f"import sys, {modules}; print(sorted({heavy} & sys.modules.keys()))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert done.stdout == "[]\n" and done.stderr == ""
