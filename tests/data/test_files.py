"""Laws of the files: forms, splits, and what cannot be read."""

import bz2
import contextlib
import dataclasses
import gzip
import json
import lzma
import random
import re
import tracemalloc
from collections.abc import Callable
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import fsspec
import pytest
from samples import ALPACA, CHATS, chat, records_of, rows_of, same_rows, write_folder, write_lines

from kd_jax.config import UserError
from kd_jax.config.errors import MAX_SHOWN
from kd_jax.data import files, readers
from kd_jax.data.files import hash_source
from kd_jax.data.outputs import check_apart
from kd_jax.data.records import make_record


def table(records: list[dict[str, Any]]) -> Any:
    import pyarrow

    return pyarrow.Table.from_pylist(records)


def write_parquet(path: Path, records: list[dict[str, Any]]) -> Path:
    from pyarrow import parquet

    parquet.write_table(table(records), path)
    return path


def write_array(path: Path, encoding: str = "utf-8", indent: int | None = 1) -> Path:
    path.write_text(json.dumps(ALPACA, indent=indent, ensure_ascii=False), encoding=encoding)
    return path


def write_cells(path: Path, delimiter: str) -> Path:
    import csv

    with path.open("w", newline="", encoding="utf-8-sig") as stream:
        rows = csv.DictWriter(stream, ALPACA[0], delimiter=delimiter)
        rows.writeheader()
        rows.writerows(ALPACA)
    return path


def write_arrow(path: Path, kind: str, records: list[dict[str, Any]] = CHATS) -> Path:
    import pyarrow

    made = table(records)
    with getattr(pyarrow.ipc, f"new_{kind}")(str(path), made.schema) as writer:
        writer.write_table(made)
    return path


def packed(path: Path) -> Path:
    """Returns the file compressed, as its suffix says, in two parts."""
    import pyarrow

    plain = path.with_suffix("").read_bytes()
    parts = (plain[:100], plain[100:])
    if path.suffix.lower() == ".gz":
        path.write_bytes(b"".join(map(gzip.compress, parts)))
    else:
        path.write_bytes(b"".join(pyarrow.compress(x, "zstd", asbytes=True) for x in parts))
    return path


def save_to_disk(
    folder: Path, split: str | None = None, records: list[dict[str, Any]] = CHATS
) -> Path:
    import datasets

    made = datasets.Dataset(table(records))
    (made if split is None else datasets.DatasetDict({split: made})).save_to_disk(folder)
    return folder


def write_remote(path: Path) -> str:
    import fsspec

    address = f"memory:/{path}/x.jsonl.gz"
    with fsspec.open(address, "wb") as stream:
        stream.write(gzip.compress(write_lines(path / "x.jsonl", CHATS).read_bytes()))
    return address


