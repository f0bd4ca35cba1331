"""What is no model is named, with what to give instead."""

import json
import os
import socket

import pytest
import tiny

from kd_jax.config import UserError
from kd_jax.data.chat import load_tokenizer
from kd_jax.weights.folder import load_architecture, resolve

RUN = json.dumps({"config": {}, "inputs": {}, "versions": {}})
ADAPTER = json.dumps({"base_model_name_or_path": "meta-llama/Llama-3.2-1B"})
FOLDERS = {
    "adapter": ({"adapter_config.json": ADAPTER}, "got a PEFT adapter of meta-llama/Llama-3.2-1B"),
    "adapter not JSON": ({"adapter_config.json": "{"}, "got a PEFT adapter. Give its base model"),
    "workdir": ({"config.json": RUN, "metrics.jsonl": ""}, "got the workdir of a run. Export"),
    "gguf": ({"model-q4.gguf": ""}, "got GGUF files"),
    "Meta's form": ({"params.json": "{}", "consolidated.00.pth": ""}, "got a model in its maker's"),
    "cache entry": ({"snapshots/01/config.json": "{}", "refs/main": ""}, "Give its model: "),
    "folder of models": ({"checkpoint-500/config.json": "{}"}, "Give one of them: checkpoint-500"),
    "pickled alone": ({"pytorch_model.bin": ""}, "got pytorch_model.bin"),
    "empty": ({}, "got an empty folder"),
    "many files": ({f"{i:02}.txt": "" for i in range(99)}, "got 00.txt, 01.txt, 02.txt"),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_a_folder_without_a_model_is_named(case, tmp_path):
    files, message = FOLDERS[case]
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError) as error:
        load_architecture(resolve(str(tmp_path), "student.path"))
    assert str(error.value).startswith(
        f"{tmp_path / 'config.json'}: expected a model's config.json"
    )
    assert message in str(error.value) and len(str(error.value)) < 500


def make_socket(path):
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(path)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "a.safetensors", "x.jinja"])
def test_special_files_are_refused_without_being_read(name, tmp_path, monkeypatch):
    makers = {
        "a pipe (FIFO)": os.mkfifo,
        "a device": lambda path: os.symlink("/dev/zero", path),
        "a socket": make_socket,
    }
    monkeypatch.chdir(tmp_path)  # a socket's path is at most 107 bytes long
    for what, make in makers.items():
        make(name)
        with pytest.raises(UserError) as error:
            resolve(".", "student.path")
        assert str(error.value) == f"{name}: expected a file, got {what}"
        os.unlink(name)


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "model.safetensors", "adapter_model.safetensors"]
)
def test_a_git_lfs_pointer_is_named_in_any_file(name, tmp_path):
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(UserError, match=rf"{name}: expected a file, got a Git LFS pointer"):
        resolve(str(tmp_path), "student.path")


@pytest.mark.parametrize(
    "content, what",
    [
        (b"<!DOCTYPE html>\n<html>", "a web page"),
        (b"Entry not found", "the hub's message for a missing file"),
        (b"GGUF\x03\0\0\0", "a GGUF file"),
        (b"PK\x03\x04...", "a zip archive"),
        (b"/annex/objects/MD5-s1", "a git-annex pointer"),
    ],
)
def test_a_file_that_holds_something_else_is_named(content, what, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=f"model.safetensors: expected a file, got {what}"):
        resolve(str(tmp_path), "student.path")


def test_a_gguf_file_is_named(tmp_path):
    (tmp_path / "model.gguf").write_text("")
    with pytest.raises(UserError, match=r"which is a GGUF file \(llama.cpp\)"):
        resolve(str(tmp_path / "model.gguf"), "--model")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model_max_length": "nope"}, "model_max_length: expected a number, got 'nope'"),
        (
            {"tokenizer_class": "Tok", "auto_map": {"AutoTokenizer": [None, "evil.Tok"]}},
            "it asks to run Python code of the folder, which is never done",
        ),
        ({"padding_side": "up"}, "which do not load"),
    ],
    ids=str,
)
def test_a_tokenizer_of_no_use_is_refused_and_its_code_not_run(change, message, tmp_path):
    tiny.write_tokenizer(tmp_path)
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'RAN')!r}, 'w')\nclass Tok: pass\n")
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=message):
        load_tokenizer(tmp_path)
    assert not (tmp_path / "RAN").exists()


def test_a_tokenizer_model_alone_is_named_with_what_reads_it(tmp_path):
    tiny.write_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").rename(tmp_path / "tokenizer.model")
    with pytest.raises(
        UserError, match=r"no tokenizer\.json, and tokenizer\.model needs sentencep"
    ):
        load_tokenizer(tmp_path)
