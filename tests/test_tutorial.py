"""The tutorial's commands in order, with the demo's models instead of the large ones."""

import importlib
import json
import re
import shlex

import pytest
from paths import ROOT

from kd_jax import sweep
from kd_jax.config.command import run_command
from kd_jax.demo import COMMON, STUDENT, TEACHER, VOCAB_SIZE
from kd_jax.toy import grammar
from kd_jax.toy.models import make_tokenizer, write_llama

TEXT = (ROOT / "docs" / "tutorial.md").read_text()
COMMANDS = re.findall(r"^python -m (?:kd_jax|convert)\.\w+ .*$", TEXT, re.MULTILINE)
# Commands of other programs, and one that needs a benchmark from the hub.
ELSEWHERE = ("pip ", "hf ", "vllm ", "python -m kd_jax.lm_eval ")
TEACHERS = (
    "Llama-3.1-8B",
    "Llama-3.3-70B",
    "Llama-3.2-3B",
    "Qwen2-1.5B",
    "Qwen2.5-7B",
    "Qwen3-14B",
)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A folder with the configs of the repository, for small models, rows and runs."""
    folder = tmp_path_factory.mktemp("tutorial")
    exchanges = grammar.draw(200, "tutorial")
    tokenizer = make_tokenizer([(q.instruction, answer) for q, answer in exchanges], VOCAB_SIZE)
    write_llama(folder / "student", tokenizer, seed=1, **COMMON, **STUDENT)
    write_llama(folder / "teacher", tokenizer, seed=2, **COMMON, **TEACHER)
    (folder / "data.jsonl").write_text(grammar.to_lines(exchanges))
    (folder / "configs").mkdir()
    for file in (ROOT / "configs").glob("*.py"):
        text = shrink(file.read_text(), folder)
        for name, value in {"seq_len": 128, "batch_size": 8, "warmup_steps": 1, "rank": 4}.items():
            text = re.sub(rf"\b{name}=\d+", f"{name}={value}", text)
        text = text.replace("epochs=1", "steps=2, compilation_cache=None")
        (folder / "configs" / file.name).write_text(text)
    return folder


def shrink(text, folder):
    """Returns text with hub ids replaced by the folder's models and data."""
    for name in set(re.findall(r"(?:meta-llama|Qwen)/[\w.-]+\w", text)):
        part = "teacher" if any(big in name for big in TEACHERS) else "student"
        text = text.replace(name, str(folder / part))
    return text.replace("yahma/alpaca-cleaned", str(folder / "data.jsonl"))


@pytest.mark.slow
def test_every_command_of_the_tutorial_runs(small, monkeypatch, capsys):
    monkeypatch.chdir(small)

    # A sweep's commands run in this process; tests/test_sweep.py starts processes.
    def run(command):
        return run_command(importlib.import_module(command[1]).main, command[2:])

    monkeypatch.setattr(sweep, "_run", run)
    for command in COMMANDS:
        if command.startswith(ELSEWHERE):
            continue
        words = shlex.split(shrink(command, small).replace("--seeds 2", "--seeds 1"))
        words = ["24" if x == "256" else x for x in words]  # rows are short
        module = importlib.import_module(words[2])
        assert run_command(module.main, words[3:]) == 0, f"{command}\n{capsys.readouterr().err}"
    runs = sorted(path.parent for path in small.glob("runs/**/metrics.jsonl"))
    assert len(runs) == 11  # teacher, control, distilled, Qwen's, two sweeps, on-policy, prompt
    for folder in ("8b_adapter", "llama-1b-distilled"):
        assert list((small / "out" / folder).glob("*.safetensors"))
    assert list((small / "out" / "report").glob("*.html"))
    assert (small / "caches" / "8b" / "manifest.json").exists()
    distilled = (small / "runs" / "8b_to_1b" / "config.json").read_text()
    assert "teacher.adapter" in json.loads(distilled)["inputs"]


def test_every_line_that_looks_like_a_command_is_known():
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE)
    lines = "".join(text for language, text in blocks if not language).splitlines()
    unknown = [x for x in lines if x not in COMMANDS and not x.startswith((*ELSEWHERE, "loss"))]
    assert len(COMMANDS) > 10 and not unknown