FORMS: dict[str, Callable[[Path], Path | str]] = {
    "alpaca array": lambda folder: write_array(folder / "a.json"),
    "array on one line": lambda folder: write_array(folder / "o.json", indent=None),
    "byte-order mark": lambda folder: write_array(folder / "b.json", "utf-8-sig"),
    "alpaca lines": lambda folder: write_lines(folder / "l.json", ALPACA),
    "chat lines": lambda folder: write_lines(folder / "c.jsonl", CHATS),
    "upper case": lambda folder: write_lines(folder / "C.NDJSON", CHATS),
    "CSV": lambda folder: write_cells(folder / "c.csv", ","),
    "TSV": lambda folder: write_cells(folder / "c.tsv", "\t"),
    "alpaca parquet": lambda folder: write_parquet(folder / "a.parquet", ALPACA),
    "chat parquet": lambda folder: write_parquet(folder / "c.parquet", CHATS),
    "arrow stream": lambda folder: write_arrow(folder / "s.arrow", "stream"),
    "arrow file": lambda folder: write_arrow(folder / "f.arrow", "file"),
    "gzip": lambda folder: packed(write_lines(folder / "c.jsonl", CHATS).with_suffix(".jsonl.gz")),
    "zstd": lambda folder: packed(write_array(folder / "c.json").with_suffix(".json.ZST")),
    "gzip parquet": lambda folder: packed(
        write_parquet(folder / "c.parquet", CHATS).with_suffix(".parquet.gz")
    ),
    "folder": lambda folder: write_folder(folder / "hub"),
    "saved": lambda folder: save_to_disk(folder / "saved"),
    "saved splits": lambda folder: save_to_disk(folder / "saved", "train"),
    "object store": write_remote,
    "glob": lambda folder: (
        write_lines(folder / "g1.jsonl", CHATS[:2]).parent
        / write_lines(folder / "g2.jsonl", CHATS[2:]).name.replace("2", "*")
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_records(form, tmp_path, datasets_cache):
    records = records_of(FORMS[form](tmp_path))
    assert [record.messages for record in records] == [chat["messages"] for chat in CHATS]


@pytest.mark.parametrize("form", ["parquet", "arrow", "saved"])
def test_nulls_that_a_tables_objects_share_are_not_read(form, tmp_path, datasets_cache):
    calls = [{"function": {"name": "f", "arguments": {key: "x"}}} for key in "ab"]
    talk = chat("Q.", "A.")
    talk[1]["tool_calls"] = calls
    tools = [{"name": "f", "parameters": {key: {"type": "string"}}} for key in "ab"]
    records = [{"messages": talk, "tools": tools}]
    write = {
        "parquet": write_parquet,
        "arrow": lambda path, records: write_arrow(path, "file", records),
        "saved": lambda path, records: save_to_disk(path, records=records),
    }
    (found,) = records_of(write[form](tmp_path / f"x.{form}", records))
    (want,) = records_of(write_lines(tmp_path / "x.jsonl", records))
    assert (found.messages, found.tools) == (want.messages, want.tools)


def test_columns_without_a_name_and_blank_lines_are_no_answers(tmp_path):
    (tmp_path / "x.csv").write_text(",text,,\n0,One.,,\n1,Two.,,\n")
    (tmp_path / "x.txt").write_text("One.\r\n \t\r\n\r\nTwo.")
    for name in ("x.csv", "x.txt"):
        assert [record.text for record in records_of(tmp_path / name)] == ["One.", "Two."]
    (tmp_path / "x.csv").write_text("text,\nOne.,,more\n")
    with pytest.raises(ValueError, match="as many cells as the header has"):
        records_of(tmp_path / "x.csv")


def test_a_changed_file_at_an_address_has_another_hash(tmp_path, monkeypatch):
    class Quiet(SimpleHTTPRequestHandler):
        log_message = lambda *_: None  # noqa: E731

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=tmp_path)) as server:
        Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/c.jsonl"
        write_lines(tmp_path / "c.jsonl", CHATS)
        first, again = (hash_source(address, "train") for _ in range(2))
        write_lines(tmp_path / "c.jsonl", CHATS[1:])
        assert first == again != hash_source(address, "train")
        monkeypatch.setattr(fsspec.AbstractFileSystem, "ukey", lambda *_: 1 / 0)
        with pytest.raises(UserError, match=r"c.jsonl cannot be read .ZeroDivisionError"):
            hash_source(address, "train")
        server.shutdown()


def test_long_arrays_are_read_in_parts(tmp_path, monkeypatch):
    """Windows of 7 characters cut texts, escapes and numbers."""
    monkeypatch.setattr(readers, "_CHUNK_CHARACTERS", 7)
    values = [*ALPACA, {"a": [1.5e3, None, "\u00e9\U0001f600\n\\"]}, {"b": 123456789012}, {}]
    file = tmp_path / "x.json"
    for indent, blanks in ((None, ""), (2, "\n \n")):
        file.write_text(blanks + json.dumps(values, indent=indent))
        places, found = zip(*readers.read_file(str(file)), strict=True)
        assert list(found) == values and places[0] == f"{file}:{4 if blanks else 1}"
    sizes, read = [], readers._Window.read
    monkeypatch.setattr(readers._Window, "read", lambda *x: sizes.append(x[1]) or read(*x))
    file.write_text(f'[{{"a": "{"x" * 99}" "b": 1}}, {" " * 9999}]')
    with pytest.raises(UserError, match=r"x.json:1: expected a JSON array .Expecting ','"):
        list(readers.read_file(str(file)))
    assert sum(sizes) < 1000  # the rest, which may be gigabytes, is not read


