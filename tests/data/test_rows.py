"""Laws of the rows: packing, the store, order."""

import copy
import dataclasses
import gc
import os
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from samples import (
    CHATS,
    edited,
    records_of,
    rows_of,
    same_rows,
    swap_merges,
    write_folder,
    write_lines,
)

from kd_jax.config import Config, DataConfig, StudentConfig, TeacherConfig, UserError
from kd_jax.data import chat, packing, pool, prepare, store
from kd_jax.data import rows as data_rows
from kd_jax.data.batches import count_steps, eval_batches, train_batches
from kd_jax.data.chat import Document
from kd_jax.data.records import Record
from kd_jax.data.rows import Rows, make_rows
from kd_jax.data.store import StoreWriter


def document(length: int, start: int = 0, first_target: int = 1) -> Document:
    tokens = np.arange(start, start + length, dtype=np.int32)
    return Document(Record("d:1", []), tokens, np.arange(length) >= first_target)


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
    fitted = prepare.fit(documents, config)
    tokens, target, sizes = fitted.flat
    assert sizes.tolist() == lengths and len(tokens) == len(target) == sum(lengths)
    assert {name: fitted.counts[name] for name in counts} == counts


def test_long_text_is_cut_into_consecutive_rows():
    text = Record("d:1", [], text="x", answers=((0, 1),))
    long = dataclasses.replace(document(20), record=text)
    fitted = prepare.fit([long], DataConfig(path="d", seq_len=8))
    tokens, target, lengths = fitted.flat
    assert tokens.tolist() == list(range(20)) and lengths.tolist() == [8, 8, 4]
    assert np.flatnonzero(~target).tolist() == [0, 8, 16]
    assert fitted.counts["cut"] == 1 and not fitted.long


def test_overlong_error_lists_the_conversations(tokenizer, config):
    config = dataclasses.replace(config, seq_len=8, overlong="error")
    with pytest.raises(UserError) as caught:
        rows_of(config, tokenizer)
    assert "24 conversations are longer than data.seq-len 8: " in str(caught.value)
    assert f"{config.path}:20 (" in str(caught.value) and " and 4 more (" in str(caught.value)


@pytest.mark.parametrize("overlong", ["truncate", "drop"])
def test_rows_without_any_loss_are_refused(overlong, tokenizer, config, tmp_path):
    config = dataclasses.replace(config, seq_len=2, overlong=overlong)
    with pytest.raises(
        UserError, match=r": no token with a loss .* \(24 of 24 .*Raise data\.seq-len"
    ):
        rows_of(config, tokenizer)
    question, answer = CHATS[0]["messages"]
    without = {"messages": [question, {**answer, "weight": 0}]}
    path = write_lines(tmp_path / "without.jsonl", [without])
    config = dataclasses.replace(config, path=str(path), seq_len=128)
    with pytest.raises(UserError, match=r"expected a token with a loss, got none in 1 "):
        rows_of(config, tokenizer)


def test_describe_says_what_became_of_the_conversations(tokenizer, config):
    whole = data_rows.describe_rows(rows_of(config, tokenizer))
    assert whole.startswith("24 conversations: ") and "truncated" not in whole
    lengths = [len(d.tokens) for d in tokenized(config, tokenizer)]
    size = int(np.median(lengths))
    long = sum(length > size for length in lengths)
    assert 0 < long < 24
    short = dataclasses.replace(config, seq_len=size)
    rows = rows_of(short, tokenizer)
    assert f"24 conversations, {long} truncated" in data_rows.describe_rows(rows)
    assert f": {len(rows)} rows of {size} tokens, " in data_rows.describe_rows(rows)
    assert f"{np.sum(rows.loss_mask)} tokens with a loss" in data_rows.describe_rows(rows)
    rows = rows_of(dataclasses.replace(short, overlong="drop"), tokenizer)
    assert f"24 conversations, {long} dropped as too long: " in data_rows.describe_rows(rows)


def tokenized(config: DataConfig, tokenizer: Any) -> list[Document]:
    return chat.tokenize(tokenizer, records_of(config.path), tiny.TEMPLATE, config)[0]


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


def fill_rows(window: prepare.Prepared, config: DataConfig):
    chosen = packing.choose_rows(window, config, None)
    stored = packing.fill_rows(*packing.join_rows(window.flat, chosen), config.seq_len, pad=-1)
    assert {name: x.dtype for name, x in stored.items()} == store.STORED
    return {name: np.array(x) for name, x in store.columns_of(stored).items()}


