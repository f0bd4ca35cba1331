"""Rules of the package: allowed imports, cost of imports, documented flags."""

import ast
import importlib
import importlib.util
import re
import subprocess
import sys

import pytest
from paths import ROOT

from kd_jax.config import Config
from kd_jax.config.flags import flag_names

# Floors from the bottom. A room imports only rooms of lower floors; within a room, a file imports
# only files before it.
FLOORS = [
    {
        "config": [
            "errors", "checks", "data", "loss", "on_policy", "teacher", "run", "record", "flags",
            "streams", "command",
        ],
    },
    {
        "parallel": [
            "rules", "platforms", "experimental", "signals", "processes", "progress", "mesh",
            "placement",
        ],
        "data": [
            "readers", "files", "outputs", "fields", "records", "templates", "forms", "turns",
            "hidden", "encode", "answers", "vocabulary", "prompts", "chat", "questions", "prepare",
            "pool", "arrays", "store", "packing", "rows", "documents", "batches",
        ],
    },
    {
        "models": [
            "config_keys", "rope", "families", "layer_types", "architecture", "weight_table",
            "known", "bits", "residuals", "masks", "triton_attention",
            "blockwise_attention", "tiled_attention", "attention", "matmul",
            "embedding", "modules", "decoder", "lora",
        ],
    },
    {
        "losses": [
            "vocabulary", "head_inputs", "chunks", "softmax", "token_weights", "divergences",
            "token_loss", "fused_head", "hidden", "schedules",
        ],
        "weights": [
            "files", "chat_files", "kinds", "hashes", "safetensors", "folder", "orbax", "adapters",
            "load", "export",
        ],
        "planning": [
            "chips", "topology", "cost", "memory", "network", "estimate", "choices", "mesh_choice",
        ],
    },
    {
        "teachers": [
            "live", "storage", "stored", "topk", "entries", "distillkit", "records", "manifest",
            "lock", "cost", "writing", "reading",
        ],
    },
    {
        "setup": ["runtime", "model_files", "models", "program", "forward", "inputs", "cached"],
        "workdir": [
            "history", "provenance", "lock", "resume", "integrity", "checkpoints", "metrics",
        ],
    },
    {
        "inference": [
            "arguments", "unstacking", "load", "drawing", "decoding", "sampling", "speculative",
            "prompts", "answer_file", "answering", "accuracy", "scores", "evaluation",
            "likelihoods", "lm_eval_model", "teacher_pass", "cached", "cache_check",
            "cache_import", "exam", "comparison",
        ],
        "reporting": [
            "arms", "tables", "provenance", "curves", "texts", "teacher_cost", "page",
        ],
    },
    {"onpolicy": ["prompts", "sampler", "samples", "source"]},
    {
        "training": ["optim", "step", "step_log", "loop", "abstract", "hlo", "ahead"],
        "toy": ["grammar", "models", "outcome"],
    },
]  # fmt: skip
ROOMS = {room: files for floor in FLOORS for room, files in floor.items()}
DOORS = [
    "__main__", "train", "cache", "plan", "evaluate", "generate", "lm_eval", "report", "sweep",
    "demo",
]  # fmt: skip
FILES = [f"{room}.{file}" for room, files in ROOMS.items() for file in files]
# Needs the `eval` extra.
ABSENT = set() if importlib.util.find_spec("lm_eval") else {"inference.lm_eval_model"}
IMPORTABLE = [name for name in FILES + DOORS if name not in ABSENT]


def imported(file):
    """Returns the modules of kd_jax that a file imports anywhere, such as config.run."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "kd_jax":
            inside = (node.module + ".").removeprefix("kd_jax.")
            names = {inside + alias.name for alias in node.names}
            found |= {name if name in FILES else inside[:-1] or name for name in names}
        elif isinstance(node, ast.Import):
            found |= {a.name.removeprefix("kd_jax.") for a in node.names if "kd_jax." in a.name}
    return found


def test_the_floors_name_every_file():
    files = {
        ".".join(file.relative_to(ROOT / "kd_jax").with_suffix("").parts)
        for file in (ROOT / "kd_jax").rglob("*.py")
        if file.stem != "__init__" and "configs" not in file.parts
    }
    assert files == {*FILES, *DOORS}


@pytest.mark.parametrize("name", FILES)
def test_a_file_imports_only_from_lower_floors_and_from_files_before_it(name):
    room, file = name.split(".")
    floor = next(i for i, rooms in enumerate(FLOORS) if room in rooms)
    allowed = {f"{other}.{x}" for below in FLOORS[:floor] for other in below for x in below[other]}
    allowed |= {f"{room}.{x}" for x in ROOMS[room][: ROOMS[room].index(file)]}
    allowed |= {"config"}  # its __init__ exports the configuration's names
    assert imported(ROOT / "kd_jax" / room / f"{file}.py") <= allowed - {room}


def test_importing_does_nothing_and_takes_no_heavy_library():
    modules = ", ".join(f"kd_jax.{name}" for name in IMPORTABLE)
    heavy = "{'torch', 'transformers', 'datasets', 'tensorboard', 'tyro', 'peft'}"
    code = f"import sys, {modules}; print(sorted({heavy} & sys.modules.keys()))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert done.stdout == "[]\n" and done.stderr == ""


def test_the_readme_shows_every_room_and_door():
    text = (ROOT / "README.md").read_text()
    tree = re.findall(r"^ *(\w+)(?:/|\.py)  +\S", text, re.MULTILINE)
    assert set(tree) >= {*ROOMS, *DOORS, "convert", "configs", "tests"}


def test_every_file_that_the_documents_name_exists():
    for document in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]:
        for path in re.findall(
            r"\b((?:kd_jax|convert|configs|benchmarks|docs|tests)/[\w/]+\.\w+)",
            document.read_text(),
        ):
            assert (ROOT / path).exists(), f"{document.name}: {path}"


def known_flags():
    """Returns the flags of all commands and benchmarks."""
    known = {"config", "help", *flag_names(Config)}
    commands = [f"kd_jax.{name}" for name in IMPORTABLE]
    commands += [f"convert.{file.stem}" for file in (ROOT / "convert").glob("[!_]*.py")]
    for name in commands:
        for kind in vars(importlib.import_module(name)).values():
            if isinstance(kind, type) and kind.__name__.endswith("Args"):
                known |= set(flag_names(kind))
    for file in (ROOT / "benchmarks").glob("*.py"):
        text = file.read_text()
        known |= set(re.findall(r'add_argument\(\s*"--([\w-]+)"', text))
        fields = re.findall(r'^    (\w+): .*\n    """', text.partition("class Args")[2], re.M)
        known |= {name.replace("_", "-") for name in fields}
    return known


# Flags that documents name: of launchers (docs/clusters.md) and of venv.
OTHER_PROGRAMS = {
    "job-name", "nodes", "ntasks-per-node", "gpus-per-node", "time", "signal", "requeue",
    "open-mode", "kill-on-bad-exit", "zone", "worker", "command", "map-by", "upgrade-deps",
}  # fmt: skip


def test_every_flag_that_the_documents_name_exists():
    known = known_flags() | OTHER_PROGRAMS
    for document in [
        *ROOT.glob("*.md"),
        *(ROOT / "docs").glob("*.md"),
        *ROOT.glob("configs/**/*.py"),
    ]:
        for flag in re.findall(r"(?<![\w-])--(?!xla_)([a-z][\w.-]*\w)", document.read_text()):
            assert flag in known, f"{document.name}: --{flag}"