@pytest.mark.parametrize("kind", ["stream", "file"])
def test_long_tables_are_read_in_parts(kind, tmp_path):
    import pyarrow

    batch = pyarrow.record_batch({"text": ["x" * 2**14] * 64})
    with getattr(pyarrow.ipc, f"new_{kind}")(str(tmp_path / "x.arrow"), batch.schema) as writer:
        for _ in range(8):
            writer.write_batch(batch)
    records = readers.read_file(str(tmp_path / "x.arrow"))
    tracemalloc.start()
    assert next(records)[1] == {"text": "x" * 2**14}
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * batch.nbytes  # half of the file


GOOD = json.dumps(ALPACA[0])


def refused(path: Path, content: str | bytes) -> list[str]:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as caught:
        records_of(path)
    return str(caught.value).splitlines()


@pytest.mark.parametrize(
    "content, line",
    [
        (f"[{GOOD},\n{GOOD}", 2),
        (f"[{GOOD},\n{GOOD[:-1]}\n]", 3),
        (f"[{GOOD}\n{GOOD}]", 2),
        (f"[{GOOD},\n{GOOD[:-1]} x\n,\n\n{GOOD}]", 2),
        (f"[{GOOD},\n,{GOOD}]", 2),
        (f"[{GOOD},\n]", 2),
        (f"[{GOOD}]\n[{GOOD}]", 2),
        (f"[{GOOD},\n{'[' * 100_000}", 2),
        (f"[{GOOD},\n{'9' * 5000}]", 2),
        (f'[{GOOD},\n{{"text": "x", "text": "y"}}]', 2),
    ],
)
def test_broken_array_is_refused_with_its_line(content, line, tmp_path):
    (problem,) = refused(tmp_path / "x.json", content)
    assert problem.startswith(f"{tmp_path / 'x.json'}:{line}: expected a JSON array")