@pytest.mark.parametrize("seed", range(30))
def test_packing_loses_and_splits_nothing_and_fills_well(seed):
    random = np.random.default_rng(seed)
    size = int(random.integers(2, 64))
    lengths = random.integers(1, size + 1, int(random.integers(1, 200))).tolist()
    starts = np.cumsum([0, *lengths])
    documents = [document(n, int(start)) for n, start in zip(lengths, starts, strict=False)]
    config = DataConfig(path="", seq_len=size)
    tokens = np.concatenate([one.tokens for one in documents])
    target = np.concatenate([one.target for one in documents])
    window = prepare.Prepared(prepare.Flat(tokens, target, np.array(lengths)))
    rows = fill_rows(window, config)
    want = sorted((d.tokens.tolist(), d.target.tolist()) for d in documents)
    assert sorted(unpack(rows)) == want
    assert {name: x.dtype for name, x in rows.items()} == data_rows.COLUMNS
    assert len(rows["tokens"]) <= first_fit(lengths, size)
    apart = fill_rows(window, dataclasses.replace(config, pack=False))
    assert unpack(apart) == [(d.tokens.tolist(), d.target.tolist()) for d in documents]
    assert apart["segment_ids"].max() == 1


@pytest.mark.parametrize("is_packed", [True, False])
def test_windows_and_processes_bound_memory_and_change_no_document(
    is_packed, tokenizer, config, monkeypatch, tmp_path
):
    monkeypatch.setattr(packing, "WINDOW_TOKENS", 500)
    monkeypatch.setattr(prepare, "_CHUNK_RECORDS", 5)
    monkeypatch.setattr(pool, "_ALONE_CHUNKS", 1)
    config = dataclasses.replace(config, pack=is_packed)
    counts = (1, 2) if is_packed else (1,)
    rows = [
        rows_of(
            dataclasses.replace(config, num_processes=n, cache_dir=str(tmp_path / str(n))),
            tokenizer,
        )
        for n in counts
    ]
    assert all(same_rows(rows[0], other) for other in rows)
    pad = {"tokens": np.where(np.array(rows[0].segment_ids) > 0, rows[0].tokens, -1)}
    found = unpack({name: np.array(getattr(rows[0], name)) for name in data_rows.COLUMNS} | pad)
    want = [(d.tokens.tolist(), d.target.tolist()) for d in tokenized(config, tokenizer)]
    assert sorted(found) == sorted(want)


def test_a_process_that_dies_is_reported(tokenizer, config, monkeypatch):
    monkeypatch.setattr(prepare, "_CHUNK_RECORDS", 5)
    monkeypatch.setattr(pool, "_ALONE_CHUNKS", 1)
    monkeypatch.setattr(pool.sys, "executable", "/bin/false")
    with pytest.raises(UserError, match=r"data\.num-processes: .* ended \(status 1\)"):
        rows_of(dataclasses.replace(config, num_processes=2), tokenizer)


# The row store.


@pytest.fixture
def stored(tokenizer, config, monkeypatch):
    """Rows in the store, and a tokenize() that fails from now on."""
    rows = rows_of(config, tokenizer)

    def fail(*_):
        raise AssertionError("tokenised again")

    monkeypatch.setattr(prepare, "tokenize", fail)
    return rows


def test_second_use_reads_the_store(stored, tokenizer, config):
    again = rows_of(config, tokenizer)
    assert same_rows(stored, again) and again.counts == stored.counts and again.key == stored.key
    assert isinstance(again.tokens, np.memmap)
    assert data_rows.describe_rows(again) == data_rows.describe_rows(stored)
    assert same_rows(stored, rows_of(dataclasses.replace(config, batch_size=3), tokenizer))


def test_notes_of_stored_rows_name_the_data_where_they_are_now(tokenizer, config, tmp_path):
    lines = [{**CHATS[0], "colour": "blue"}, *CHATS[1:], {"messages": 5}]
    config = dataclasses.replace(config, split="train[:4]", on_bad_record="skip")
    first, second = (write_lines(tmp_path / name, lines) for name in ("a.jsonl", "b.jsonl"))
    before, after = (
        rows_of(dataclasses.replace(config, path=str(path)), tokenizer) for path in (first, second)
    )
    assert before.key == after.key and len(before.notes) == 4
    assert [note.replace(str(first), str(second)) for note in before.notes] == [*after.notes]
    assert not any(str(first) in note for note in after.notes)


