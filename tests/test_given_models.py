"""Every command names what it is given instead of a model, before it computes anything."""

import json

import pytest
import tiny
from paths import ROOT

from convert import from_hf
from kd_jax import evaluate, generate, plan, train
from kd_jax.config.command import run_command

CONFIG = str(ROOT / "configs/8b_to_1b.py")
RUN = json.dumps({"config": {}, "inputs": {}, "versions": {}})
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"
# What is given -> its files, and what the message says.
GIVEN = {
    "adapter": ({"adapter_config.json": "{}"}, "got a PEFT adapter"),
    "GGUF": ({"model.gguf": ""}, "got GGUF files"),
    "pointer": ({"config.json": POINTER}, "got a Git LFS pointer"),
    "workdir": ({"config.json": RUN}, "got the workdir of a run"),
    "page": ({"config.json": "<!DOCTYPE html>"}, "got a web page"),
}
COMMANDS = {
    "train student": (train, ["--config", CONFIG, "--student.path", "GIVEN"]),
    "train teacher": (train, ["--config", CONFIG, "--teacher.path", "GIVEN"]),
    "plan": (plan, ["--config", CONFIG, "--student.path", "GIVEN", "--analytic"]),
    "evaluate": (evaluate, ["--model", "GIVEN", "--data", "DATA"]),
    "evaluate teacher": (evaluate, ["--model", "MODEL", "--teacher", "GIVEN", "--data", "DATA"]),
    "generate": (generate, ["--model", "GIVEN", "--prompt", "Hi"]),
    "from_hf": (from_hf, ["--source", "GIVEN", "--out", "OUT"]),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A model and data without faults."""
    folder = tmp_path_factory.mktemp("whole")
    return {
        "MODEL": tiny.write_plain_model(folder / "model"),
        "DATA": tiny.write_data(folder / "data.jsonl"),
    }


@pytest.mark.parametrize(
    "command, given",
    [(command, next(iter(GIVEN))) for command in COMMANDS]
    + [("train student", given) for given in [*GIVEN][1:]]
    + [("evaluate", "workdir"), ("generate", "workdir")],
)
def test_every_command_names_what_is_no_model(command, given, whole, tmp_path, capsys):
    files, message = GIVEN[given]
    (tmp_path / "given").mkdir()
    for name, text in files.items():
        (tmp_path / "given" / name).write_text(text)
    door, words = COMMANDS[command]
    places = whole | {"GIVEN": tmp_path / "given", "OUT": tmp_path / "out"}
    words = [str(places.get(word, word)) for word in words]
    if door is train:
        other = "--teacher.path" if "--student.path" in words else "--student.path"
        words += [other, str(places["MODEL"]), "--workdir", str(tmp_path / "run")]
        words += ["--data.path", str(places["DATA"])]
    if door is plan:
        words += ["--teacher.path", str(places["MODEL"])]
    assert run_command(door.main, words) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert not (tmp_path / "run").exists() and not (tmp_path / "out").exists()