@pytest.mark.parametrize(
    "name, content, said",
    [
        ("x.jsonl", gzip.compress(b"{}", mtime=0), "gzip data. Name it .gz"),
        ("x.jsonl", bz2.compress(b"{}"), "bzip2 data. Decompress it"),
        ("x.jsonl", lzma.compress(b"{}"), "xz data. Decompress it"),
        ("x.csv", b"PK\x03\x04", "a zip archive. Unpack it"),
        ("x.json", GOOD.encode("utf-16"), "UTF-16 text"),
        ("x.jsonl", b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
        ("x.jsonl.gz", gzip.compress(b"{}" * 99, mtime=0)[:-9], "cannot be read (EOFError"),
        ("x.jsonl.zst", b"plain", "cannot be read (OSError"),
        ("x.parquet", b"plain", "cannot be read (ArrowInvalid"),
        ("x.arrow", b"plain", "cannot be read (ArrowInvalid"),
        ("x.txt", b"\xff\xfa", "cannot be read (UnicodeDecodeError"),
        ("x.json", json.dumps({"version": 1, "data": ALPACA}, indent=1), "(version, data). Write"),
        ("x.xml", b"<a/>", "expected a file ending in .json, .jsonl"),
        ("x.csv", "instruction,output,output\nQ,A,B\n", "of different names, got output twice"),
        ("x.csv", "instruction;output\nQ;A\n", "as the file's suffix says, got ';' in"),
        ("x.tsv", "instruction,output\nQ,A\n", "between them, as the file's suffix says, got ','"),
        ("x.tsv", 'text\nOne.\n"Two" 2\n', "x.tsv:3: expected a row of a table"),
    ],
)
def test_unreadable_file_is_refused_in_one_line(name, content, said, tmp_path):
    (problem,) = refused(tmp_path / name, content)
    assert said in problem and str(tmp_path / name) in problem


@pytest.mark.parametrize("name", ["x.jsonl", "x.parquet", "*.jsonl", "nobody/nothing", "folder"])
def test_missing_data_is_refused(name, tmp_path, monkeypatch, datasets_cache):
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    with pytest.raises(UserError, match=r"^data.*: expected .*(nobody|folder|x\.|\*)"):
        records_of(name)


def test_a_pipe_is_refused(tmp_path):
    import os

    os.mkfifo(tmp_path / "x.jsonl")
    with pytest.raises(UserError, match="a pipe or device"):
        records_of(tmp_path / "x.jsonl")


@pytest.mark.parametrize("form", [*FORMS][:15])
def test_damaged_files_are_read_or_refused_in_one_line(form, tmp_path):
    file = Path(FORMS[form](tmp_path))
    whole, draw = file.read_bytes(), random.Random(form)
    for _ in range(25):
        data = bytearray(whole)
        for _ in range(draw.choice([1, 1, 5])):
            at, size = draw.randrange(len(data)), draw.randrange(1, 50)
            change = draw.choice([b"", draw.randbytes(1), draw.randbytes(size), b'[{"}],\n' * size])
            data[at : at + draw.choice([0, 1, size])] = change
            data = data or bytearray(b"x")
        file.write_bytes(data)
        try:
            for _, raw in readers.read_file(str(file)):
                with contextlib.suppress(ValueError):
                    make_record("d:1", raw)
        except UserError as error:
            assert len(str(error).splitlines()) == 1


# Splits.


@pytest.mark.parametrize(
    "split", ["train", "train[98%:]", "train[:98%]", "train[:3]", "train[-5:]", "train[10%:20%]"]
)
@pytest.mark.parametrize("count", [3, 101])
def test_slice_of_a_file_is_that_of_datasets(split, count, tmp_path, datasets_cache):
    import datasets

    file = write_lines(tmp_path / "x.jsonl", [{"text": str(i)} for i in range(count)])
    try:
        want = datasets.load_dataset("json", data_files=str(file), split=split)["text"]
    except ValueError:
        with pytest.raises(UserError, match="is empty"):
            files.slice_of(str(file), split)
        return
    begin, end = files.slice_of(str(file), split)
    got = [raw for _, raw in files.read_raw(str(file), split, begin, end)]
    assert [json.loads(line)["text"] for line in got] == list(want)


@pytest.mark.parametrize(
    "split", ["test", "no such split", "train[", "train[a:]", "train[:1]+train[2:]"]
)
def test_split_that_a_file_does_not_have_is_refused_by_name(split, tmp_path):
    file = write_lines(tmp_path / "x.jsonl", CHATS)
    with pytest.raises(UserError, match=r"data\.split: expected .*train\[") as caught:
        files.slice_of(str(file), split)
    assert repr(split) in str(caught.value)


def test_names_of_files_tell_a_folders_splits(tmp_path):
    folder = write_folder(tmp_path / "hub")
    (folder / "notes.md").touch()
    assert len(records_of(folder)) == 3 and len(records_of(folder, "test")) == 1
    assert files.list_files(str(folder), "train").unread == ("notes.md", "test.jsonl")
    with pytest.raises(UserError, match=r"data\.split: expected test or train, the splits of"):
        records_of(folder, "validation")
    (folder / "test.jsonl").rename(folder / "contest.jsonl")
    (folder / "train.jsonl").rename(folder / "part.jsonl")
    assert len(records_of(folder)) == 4


@pytest.mark.parametrize(
    "names",
    [
        ["train/test.jsonl", "test/training-1.jsonl"],
        ["data/train_sft-00000-of-00001.jsonl", "data/train_gen-00000-of-00001.jsonl",
         "data/test_sft-00000-of-00001.jsonl"],
        ["data/train-00000-of-00001.jsonl", "data/code-00000-of-00001.jsonl"],
        ["de-train.jsonl", "de-dev.jsonl", "de-eval.jsonl"],
    ],
    ids=lambda names: names[0],
)  # fmt: skip
def test_splits_of_a_folder_are_those_of_datasets(names, tmp_path):
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_lines(tmp_path / name, CHATS)
    from datasets.data_files import DataFilesDict, get_data_patterns

    patterns = get_data_patterns(str(tmp_path))
    for split, theirs in DataFilesDict.from_patterns(patterns, base_path=str(tmp_path)).items():
        assert sorted(files.list_files(str(tmp_path), str(split)).files) == sorted(theirs)


def test_a_folder_whose_card_has_subsets_is_read_by_their_names(tmp_path, datasets_cache):
    parts = {"en": CHATS[:1], "de": CHATS[1:]}
    card = "".join(f"- config_name: {x}\n  data_files: {x}/*.jsonl\n" for x in parts)
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{card}---\n")
    for name, records in parts.items():
        (tmp_path / name).mkdir()
        write_lines(tmp_path / name / "train.jsonl", records)
    for name, records in parts.items():
        assert len(records_of(f"{tmp_path}:{name}")) == len(records)
    assert len({hash_source(f"{tmp_path}:{name}", "train") for name in parts}) == 2
    for wrong in ("", ":fr"):
        with pytest.raises(UserError, match=r"cannot be read .*\['en', 'de'\]"):
            records_of(f"{tmp_path}{wrong}")


def test_a_place_whose_files_would_be_data_is_refused(tmp_path):
    folder, named = tmp_path / "data", tmp_path / "named"
    for place in (folder / "a.jsonl", named / "train.jsonl"):
        place.parent.mkdir()
        place.write_text("{}\n")
    (tmp_path / "link").symlink_to(folder)
    inside = {"workdir": f"{folder}/runs/a", "--out": f"{tmp_path}/link/out.jsonl"}
    with pytest.raises(UserError) as refused:
        check_apart(str(folder), "train", inside)
    assert re.findall("^(.*): expected a place that data.path", str(refused.value), re.M) == [
        "workdir", "--out",
    ]  # fmt: skip
    with pytest.raises(UserError, match=r"^--out: "):
        check_apart(f"{folder}/*.jsonl", "train", inside)
    with pytest.raises(UserError, match=r"^workdir: "):
        check_apart(str(named), "train[:50%]", {"workdir": f"{named}/train-run"})
    for path in (str(named), f"{folder}/a.jsonl", "org/name", f"{folder}/*.json", f"{named}/*"):
        places = {"workdir": f"{named}/run", "--out": f"{folder}/out.jsonl", "cache": None}
        check_apart(path, "train", places | {"remote": "s3://data/x"})
    check_apart(str(folder), "train", {"cache": f"{folder}/.cache/rows", "out": f"{folder}-2"})


def test_the_flag_of_a_wrong_split_is_named(tmp_path):
    file = write_lines(tmp_path / "x.jsonl", CHATS)
    with pytest.raises(UserError, match=r"^--split: expected train"):
        files.list_files(str(file), "validation", "--data")


def test_a_folder_above_one_of_save_to_disk_has_its_records(tmp_path):
    save_to_disk(tmp_path / "above" / "saved", "train")
    assert len(records_of(tmp_path / "above")) == len(records_of(tmp_path / "above" / "saved"))


def test_what_a_folder_has_beside_its_records_is_said_and_not_read(tokenizer, config, tmp_path):
    beside = {"LICENSE.txt": "Free.", "dataset_infos.json": "{}", "config.json": "{}"}
    part = write_folder(tmp_path / "plain") / "train.jsonl"
    for name in ("a", "b"):  # the second has the rows of the first, from the store
        folder = tmp_path / name
        folder.mkdir()
        (folder / "x-00000-of-00003.jsonl").write_bytes(part.read_bytes())
        if name == "b":
            (folder / "link").symlink_to(tmp_path / "plain")
            for file, text in beside.items():
                (folder / file).write_text(text)
        rows = rows_of(dataclasses.replace(config, path=str(folder)), tokenizer)
        others = [f"{folder}: 4 other files are not read (LICENSE.txt, config.json, "
                  "dataset_infos.json, ...)"]  # fmt: skip
        missing = f"warning: {folder}: 1 of 3 files x-*-of-00003.jsonl are there"
        assert list(rows.notes) == [missing, *(others if name == "b" else [])]
        assert rows.counts["conversations"] == 3


def broken_link(folder: Path) -> Path:
    (write_folder(folder) / "train2.jsonl").symlink_to("nowhere")
    return folder


def snapshots(folder: Path) -> Path:
    for name in "ab":
        (folder / "snapshots" / name).mkdir(parents=True)
    return folder


INCOMPLETE = {
    "link": (broken_link, "a link to nowhere, which is not there"),
    "glob": (lambda folder: broken_link(folder) / "*.jsonl", "a link to nowhere, which"),
    "two snapshots": (snapshots, "expected one snapshot of"),
    "split": (
        lambda folder: save_to_disk(folder, "test"),
        "data.split: expected test, got 'train'",
    ),
    "long": (lambda folder: "x" * 300 + ".jsonl", "x.jsonl, which is not there"),
    "weight": (lambda folder: "x.jsonl:0.5", "expected no weight of a single source"),
}


@pytest.mark.parametrize("case", INCOMPLETE)
def test_data_that_are_not_whole_are_refused(case, tmp_path):
    make, said = INCOMPLETE[case]
    with pytest.raises(UserError, match=r"^data") as caught:
        path = str(make(tmp_path / "x"))
        files.check_source(path, "train")
        records_of(path)
    assert said in str(caught.value)


def test_hub_ids_have_a_subset_and_a_revision(monkeypatch, tmp_path):
    import datasets

    seen = []

    def load(*words, **options):
        seen.append((*words, options["revision"], options["split"]))
        return [CHATS[0]]

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.chdir(tmp_path)
    for path in ("org/name", "org/name:main", "org/name@v1.0", "org/name:main@refs/pr/3"):
        assert len(records_of(path, "test[:5]")) == 1
    assert seen == [
        ("org/name", None, None, "test[:5]"),
        ("org/name", "main", None, "test[:5]"),
        ("org/name", None, "v1.0", "test[:5]"),
        ("org/name", "main", "refs/pr/3", "test[:5]"),
    ]


# Whole data sets.


def test_all_problems_of_a_file_are_one_message(tokenizer, config, tmp_path):
    file = tmp_path / "x.jsonl"
    config = dataclasses.replace(config, path=str(file))
    file.write_text("\n".join([GOOD, "{", GOOD, *["3"] * 30]))
    with pytest.raises(UserError) as caught:
        rows_of(config, tokenizer)
    lines = str(caught.value).splitlines()
    assert len(lines) == MAX_SHOWN + 1 and lines[-1] == "and 11 more"
    assert lines[0].startswith(f"{file}:2: expected JSON, got '{{'")
    skip = dataclasses.replace(config, on_bad_record="skip")
    for _ in range(2):  # made, and from the store
        rows = rows_of(skip, tokenizer)
        assert rows.counts["conversations"] == 2 and "31 bad records" in rows.notes[0]
        assert rows.notes[1:] == tuple(lines)


@pytest.mark.parametrize("content", ["", "\n\n", "[]"])
def test_file_without_records_is_refused(content, tokenizer, config, tmp_path):
    (tmp_path / "x.json").write_text(content)
    config = dataclasses.replace(config, path=str(tmp_path / "x.json"))
    with pytest.raises(UserError, match=r"x\.json: expected records, got none"):
        rows_of(config, tokenizer)


def test_limit_takes_the_first_records_and_reads_no_further(tokenizer, config, tmp_path):
    file = tmp_path / "x.jsonl"
    file.write_text(f"{GOOD}\n{json.dumps(ALPACA[1])}\nbroken\n")
    for limit in (1, 2):
        some = dataclasses.replace(config, path=str(file), max_conversations=limit)
        assert rows_of(some, tokenizer).counts["conversations"] == limit
    with pytest.raises(UserError, match=r"x\.jsonl:3: expected JSON"):
        rows_of(dataclasses.replace(config, path=str(file)), tokenizer)


def test_a_slice_and_what_is_left_out_are_said(tokenizer, config, tmp_path):
    records = [{**chat, "id": i, "rejected": "x", "extra": [i]} for i, chat in enumerate(CHATS)]
    file = write_lines(tmp_path / "x.jsonl", records)
    config = dataclasses.replace(config, path=str(file), split="train[1:]")
    rows = rows_of(config, tokenizer)
    assert rows.counts["conversations"] == 2
    assert rows.notes == (
        f"{file}: train[1:] is records 2 to 3",
        f"warning: {file}: 2 records have `extra`: ignored, because records with messages have no "
        "such key",
        f"warning: {file}: 2 records have `rejected`: ignored, because only the chosen answer is "
        "trained on",
        f"warning: {file}: 2 records have `id`: ignored, as facts about them",
    )
    same = write_lines(tmp_path / "plain.jsonl", CHATS[1:])
    plain = dataclasses.replace(config, path=str(same), split="train")
    assert same_rows(rows, rows_of(plain, tokenizer))
