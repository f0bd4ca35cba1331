"""Laws of the data: which tokens have a loss, how rows are filled, kept and ordered."""

import copy
import dataclasses
import datetime
import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny

from kd_jax import data
from kd_jax.config import Config, DataConfig, StudentConfig, TeacherConfig, UserError
from kd_jax.data import Document, Rows, batches, eval_batches, make_rows

fast = pytest.mark.fast


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny.write_tokenizer(folder)
    return data.load_tokenizer(folder)


@pytest.fixture(scope="module")
def llama3(real_data):
    return data.load_tokenizer(real_data / "llama3_tokenizer")


@pytest.fixture
def config(tmp_path) -> DataConfig:
    path = tiny.write_data(tmp_path / "train.jsonl")
    return DataConfig(path=str(path), seq_len=128, cache_dir=str(tmp_path / "cache"))


def rows_of(config: DataConfig, tokenizer: Any, template: str = tiny.TEMPLATE) -> Rows:
    return make_rows(config, tokenizer, template)


def same_rows(a: Rows, b: Rows) -> bool:
    return all(np.array_equal(getattr(a, name), getattr(b, name)) for name in data.COLUMNS)


def chat(*contents: str, roles: str = "ua") -> list[dict[str, str]]:
    names = {"s": "system", "u": "user", "a": "assistant"}
    letters = roles * (len(contents) // len(roles))
    return [{"role": names[r], "content": c} for r, c in zip(letters, contents, strict=True)]


def write_lines(path: Path, records: list[Any]) -> Path:
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
    path.write_text("".join(lines), encoding="utf-8")
    return path


# Which tokens have a loss.

HARD = [
    "naïve café",
    "👩‍👩‍👧‍👦 family",
    "日本語のテキスト。",
    "e\u0301 \u0301x",
    "שלום עולם",
    "  spaces \n\n around\t\n",
    "\u00a0no-break\u00a0",
    "\u200bzero width\u200b",
    "a",
    "assistant",
    "line\r\nbreaks\n\n\nin it",
    "🇳🇴",
]
CONVERSATIONS = [
    *(chat("Say it.", text) for text in HARD),
    *(chat(text, "It is five.") for text in HARD),
    chat(*HARD),
    chat("Be brief. 🙂", "Name it.", "Blue.", roles="sua"),
    chat("Be brief.", "Name it.", "Blue.", "And?", "Green.", "No.", roles="suauaa"),
    chat("Hello! 🙂", "Hi.", "How are you?", roles="aua"),
    chat("It is five.", "And", "five more.", roles="aaa"),
    chat("Rules.", "Hello there.", "Hi.", "Bye.", roles="saua"),
]


def check_mask(tokenizer: Any, conversations: list, template: str, end_of_turn: str) -> None:
    for train_on in ("assistant", "all"):
        config = DataConfig(path="", train_on=train_on)
        documents = data.tokenize(tokenizer, conversations, template, config)
        for messages, document in zip(conversations, documents, strict=True):
            ids = tokenizer.apply_chat_template(
                messages, chat_template=template, date_string=config.date, return_dict=True
            )["input_ids"]
            assert document.tokens.tolist() == ids
            if train_on == "all":
                assert not document.target[0] and document.target[1:].all()
                continue
            answers = [m["content"].strip() for m in messages if m["role"] == "assistant"]
            assert tokenizer.decode(
                document.tokens[document.target], clean_up_tokenization_spaces=False
            ) == "".join(answer + end_of_turn for answer in answers)


@fast
def test_loss_covers_exactly_answers_and_their_end(tokenizer):
    check_mask(tokenizer, CONVERSATIONS, tiny.TEMPLATE, "<|eot|>")


def test_loss_covers_exactly_answers_and_their_end_with_llama3(llama3):
    check_mask(llama3, CONVERSATIONS, llama3.get_chat_template(), "<|eot_id|>")


@pytest.mark.parametrize("name", ["gsm8k_alpaca.json", "roleplay_chat.jsonl"])
def test_loss_covers_exactly_answers_and_their_end_on_real_data(name, llama3, real_data):
    conversations = data.read_conversations(str(real_data / name), "", None)[::10]
    check_mask(llama3, conversations, llama3.get_chat_template(), "<|eot_id|>")


@fast
def test_what_follows_the_end_of_turn_has_no_loss(tokenizer):
    template = tiny.TEMPLATE.replace("+ '<|eot|>' -}}{%- endfor", "+ '<|eot|>\n' -}}{%- endfor")
    check_mask(tokenizer, [chat("Hi.", "Blue.", "And?", "Green.")], template, "<|eot|>")


@fast
def test_system_message_is_kept_and_not_trained_on(tokenizer):
    messages = chat("Be brief.", "Name it.", "Blue.", roles="sua")
    (document,) = data.tokenize(tokenizer, [messages], tiny.TEMPLATE, DataConfig(path=""))
    assert "Be brief." in tokenizer.decode(document.tokens)
    assert "Be brief." not in tokenizer.decode(document.tokens[document.target])


EARLIER = "{{ messages | length }}{% for m in messages %}{{ m.content }}<|eot|>{% endfor %}"
LATEST = "{% for m in messages %}{% if loop.last or m.role == 'user' %}{{ m.content }}{% endif %}"
NEITHER = "{% for m in messages %}{{ m.role }}{{ m.content }}<|eot|>{% endfor %}"


@fast
@pytest.mark.parametrize(
    "template, roles, said",
    [
        (EARLIER, "ua", "rewrites earlier turns"),
        (LATEST + "{% endfor %}", "uaua", "rewrites earlier turns"),
        (NEITHER, "auau", "rewrites earlier turns"),
        ("{{ raise_exception('roles must alternate') }}", "ua", "'Q.' (roles must alternate)"),
        ("{% for m in messages %}", "ua", "refuses"),
        ("{{ messages[0].content + 1 }}", "ua", "refuses"),
    ],
)
def test_template_that_hides_where_answers_lie_is_refused(template, roles, said, tokenizer):
    messages = chat(*["Q.", "A.", "Q2.", "A2."][: len(roles)], roles=roles)
    with pytest.raises(UserError) as caught:
        data.tokenize(tokenizer, [messages], template, DataConfig(path=""))
    assert str(caught.value).startswith("data.chat-template: ") and said in str(caught.value)


def freeze(monkeypatch, day: int) -> None:
    import transformers.utils.chat_template_utils as module

    moment = datetime.datetime(2030, 1, day)
    monkeypatch.setattr(module, "datetime", SimpleNamespace(now=lambda: moment))


TODAY = "\n{% set date_string = strftime_now('%d %b %Y') -%}" + tiny.TEMPLATE


@fast
@pytest.mark.parametrize("template", [tiny.TEMPLATE, TODAY])
def test_rows_do_not_depend_on_the_day(template, tokenizer, config, tmp_path, monkeypatch):
    texts, rows = [], []
    for day in (1, 2):
        freeze(monkeypatch, day)
        texts.append(
            tokenizer.apply_chat_template(chat("Q.", "A."), chat_template=template, tokenize=False)
        )
        there = dataclasses.replace(config, cache_dir=str(tmp_path / str(day)))
        rows.append(rows_of(there, tokenizer, template))
    assert texts[0] != texts[1]
    assert same_rows(*rows)
    assert template.startswith("\n") == texts[0].startswith("\n")
    there = dataclasses.replace(config, date="01 Jan 2030")
    assert not same_rows(rows[0], rows_of(there, tokenizer, template))
    text, _ = data.render(tokenizer, chat("Q.", "A."), template, "01 Jan 2030")
    assert text == texts[0]


@fast
@pytest.mark.parametrize("date", ["{{ date_string }}", "{{ strftime_now('%d %b %Y') }}"])
def test_template_shows_the_configured_date(date, tokenizer):
    template = date + tiny.TEMPLATE.replace("strftime_now('%d %b %Y')", "'05 May 2020'")
    text, _ = data.render(tokenizer, chat("Q.", "A."), template, "01 Jan 2030")
    assert text.startswith("01 Jan 2030<|begin|>") and "Today: 01 Jan 2030<|eot|>" in text


@fast
def test_chat_template_is_the_files_else_the_students_else_the_teachers(tmp_path):
    def having(template):
        return SimpleNamespace(chat_template=template, get_chat_template=lambda: template)

    config = DataConfig(path="")
    assert data.chat_template_of(config, having("s"), having("t")) == "s"
    assert data.chat_template_of(config, having(None), having("t")) == "t"
    with pytest.raises(UserError, match=r"data\.chat-template: neither tokenizer"):
        data.chat_template_of(config, having(None))
    config = DataConfig(path="", chat_template=str(tmp_path / "file.jinja"))
    with pytest.raises(UserError, match=r"data\.chat-template: expected a Jinja file, got .*file"):
        data.chat_template_of(config, having("s"))
    (tmp_path / "file.jinja").write_text("ü", encoding="utf-8")
    assert data.chat_template_of(config, having("s")) == "ü"


# Tokenizers.


@fast
def test_unusable_tokenizer_is_refused(tmp_path):
    with pytest.raises(UserError, match="expected tokenizer files"):
        data.load_tokenizer(tmp_path)


def edited(folder: Path, change: Callable[[dict[str, Any]], Any]) -> Any:
    """Returns the tiny tokenizer after a change of its tokenizer.json."""
    tiny.write_tokenizer(folder)
    file = folder / "tokenizer.json"
    tree = json.loads(file.read_text())
    change(tree)
    file.write_text(json.dumps(tree))
    return data.load_tokenizer(folder)


def swap_merges(tree: dict[str, Any]) -> None:
    merges = tree["model"]["merges"]
    merges[0], merges[1] = merges[1], merges[0]


def swap_ids(tree: dict[str, Any]) -> None:
    vocab = tree["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]


@fast
def test_tokenizers_must_agree_in_all_but_the_template(tokenizer, tmp_path):
    other = copy.deepcopy(tokenizer)
    other.chat_template = "another"
    assert data.check_same_tokenizer(tokenizer, other, "s", "t") == len(tokenizer)
    for name, change, said in (
        ("merges", swap_merges, "s and t, which differ in the merges"),
        ("ids", swap_ids, "s and t, which differ in 2 tokens ('a' is"),
    ):
        with pytest.raises(UserError) as caught:
            data.check_same_tokenizer(tokenizer, edited(tmp_path / name, change), "s", "t")
        assert said in str(caught.value)


# Reading.

ALPACA = [
    {"instruction": "Add.", "input": "2, 3", "output": "Five 🙂"},
    {"instruction": "Name it.", "input": "", "output": "Blue."},
    {"instruction": "Line\u2028break.", "input": "", "output": "[{}]"},
]
CHATS = [
    {"messages": chat("Add.\n\n2, 3", "Five 🙂")},
    {"messages": chat("Name it.", "Blue.")},
    {"messages": chat("Line\u2028break.", "[{}]")},
]


def write_parquet(path: Path, records: list[dict[str, Any]]) -> Path:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(records), path)
    return path


def write_folder(folder: Path) -> Path:
    folder.mkdir()
    write_lines(folder / "train.jsonl", CHATS)
    write_lines(folder / "test.jsonl", CHATS[:1])
    return folder


def write_array(path: Path, encoding: str = "utf-8", indent: int | None = 1) -> Path:
    path.write_text(json.dumps(ALPACA, indent=indent, ensure_ascii=False), encoding=encoding)
    return path


FORMS: dict[str, Callable[[Path], Path]] = {
    "alpaca array": lambda folder: write_array(folder / "a.json"),
    "array on one line": lambda folder: write_array(folder / "o.json", indent=None),
    "byte-order mark": lambda folder: write_array(folder / "b.json", "utf-8-sig"),
    "alpaca lines": lambda folder: write_lines(folder / "l.json", ALPACA),
    "chat lines": lambda folder: write_lines(folder / "c.jsonl", CHATS),
    "alpaca parquet": lambda folder: write_parquet(folder / "a.parquet", ALPACA),
    "chat parquet": lambda folder: write_parquet(folder / "c.parquet", CHATS),
    "folder": lambda folder: write_folder(folder / "hub"),
}


@pytest.fixture
def datasets_cache(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")


@fast
@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_rows(form, tokenizer, config, tmp_path, datasets_cache):
    rows = rows_of(dataclasses.replace(config, path=str(FORMS[form](tmp_path))), tokenizer)
    plain = write_lines(tmp_path / "plain.jsonl", CHATS)
    assert same_rows(rows, rows_of(dataclasses.replace(config, path=str(plain)), tokenizer))
    assert rows.counts["conversations"] == len(CHATS)


BAD = {
    "{": "expected JSON, got '{'",
    "3": "expected an object, got int",
    "{}": "expected messages, or instruction and output, got no fields",
    '{"text": "x"}': "expected messages, or instruction and output, got text",
    '{"instruction": "x"}': "expected messages, or instruction and output, got instruction",
    '{"instruction": "x", "output": " "}': "turn 2: expected an answer, got an empty one",
    '{"instruction": "x", "output": 3}': "turn 2: expected text, got 3",
    '{"instruction": null, "output": "x"}': "instruction: expected text, got None",
    '{"instruction": "x", "input": [1], "output": "x"}': "input: expected text, got [1]",
    '{"messages": []}': "messages: expected a list of turns, got []",
    '{"messages": "x"}': "messages: expected a list of turns, got 'x'",
    '{"messages": ["x"]}': "turn 1: expected role and content, got 'x'",
    '{"messages": [{"role": "user"}]}': "turn 1: expected role and content, got {'role'",
    '{"messages": [{"role": "bot", "content": "x"}]}': "turn 1: expected role system|user|",
    '{"messages": [{"role": [], "content": "x"}]}': "turn 1: expected role system|user|",
    '{"messages": [{"role": "user", "content": [1]}]}': "turn 1: expected text, got [1]",
    '{"messages": [{"role": "user", "content": "x"}]}': "expected a turn of the assistant",
}
GOOD = json.dumps(ALPACA[0])


def refused(path: Path, text: str, limit: int | None = None) -> list[str]:
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        data.read_conversations(str(path), "", limit)
    return str(caught.value).splitlines()


@fast
@pytest.mark.parametrize("record", BAD)
def test_bad_record_is_refused_with_its_line(record, tmp_path):
    file = tmp_path / "x.json"
    (problem,) = refused(file, f"{GOOD}\n\n{record}\n{GOOD}\n")
    assert problem.startswith(f"{file}:3: {BAD[record]}")
    if record != "{":
        (problem,) = refused(file, f"[\n{GOOD},\n{record}\n, {GOOD}]")
        assert problem.startswith(f"{file}:3: {BAD[record]}")


@fast
def test_all_problems_of_a_file_are_one_message(tmp_path):
    file = tmp_path / "x.jsonl"
    problems = refused(file, "\n".join([GOOD, *BAD]))
    assert [line.split(": ")[0] for line in problems] == [
        f"{file}:{i + 2}" for i in range(len(BAD))
    ]
    problems = refused(file, "3\n" * (data.MAX_SHOWN + 5))
    assert len(problems) == data.MAX_SHOWN + 1 and problems[-1] == "and 5 more"


@fast
@pytest.mark.parametrize(
    "text, line",
    [
        (f"[{GOOD},\n{GOOD}", 2),
        (f"[{GOOD},\n{GOOD[:-1]}\n]", 3),
        (f"[{GOOD}\n{GOOD}]", 2),
        (f"[{GOOD},\n,{GOOD}]", 2),
        (f"[{GOOD}]\n[{GOOD}]", 2),
    ],
)
def test_broken_array_is_refused_with_its_line(text, line, tmp_path):
    (problem,) = refused(tmp_path / "x.json", text)
    assert problem.startswith(f"{tmp_path / 'x.json'}:{line}: expected a JSON array")


@fast
def test_bad_parquet_record_is_refused_with_its_number(tmp_path, datasets_cache):
    records = [ALPACA[0], {**ALPACA[1], "output": None}]
    path = str(write_parquet(tmp_path / "x.parquet", records))
    with pytest.raises(UserError, match=r"x\.parquet, record 2: turn 2: expected text, got None"):
        data.read_conversations(path, "", None)


@fast
@pytest.mark.parametrize("text", ["", "\n\n", "[]"])
def test_file_without_records_is_refused(text, tmp_path):
    assert refused(tmp_path / "x.json", text) == [
        f"{tmp_path / 'x.json'}: expected records, got none"
    ]


@fast
def test_limit_takes_the_first_records_and_reads_no_further(tmp_path):
    file = tmp_path / "x.jsonl"
    file.write_text(f"{GOOD}\n{json.dumps(ALPACA[1])}\nbroken\n")
    assert [len(data.read_conversations(str(file), "", limit)) for limit in (1, 2)] == [1, 2]
    assert len(refused(file, f"{GOOD}\nbroken\nbroken\n", limit=2)) == 1


@fast
@pytest.mark.parametrize("name", ["x.jsonl", "x.json", "x.parquet", "nobody/nothing", "folder"])
def test_missing_data_is_refused(name, tmp_path, monkeypatch, datasets_cache):
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    with pytest.raises(UserError, match=f"data: expected .*, got {name}, which"):
        data.read_conversations(name, "train", None)


@fast
def test_text_that_is_not_utf8_is_refused(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(b'{"instruction": "\xff"}')
    with pytest.raises(UserError, match=r"x\.jsonl: cannot be read"):
        data.read_conversations(str(tmp_path / "x.jsonl"), "", None)


# Fitting and packing.


def document(length: int, start: int = 0, first_target: int = 1) -> Document:
    tokens = np.arange(start, start + length, dtype=np.int32)
    return Document(tokens, np.arange(length) >= first_target)


@fast
@pytest.mark.parametrize(
    "overlong, lengths, counts",
    [
        ("truncate", [4, 8, 8], {"truncated": 2, "dropped": 0, "without_target": 1}),
        ("drop", [4, 8], {"truncated": 0, "dropped": 2, "without_target": 0}),
    ],
)
def test_overlong_conversations_are_cut_or_dropped_and_counted(overlong, lengths, counts):
    documents = [document(4), document(8), document(9), document(30, first_target=8)]
    config = DataConfig(path="d", seq_len=8, overlong=overlong)
    kept, got = data.fit(documents, config, "d")
    assert [len(d.tokens) for d in kept] == lengths == [len(d.target) for d in kept]
    assert got == {"conversations": 4, **counts}


@fast
def test_overlong_error_lists_the_conversations():
    config = DataConfig(path="d", seq_len=8, overlong="error")
    with pytest.raises(UserError, match=r"d: 2 conv.* data\.seq-len 8: 2 \(9\), 4 \(10\) \("):
        data.fit([document(8), document(9), document(1), document(10)], config, "d")
    with pytest.raises(UserError, match=r", 20 \(9\) and 5 more \("):
        data.fit([document(9)] * (data.MAX_SHOWN + 5), config, "d")


@fast
@pytest.mark.parametrize("overlong", ["truncate", "drop"])
def test_rows_without_any_loss_are_refused(overlong):
    config = DataConfig(path="d", seq_len=8, overlong=overlong)
    with pytest.raises(
        UserError, match=r"d: no token with a loss .* \(2 of 2 .*Raise data\.seq-len"
    ):
        data.fit([document(9, first_target=8)] * 2, config, "d")


@fast
def test_describe_says_what_became_of_the_conversations(tokenizer, config):
    whole = data.describe(rows_of(config, tokenizer))
    assert whole.startswith("24 conversations: ") and "truncated" not in whole
    lengths = [len(d.tokens) for d in tokenized(config, tokenizer)]
    size = int(np.median(lengths))
    long = sum(length > size for length in lengths)
    assert 0 < long < 24
    short = dataclasses.replace(config, seq_len=size)
    rows = rows_of(short, tokenizer)
    assert f"24 conversations, {long} truncated" in data.describe(rows)
    assert f": {len(rows)} rows of {size} tokens, " in data.describe(rows)
    assert f"{rows.loss_mask.sum()} tokens with a loss" in data.describe(rows)
    rows = rows_of(dataclasses.replace(short, overlong="drop"), tokenizer)
    assert f"24 conversations, {long} dropped as too long: " in data.describe(rows)


def tokenized(config: DataConfig, tokenizer: Any) -> list[Document]:
    conversations = data.read_conversations(config.path, "", None)
    return data.tokenize(tokenizer, conversations, tiny.TEMPLATE, config)


def unpack(rows: dict[str, np.ndarray]) -> list[tuple[list[int], list[bool]]]:
    """Returns the documents of rows, after checking segments, positions and padding."""
    documents = []
    for tokens, segments, positions, mask in zip(*rows.values(), strict=True):
        count = segments.max()
        assert segments.tolist() == sorted(segments[segments > 0]) + [0] * (segments == 0).sum()
        assert set(segments) - {0} == set(range(1, count + 1))
        padding = segments == 0
        assert (tokens[padding] == -1).all() and not mask[padding].any()
        assert not positions[padding].any()
        for segment in range(1, count + 1):
            here = segments == segment
            assert positions[here].tolist() == list(range(here.sum()))
            documents.append((tokens[here].tolist(), mask[here].tolist()))
    return documents


def first_fit(lengths: list[int], size: int) -> int:
    """Returns the number of rows that first-fit in the given order takes."""
    rooms: list[int] = []
    for length in lengths:
        for row, room in enumerate(rooms):
            if room >= length:
                rooms[row] -= length
                break
        else:
            rooms.append(size - length)
    return len(rooms)


@fast
@pytest.mark.parametrize("seed", range(30))
def test_packing_loses_and_splits_nothing_and_fills_well(seed):
    random = np.random.default_rng(seed)
    size = int(random.integers(2, 64))
    lengths = random.integers(1, size + 1, int(random.integers(1, 200))).tolist()
    starts = np.cumsum([0, *lengths])
    documents = [document(n, int(start)) for n, start in zip(lengths, starts, strict=False)]
    config = DataConfig(path="", seq_len=size)
    rows = data.fill_rows(documents, config, pad=-1)
    want = sorted((d.tokens.tolist(), d.target.tolist()) for d in documents)
    assert sorted(unpack(rows)) == want
    assert {name: x.dtype for name, x in rows.items()} == data.COLUMNS
    assert len(rows["tokens"]) <= first_fit(lengths, size)
    apart = data.fill_rows(documents, dataclasses.replace(config, pack=False), pad=-1)
    assert unpack(apart) == [(d.tokens.tolist(), d.target.tolist()) for d in documents]
    assert apart["segment_ids"].max() == 1


# The row store.


@pytest.fixture
def stored(tokenizer, config, monkeypatch):
    """Rows in the store, and a tokenize() that fails from now on."""
    rows = rows_of(config, tokenizer)

    def fail(*_):
        raise AssertionError("tokenised again")

    monkeypatch.setattr(data, "tokenize", fail)
    return rows


@fast
def test_second_use_reads_the_store(stored, tokenizer, config):
    again = rows_of(config, tokenizer)
    assert same_rows(stored, again) and again.counts == stored.counts and again.key == stored.key
    assert isinstance(again.tokens, np.memmap)
    assert same_rows(stored, rows_of(dataclasses.replace(config, batch_size=3), tokenizer))


@fast
@pytest.mark.parametrize("name", [*(f"{column}.npy" for column in data.COLUMNS), "meta.json"])
@pytest.mark.parametrize("keep", [None, 0, 0.5, -1])
def test_damaged_store_is_made_anew(name, keep, tokenizer, config):
    rows = rows_of(config, tokenizer)
    (folder,) = Path(config.cache_dir).iterdir()
    if keep is None:
        (folder / name).unlink()
    else:
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[: int(len(whole) * keep) if keep >= 0 else keep])
    again = rows_of(config, tokenizer)
    assert same_rows(rows, again) and rows.counts == again.counts
    assert list(Path(config.cache_dir).iterdir()) == [folder]
    assert isinstance(rows_of(config, tokenizer).tokens, np.memmap)


@fast
def test_store_whose_columns_disagree_is_made_anew(tokenizer, config):
    rows = rows_of(config, tokenizer)
    (folder,) = Path(config.cache_dir).iterdir()
    np.save(folder / "positions.npy", rows.positions[1:])
    assert same_rows(rows, rows_of(config, tokenizer))


OPTIONS = {
    "seq_len": 127,
    "train_on": "all",
    "overlong": "drop",
    "pack": False,
    "date": "27 Jul 2024",
    "max_conversations": 24,
}
NOT_IN_ROWS = {"path", "split", "batch_size", "chat_template", "cache_dir"}


@fast
def test_every_option_is_known_to_be_in_the_key_or_not():
    assert {f.name for f in dataclasses.fields(DataConfig)} == NOT_IN_ROWS | OPTIONS.keys()


@fast
@pytest.mark.parametrize("name", [*OPTIONS, "template", "source", "special tokens", "merges"])
def test_change_of_what_rows_depend_on_makes_another_key(name, stored, tokenizer, config, tmp_path):
    template = tiny.TEMPLATE
    if name in OPTIONS:
        config = dataclasses.replace(config, **{name: OPTIONS[name]})
    elif name == "template":
        template += " "
    elif name == "source":
        path = Path(config.path)
        path.write_text(path.read_text().replace("cat", "car", 1))
    elif name == "special tokens":
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.bos_token = "<|start|>"
    else:
        tokenizer = edited(tmp_path / "edited", swap_merges)
    with pytest.raises(AssertionError, match="tokenised again"):
        rows_of(config, tokenizer, template)


@fast
def test_changed_folder_makes_another_key(tokenizer, config, tmp_path, datasets_cache):
    folder = write_folder(tmp_path / "hub")
    config = dataclasses.replace(config, path=str(folder))
    assert rows_of(config, tokenizer).counts["conversations"] == 3
    write_lines(folder / "train.jsonl", CHATS[:2])
    assert rows_of(config, tokenizer).counts["conversations"] == 2
    config = dataclasses.replace(config, split="test")
    assert rows_of(config, tokenizer).counts["conversations"] == 1


@fast
def test_truncation_in_the_tokenizers_file_changes_neither_rows_nor_key(
    config, tokenizer, tmp_path
):
    truncation = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
    other = edited(tmp_path / "edited", lambda tree: tree.update(truncation=truncation))
    assert same_rows(rows_of(config, other), rows_of(config, tokenizer))
    assert len(list(Path(config.cache_dir).iterdir())) == 1


@fast
def test_unwritable_store_is_the_users_mistake(tokenizer, config, tmp_path):
    (tmp_path / "file").touch()
    config = dataclasses.replace(config, cache_dir=str(tmp_path / "file" / "cache"))
    with pytest.raises(UserError, match=r"data\.cache-dir: .* cannot be written"):
        rows_of(config, tokenizer)


@fast
def test_held_out_rows_come_from_their_own_path(tokenizer, config, tmp_path):
    path = write_lines(tmp_path / "held_out.jsonl", CHATS)
    held_out = make_rows(config, tokenizer, tiny.TEMPLATE, path=str(path), max_conversations=2)
    assert held_out.counts["conversations"] == 2
    same = make_rows(config, tokenizer, tiny.TEMPLATE, path=config.path)
    assert same_rows(same, rows_of(config, tokenizer))


# Batches.


def numbered_rows(count: int, seq_len: int = 4) -> Rows:
    """Returns rows whose tokens are all the row's number."""
    tokens = np.repeat(np.arange(count, dtype=np.int32)[:, None], seq_len, axis=1)
    ones, positions = np.ones_like(tokens), np.broadcast_to(np.arange(seq_len), tokens.shape)
    return Rows(tokens, ones, positions, ones.astype(bool), counts={}, key="")


def take(count: int, rows: Rows, **options: Any) -> list[dict[str, np.ndarray]]:
    given = {"seed": 0, "start_step": 0, "batch_size": 4, "accumulation_steps": 1, **options}
    stream = batches(rows, **given)
    try:
        return [next(stream) for _ in range(count)]
    finally:
        stream.close()


def numbers(some: list[dict[str, np.ndarray]]) -> np.ndarray:
    return np.concatenate([batch["tokens"][..., 0].ravel() for batch in some])


@fast
@pytest.mark.parametrize("start", [1, 5, 12])
def test_batch_is_a_function_of_seed_and_step(start):
    rows = numbered_rows(7)
    (resumed,) = take(1, rows, start_step=start)
    straight = take(start + 1, rows)[-1]
    assert resumed.keys() == data.COLUMNS.keys()
    assert all(np.array_equal(resumed[name], straight[name]) for name in resumed)


@fast
def test_every_epoch_visits_every_row_once_in_its_own_order():
    epochs = numbers(take(30, numbered_rows(20))).reshape(-1, 20)
    assert (np.sort(epochs) == np.arange(20)).all()
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == len(epochs)


@fast
def test_seed_changes_the_order():
    orders = [tuple(numbers(take(5, numbered_rows(20), seed=seed))) for seed in (0, 1, 2**32 - 1)]
    assert len(set(orders)) == 3


@fast
def test_accumulation_only_splits_the_batch():
    rows = numbered_rows(9)
    for whole, split in zip(take(5, rows), take(5, rows, accumulation_steps=2), strict=True):
        for name in data.COLUMNS:
            assert whole[name].shape == (1, 4, 4) and split[name].shape == (2, 2, 4)
            assert np.array_equal(whole[name].reshape(-1, 4), split[name].reshape(-1, 4))


@fast
def test_batch_larger_than_the_data_takes_rows_again():
    counts = np.bincount(numbers(take(3, numbered_rows(2))))
    assert counts.tolist() == [6, 6]


@fast
@pytest.mark.parametrize("count", [1, 4, 7])
def test_eval_batches_give_every_row_once_and_empty_rows(count):
    rows = numbered_rows(count)
    given = list(eval_batches(rows, 4))
    assert all(x.shape == (4, 4) for batch in given for x in batch.values())
    joined = {name: np.concatenate([batch[name] for batch in given]) for name in data.COLUMNS}
    for name, column in joined.items():
        assert np.array_equal(column[:count], getattr(rows, name))
    assert not joined["loss_mask"][count:].any() and not joined["segment_ids"][count:].any()


@fast
@pytest.mark.parametrize("length, steps", [({"steps": 5}, 5), ({"epochs": 1.5}, math.ceil(15 / 4))])
def test_number_of_steps(length, steps):
    config = Config(
        workdir="w",
        teacher=TeacherConfig(path="t"),
        student=StudentConfig(path="s"),
        data=DataConfig(path="d", batch_size=4),
        **length,
    )
    assert data.num_steps(numbered_rows(10), config) == steps
