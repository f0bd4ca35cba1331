"""What holds the package together: who may import whom, and what importing costs."""

import ast
import dataclasses
import importlib
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

from kd_jax.config import Config
from kd_jax.config.command import flag_names

pytestmark = pytest.mark.fast

ROOT = Path(__file__).parents[1]
# A file imports only from files above it.
ORDER = [
    "config", "command", "chips", "topology", "architecture", "rules", "known_models",
    "analytic", "hlo", "sharding", "embedding", "matmul", "attention", "model", "lora",
    "decoding", "losses", "token_loss", "kd_head", "hidden", "scores", "disk", "text", "data",
    "optim", "hf", "export", "step", "checkpoint", "metrics", "build", "abstract", "forecast",
    "search", "inference", "evaluation", "scoring", "distributed", "loop", "train", "plan",
    "evaluate", "generate", "harness", "lm_eval", "runs", "arms", "tables", "curves", "report",
    "sweep", "grammar", "scratch", "outcome", "demo",
]  # fmt: skip
# One file needs the `eval` extra.
ABSENT = set() if importlib.util.find_spec("lm_eval") else {"harness"}
IMPORTABLE = [name for name in ORDER if name not in ABSENT]


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
    modules = ", ".join(f"kd_jax.{name}" for name in IMPORTABLE)
    heavy = "{'torch', 'transformers', 'datasets', 'tensorboard', 'tyro', 'peft'}"
    code = f"import sys, {modules}; print(sorted({heavy} & sys.modules.keys()))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert done.stdout == "[]\n" and done.stderr == ""


def test_the_readme_lists_every_file_in_order():
    text = (ROOT / "README.md").read_text()
    listed = re.findall(r"^(\S+\.py|\S+/)  ", text, re.MULTILINE)
    assert all((ROOT / path).exists() for path in listed)
    package = [Path(path).stem for path in listed if path.startswith("kd_jax/")]
    assert package == ORDER
    commands = {f"convert/{file.name}" for file in (ROOT / "convert").glob("[!_]*.py")}
    assert commands <= set(listed)


def test_every_file_that_the_documents_name_exists():
    for document in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]:
        for path in re.findall(
            r"\b((?:kd_jax|convert|configs|benchmarks|docs|tests)/\w+\.\w+)", document.read_text()
        ):
            assert (ROOT / path).exists(), f"{document.name}: {path}"


def known_flags():
    """Returns the flags of every command, and of every benchmark, that there is."""
    known = {"config", "help", *flag_names(Config)}
    commands = [f"kd_jax.{name}" for name in IMPORTABLE]
    commands += [f"convert.{file.stem}" for file in (ROOT / "convert").glob("[!_]*.py")]
    for name in commands:
        for kind in vars(importlib.import_module(name)).values():
            if dataclasses.is_dataclass(kind) and kind.__name__.endswith("Args"):
                known |= set(flag_names(kind))
    for file in (ROOT / "benchmarks").glob("*.py"):
        known |= set(re.findall(r'add_argument\(\s*"--([\w-]+)"', file.read_text()))
    return known


# Flags of launchers in docs/clusters.md.
LAUNCHERS = {
    "job-name", "nodes", "ntasks-per-node", "gpus-per-node", "time", "signal", "requeue",
    "open-mode", "kill-on-bad-exit", "zone", "worker", "command", "map-by",
}  # fmt: skip


def test_every_flag_that_the_documents_name_exists():
    known = known_flags() | LAUNCHERS
    for document in [
        *ROOT.glob("*.md"),
        *(ROOT / "docs").glob("*.md"),
        *ROOT.glob("configs/**/*.py"),
    ]:
        for flag in re.findall(r"(?<![\w-])--(?!xla_)([a-z][\w.-]*\w)", document.read_text()):
            assert flag in known, f"{document.name}: --{flag}"