def in_memory(rows: Rows) -> Rows:
    return dataclasses.replace(rows, **{n: np.array(getattr(rows, n)) for n in data_rows.COLUMNS})


@pytest.mark.parametrize("name", [*(f"{column}.npy" for column in store.STORED), "meta.json"])
@pytest.mark.parametrize("keep", [None, 0, 0.5, -1])
def test_damaged_store_is_made_anew(name, keep, tokenizer, config):
    rows = in_memory(rows_of(config, tokenizer))
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


@pytest.mark.parametrize("name", store.STORED)
def test_store_with_zeroed_or_flipped_bytes_is_made_anew(name, tokenizer, config):
    rows = in_memory(rows_of(config, tokenizer))
    (folder,) = Path(config.cache_dir).iterdir()
    column = np.load(folder / f"{name}.npy")
    flipped = column.copy()
    flipped.view(np.uint8)[-1, -1] ^= 1
    for damage in (np.zeros_like(column), flipped):
        np.save(folder / f"{name}.npy", damage)
        again = rows_of(config, tokenizer)
        assert same_rows(rows, again) and "damaged: the rows are made again" in again.notes[0]
    assert not rows_of(config, tokenizer).notes


@pytest.mark.parametrize("meta", ["{}", "[]", "3", "null", '{"xxh3": 3}'])
def test_store_with_other_metadata_is_made_anew(meta, tokenizer, config):
    rows = in_memory(rows_of(config, tokenizer))
    (folder,) = Path(config.cache_dir).iterdir()
    (folder / "meta.json").write_text(meta)
    assert same_rows(rows, rows_of(config, tokenizer))


def test_store_whose_columns_disagree_is_made_anew(tokenizer, config):
    rows = in_memory(rows_of(config, tokenizer))
    (folder,) = Path(config.cache_dir).iterdir()
    np.save(folder / "marks.npy", np.load(folder / "marks.npy")[1:])
    assert same_rows(rows, rows_of(config, tokenizer))


OPTIONS = {
    "seq_len": 127,
    "train_on": "all",
    "overlong": "drop",
    "pack": False,
    "date": "27 Jul 2024",
    "max_conversations": 24,
    "on_bad_record": "skip",
}
NOT_IN_ROWS = {"path", "split", "batch_size", "chat_template", "cache_dir", "num_processes"}


def test_every_option_is_known_to_be_in_the_key_or_not():
    assert {f.name for f in dataclasses.fields(DataConfig)} == NOT_IN_ROWS | OPTIONS.keys()


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


def test_changed_folder_makes_another_key(tokenizer, config, tmp_path, datasets_cache):
    folder = write_folder(tmp_path / "hub")
    config = dataclasses.replace(config, path=str(folder))
    assert rows_of(config, tokenizer).counts["conversations"] == 3
    write_lines(folder / "train.jsonl", CHATS[:2])
    assert rows_of(config, tokenizer).counts["conversations"] == 2
    config = dataclasses.replace(config, split="test")
    assert rows_of(config, tokenizer).counts["conversations"] == 1


def test_truncation_in_the_tokenizers_file_changes_neither_rows_nor_key(
    config, tokenizer, tmp_path
):
    truncation = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
    other = edited(tmp_path / "edited", lambda tree: tree.update(truncation=truncation))
    assert same_rows(rows_of(config, other), rows_of(config, tokenizer))
    assert len(list(Path(config.cache_dir).iterdir())) == 1


def test_unwritable_store_is_the_users_mistake(tokenizer, config, tmp_path):
    (tmp_path / "file").touch()
    config = dataclasses.replace(config, cache_dir=str(tmp_path / "file" / "cache"))
    with pytest.raises(UserError, match=r"data\.cache-dir: .* cannot be written"):
        rows_of(config, tokenizer)


def test_a_full_disk_is_one_message_and_leaves_nothing(tokenizer, config, monkeypatch):
    begin = StoreWriter.__init__

    def begin_on_full_disk(writer, *arguments):
        begin(writer, *arguments)
        writer.files["tokens"].close()
        writer.files["tokens"] = os.fdopen(os.open("/dev/full", os.O_WRONLY), "wb", 2**20)

    monkeypatch.setattr(StoreWriter, "__init__", begin_on_full_disk)
    with pytest.raises(UserError, match=r"data\.cache-dir: .* cannot be written .*No space left"):
        rows_of(config, tokenizer)
    assert not list(Path(config.cache_dir).iterdir())


def test_held_out_rows_come_from_their_own_path(tokenizer, config, tmp_path):
    path = write_lines(tmp_path / "held_out.jsonl", CHATS)
    held_out = dataclasses.replace(config, path=str(path), max_conversations=2)
    assert rows_of(held_out, tokenizer).counts["conversations"] == 2


# Held-out parts, and blends.


def texts_of(rows: Rows, tokenizer: Any) -> set[str]:
    columns = {name: np.array(getattr(rows, name)) for name in data_rows.COLUMNS}
    columns["tokens"][columns["segment_ids"] == 0] = -1
    return {tokenizer.decode(tokens) for tokens, _ in unpack(columns)}


def test_held_out_fraction_and_the_rest_are_the_whole(tokenizer, config, tmp_path):
    whole = texts_of(rows_of(config, tokenizer), tokenizer)
    path = Path(config.path)
    twice = write_lines(tmp_path / "twice.jsonl", [])
    twice.write_text("".join(sorted(path.read_text().splitlines(keepends=True) * 2)))
    for file in (path, twice):
        there = dataclasses.replace(config, path=str(file))
        part, rest = (
            make_rows(there, tokenizer, tiny.TEMPLATE, fraction=0.3, held_out=held_out)
            for held_out in (True, False)
        )
        found = [texts_of(one, tokenizer) for one in (part, rest)]
        assert found[0] and found[1] and not found[0] & found[1] and found[0] | found[1] == whole
        if file == path:
            first = found
    assert found == first


@pytest.mark.parametrize(
    "held_out, fraction, said", [(True, 1e-9, "for eval"), (False, 0.999, "beside those for eval")]
)
def test_a_fraction_that_leaves_no_record_is_named(
    held_out, fraction, said, tokenizer, config, tmp_path
):
    write_lines(tmp_path / "train.jsonl", CHATS)
    with pytest.raises(UserError, match=rf"records {said}uation \(eval.fraction {fraction}\)"):
        make_rows(config, tokenizer, tiny.TEMPLATE, fraction=fraction, held_out=held_out)


def test_same_records_in_two_places_are_an_overlap(tokenizer, config, tmp_path):
    link = tmp_path / "link.jsonl"
    link.symlink_to(config.path)

    def at(split, path=config.path):
        return rows_of(dataclasses.replace(config, path=str(path), split=split), tokenizer)

    whole, first, last = at("train"), at("train[:50%]"), at("train[50%:]")
    assert data_rows.overlap(whole, last) == data_rows.overlap(at("train", link), first) != ""
    assert data_rows.overlap(first, last) == data_rows.overlap(last, first) == ""
    other = write_lines(tmp_path / "other.jsonl", CHATS)
    assert data_rows.overlap(whole, at("train", other)) == ""
    blend = at("train", f"{other},{config.path}")
    assert data_rows.overlap(blend, whole) and not data_rows.overlap(at("train", other), whole)


def test_a_blend_is_its_sources_one_after_the_other(tokenizer, config, tmp_path):
    other = write_lines(tmp_path / "other.jsonl", CHATS)
    one, two = (
        rows_of(dataclasses.replace(config, path=str(path)), tokenizer)
        for path in (config.path, other)
    )
    both = rows_of(dataclasses.replace(config, path=f"{config.path}, {other}"), tokenizer)
    for name in data_rows.COLUMNS:
        joined = np.concatenate([getattr(one, name), getattr(two, name)])
        column = getattr(both, name)
        assert np.array_equal(np.array(column), joined) and column.shape == joined.shape
        pick = np.array([[len(joined) - 1, 0], [1, 1]])
        assert np.array_equal(column[pick], joined[pick])
        assert np.array_equal(column[1:-1], joined[1:-1])
    assert both.counts["conversations"] == 27 and len(both) == len(one) + len(two)
    weighted = rows_of(dataclasses.replace(config, path=f"{config.path}:3,{other}:1"), tokenizer)
    assert len({one.key, two.key, both.key, weighted.key}) == 4
    assert "3 conversations" in data_rows.describe_rows(both)


@pytest.mark.parametrize("path", ["a.jsonl:0.5,b.jsonl", "a.jsonl:0,b.jsonl:1", "a.jsonl,"])
def test_blend_with_a_missing_weight_is_refused(path, tokenizer, config):
    with pytest.raises(UserError, match=r"data\.path: expected sources .*a\.jsonl:0\.7,b"):
        rows_of(dataclasses.replace(config, path=path), tokenizer)


# Batches.


def numbered_rows(count: int, seq_len: int = 4) -> Rows:
    """Returns rows whose tokens are all the row's number."""
    tokens = np.repeat(np.arange(count, dtype=np.int32)[:, None], seq_len, axis=1)
    ones, positions = np.ones_like(tokens), np.broadcast_to(np.arange(seq_len), tokens.shape)
    return Rows(tokens, ones, positions, ones.astype(bool), counts={}, key="")


def take(count: int, rows: Rows, **options: Any) -> list[dict[str, np.ndarray]]:
    given = {"seed": 0, "start_step": 0, "batch_size": 4, "accumulation_steps": 1, **options}
    stream = train_batches(rows, **given)
    try:
        return [next(stream) for _ in range(count)]
    finally:
        stream.close()


def numbers(some: list[dict[str, np.ndarray]]) -> np.ndarray:
    return np.concatenate([batch["tokens"][..., 0].ravel() for batch in some])


@pytest.mark.parametrize("start", [1, 5, 12])
def test_batch_is_a_function_of_seed_and_step(start):
    rows = numbered_rows(7)
    (resumed,) = take(1, rows, start_step=start)
    straight = take(start + 1, rows)[-1]
    assert resumed.keys() == data_rows.COLUMNS.keys()
    assert all(np.array_equal(resumed[name], straight[name]) for name in resumed)


def test_a_weighted_blend_draws_its_shares_and_resumes_exactly():
    rows = dataclasses.replace(numbered_rows(25), sources=(("a", 0.75, 5), ("b", 0.25, 20)))
    drawn = numbers(take(50, rows))
    assert abs((drawn < 5).mean() - 0.75) < 0.01
    assert np.bincount(drawn)[:5].min() >= 29 and np.bincount(drawn)[5:].min() >= 2
    for start in (1, 17):
        assert np.array_equal(numbers(take(3, rows, start_step=start)), drawn[4 * start :][:12])
    assert not np.array_equal(drawn, numbers(take(50, rows, seed=1)))
    alike = dataclasses.replace(rows, sources=(("a", 0.0, 5), ("b", 0.0, 20)))
    assert np.array_equal(numbers(take(9, alike)), numbers(take(9, numbered_rows(25))))


def test_every_epoch_visits_every_row_once_in_its_own_order():
    epochs = numbers(take(30, numbered_rows(20))).reshape(-1, 20)
    assert (np.sort(epochs) == np.arange(20)).all()
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == len(epochs)


def test_seed_changes_the_order():
    orders = [tuple(numbers(take(5, numbered_rows(20), seed=seed))) for seed in (0, 1, 2**32 - 1)]
    assert len(set(orders)) == 3


def test_accumulation_only_splits_the_batch():
    rows = numbered_rows(9)
    for whole, split in zip(take(5, rows), take(5, rows, accumulation_steps=2), strict=True):
        for name in data_rows.COLUMNS:
            assert whole[name].shape == (1, 4, 4) and split[name].shape == (2, 2, 4)
            assert np.array_equal(whole[name].reshape(-1, 4), split[name].reshape(-1, 4))


def test_batch_larger_than_the_data_takes_rows_again():
    counts = np.bincount(numbers(take(3, numbered_rows(2))))
    assert counts.tolist() == [6, 6]


@pytest.mark.parametrize("count", [1, 4, 7])
def test_eval_batches_give_every_row_once_and_empty_rows(count):
    rows = numbered_rows(count)
    given = list(eval_batches(rows, 4))
    assert all(x.shape == (4, 4) for batch in given for x in batch.values())
    joined = {name: np.concatenate([batch[name] for batch in given]) for name in data_rows.COLUMNS}
    for name, column in joined.items():
        assert np.array_equal(column[:count], getattr(rows, name))
    assert not joined["loss_mask"][count:].any() and not joined["segment_ids"][count:].any()


@pytest.mark.parametrize(
    "length, steps", [({"steps": 5}, 5), ({"epochs": 1.5}, 19), ({"epochs": 0.56}, 7)]
)
def test_number_of_steps(length, steps):
    config = Config(
        workdir="w",
        teacher=TeacherConfig(path="t"),
        student=StudentConfig(path="s"),
        data=DataConfig(path="d", batch_size=8),
        **length,
    )
    assert count_steps(numbered_rows(100), config) == steps


def test_made_rows_keep_no_tokenizer(config, tokenizer):
    """Training frees the tokenizer, which can use more memory than a small model."""
    used = copy.deepcopy(tokenizer)
    make_rows(config, used, used.chat_template)
    reference = weakref.ref(used)
    del used
    gc.collect()
    assert reference() is None
