"""The teacher's own prompt in rows: equal answers, cutting, packing, and what is refused."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import tiny
from samples import chat, write_lines

from kd_jax.config import TeacherConfig, UserError
from kd_jax.data.batches import read_batch
from kd_jax.data.prompts import TeacherPrompt, read_prompt
from kd_jax.data.rows import describe_rows, make_rows

PROMPT = TeacherPrompt("Speak as a cat.", False, None)
CHATS = [{"messages": chat(f"Number {i}?", "Five " * (1 + i % 4), "And?", "No.")} for i in range(9)]
NO_SYSTEM = tiny.TEMPLATE.replace(
    "{%- for m in messages -%}",
    "{%- if messages[0]['role'] == 'system' -%}{{ raise_exception('System role?') }}"
    "{%- endif -%}{%- for m in messages -%}",
)
SILENT = tiny.TEMPLATE.replace(
    "{%- for m in messages -%}", "{%- for m in messages if m['role'] != 'system' -%}"
)


OWN = [{"messages": chat("Q", "Yes."), "teacher_messages": chat("Hint: yes. Q", "Yes.")}]


def rows_of(config, tokenizer, records, prompt=PROMPT, template=tiny.TEMPLATE, **changes):
    path = write_lines(Path(config.cache_dir).parent / "chats.jsonl", records)
    data = dataclasses.replace(config, path=str(path), **changes)
    return make_rows(data, tokenizer, template, prompt=prompt)


def documents_of(rows):
    """Returns a row's documents: {row: [(tokens, target tokens)]}."""
    found = {}
    for row in range(len(rows)):
        tokens, segments, mask = (
            getattr(rows, name)[np.array([row])][0]
            for name in ("tokens", "segment_ids", "loss_mask")
        )
        own = [segments == n for n in range(1, segments.max() + 1)]
        found[row] = [(tokens[x].tolist(), tokens[x & mask].tolist()) for x in own]
    return found


@pytest.mark.parametrize("pack", [True, False])
def test_both_sides_have_the_same_answers_in_the_same_rows(pack, config, tokenizer):
    rows = rows_of(config, tokenizer, CHATS, pack=pack, seq_len=256)
    ours, theirs = documents_of(rows), documents_of(rows.teacher)
    assert (rows.teacher.tokens.shape[1] % 128 == 0 and len(rows) < 9) or not pack
    system = tokenizer("Speak as a cat.", add_special_tokens=False)["input_ids"]
    for row, documents in ours.items():
        assert [x for _, x in documents] == [x for _, x in theirs[row]] and documents
        for (tokens, _), (longer, _) in zip(documents, theirs[row], strict=True):
            text = tokenizer.decode(longer)
            assert "system<|end|>\n\nSpeak as a cat.<|eot|>" in text
            assert len(longer) > len(tokens) + len(system)
    assert "own rows of" in describe_rows(rows)


def test_places_point_to_what_predicts_the_same_token(config, tokenizer):
    rows = rows_of(config, tokenizer, CHATS, seq_len=256)
    row_ids, row_mask = np.array([[1, 0], [0, 1]]), np.array([True, False])
    batch = read_batch(rows, row_ids, row_mask, None)
    places, theirs = batch["teacher_places"], batch["teacher_tokens"]
    following = np.take_along_axis(np.roll(theirs, -1, -1), places, -1)
    target = np.roll(batch["loss_mask"], -1, -1)
    assert target[:, 0].sum() > 20 and not batch["teacher_tokens"][:, 1].any()
    labels = np.roll(batch["tokens"], -1, -1)
    np.testing.assert_array_equal(following[target], labels[target])
    assert (places[~target] == 0).all()
    # Twin: rows whose answers differ are no pair.
    other = dataclasses.replace(rows, teacher=rows_of(config, tokenizer, CHATS[::-1]).teacher)
    with pytest.raises(AssertionError, match="other target tokens"):
        read_batch(other, row_ids, np.ones(2, bool), None)


def test_a_blend_has_rows_of_the_longest_source(config, tokenizer, tmp_path):
    write_lines(tmp_path / "one.jsonl", CHATS[:2])
    long = [{"messages": chat("Why? " * 80, "No.")}]
    write_lines(tmp_path / "two.jsonl", [*CHATS, *long, *long])
    path = f"{tmp_path}/one.jsonl, {tmp_path}/two.jsonl"
    data = dataclasses.replace(config, path=path, seq_len=448)
    rows = make_rows(data, tokenizer, tiny.TEMPLATE, prompt=PROMPT)
    assert len({part.shape[1] for part in rows.teacher.tokens.parts}) == 2
    ours, theirs = documents_of(rows), documents_of(rows.teacher)
    assert all([x for _, x in ours[i]] == [x for _, x in theirs[i]] for i in ours)


def test_the_rows_of_a_run_without_a_prompt_do_not_know_of_it(config, tokenizer):
    plain = rows_of(config, tokenizer, CHATS, prompt=None)
    own = rows_of(config, tokenizer, CHATS)
    other = rows_of(config, tokenizer, CHATS, prompt=PROMPT._replace(system="Speak."))
    assert plain.teacher is None and len({plain.key, own.key, other.key}) == 3


@pytest.mark.parametrize(
    "overlong, said",
    [
        ("truncate", None),
        ("drop", r"no token with a loss is left within teacher\.seq-len 96 .*teacher\.seq-len$"),
        ("error", r"longer than teacher\.seq-len 96: .*Raise teacher\.seq-len, or set data\.over"),
    ],
)
def test_a_document_too_long_for_the_teacher_is_cut_on_both_sides_or_dropped(
    overlong, said, config, tokenizer
):
    short = PROMPT._replace(seq_len=96)
    options = {"seq_len": 256, "overlong": overlong}
    if said is not None:
        with pytest.raises(UserError, match=said):
            rows_of(config, tokenizer, CHATS, prompt=short, **options)
        return
    rows = rows_of(config, tokenizer, CHATS, prompt=short, **options)
    assert rows.counts["truncated"] == 9 and rows.teacher.tokens.shape[1] == 96
    ours, theirs = documents_of(rows), documents_of(rows.teacher)
    whole = documents_of(rows_of(config, tokenizer, CHATS, seq_len=256))
    lengths = sorted(len(x) for row in whole.values() for _, x in row)
    left = sorted(len(x) for row in ours.values() for _, x in row)
    assert sum(left) < sum(lengths)
    assert all([x for _, x in ours[i]] == [x for _, x in theirs[i]] for i in ours)


@pytest.mark.parametrize(
    "records, options, said",
    [
        ([{"text": "Plain."}], {}, "chats.jsonl:1: the teacher's conversation: .* got plain text"),
        ([{"prompt": "Q", "completion": "A"}], {}, "chats.jsonl:1: .* got plain text"),
        (CHATS, {"template": NO_SYSTEM}, "^teacher.system: .*takes a system.*System role"),
        (CHATS, {"template": SILENT}, "^teacher.system: .*shows a system message, got one that"),
        (CHATS, {"prompt": TeacherPrompt(None, True, None)},
         "records with teacher_messages, as teacher.messages says, got none"),
        ([*OWN, {"messages": chat("Q", "Yes."), "teacher_messages": chat("Q", "No.")}],
         {"prompt": TeacherPrompt(None, True, None)},
         r"chats.jsonl:2: .*turn 2: expected the record's turn 2, got 'No.' in place of 'Yes.'"),
        ([{"messages": chat("Q", "A", "Q", "B"), "teacher_messages": chat("Q", "B")}],
         {"prompt": TeacherPrompt(None, True, None)}, "the record's 2 answers with a loss, got 1"),
        ([{**OWN[0], "teacher_messages": "hint"}], {"prompt": TeacherPrompt(None, True, None)},
         "chats.jsonl:1: .*teacher_messages: expected a list of turns, got 'hint'"),
        ([{**OWN[0], "teacher_messages": [{"role": "cat", "content": "x"}]}],
         {"prompt": TeacherPrompt(None, True, None)}, "teacher_messages: turn 1: expected role"),
    ],
)  # fmt: skip
def test_what_cannot_be_aligned_is_refused_by_its_place(records, options, said, config, tokenizer):
    with pytest.raises(UserError, match=said):
        rows_of(config, tokenizer, records, **options)


def test_a_template_that_writes_answers_otherwise_after_a_system_message_is_refused(
    config, tokenizer
):
    shouts = tiny.TEMPLATE.replace(
        "m['content'] | trim",
        "(m['content'] ~ ('!' if messages[0]['role'] == 'system' and m['role'] == 'assistant' "
        "else '')) | trim",
    )
    with pytest.raises(
        UserError,
        match=r"chats.jsonl:1: expected the same \d+ target tokens .* 11, and ' ' in place",
    ):
        rows_of(config, tokenizer, CHATS[:1], template=shouts)


def test_one_of_several_sources_may_have_no_turns_of_the_teacher(config, tokenizer, tmp_path):
    prompt = TeacherPrompt(None, True, None)
    own = rows_of(config, tokenizer, OWN, prompt=prompt)
    files = [write_lines(tmp_path / f"{i}.jsonl", some) for i, some in enumerate((CHATS, OWN))]
    both = dataclasses.replace(config, path=",".join(map(str, files)))
    rows = make_rows(both, tokenizer, tiny.TEMPLATE, prompt=prompt)
    documents = [one for some in documents_of(rows.teacher).values() for one in some]
    assert documents_of(own.teacher)[0][0] in documents and len(documents) == 10
    plain = dataclasses.replace(config, path=f"{files[0]},{files[0]}")
    with pytest.raises(UserError, match="records with teacher_messages"):
        make_rows(plain, tokenizer, tiny.TEMPLATE, prompt=prompt)
    drawn = {"fraction": 0.9, "held_out": True}  # by chance without any
    assert len(make_rows(plain, tokenizer, tiny.TEMPLATE, prompt=prompt, **drawn))


def test_turns_of_the_teacher_without_the_flag_are_said(config, tokenizer):
    rows = rows_of(config, tokenizer, OWN, prompt=None)
    assert any("--teacher.messages uses them" in note for note in rows.notes)


def test_a_system_text_may_be_a_file(tmp_path):
    file = tmp_path / "system.txt"
    file.write_text("Speak.\n")
    assert read_prompt(TeacherConfig(path="t", system=f"@{file}")) == ("Speak.", False, None)
    file.write_text(" \n")
    for missing in (file, tmp_path / "none.txt"):
        with pytest.raises(UserError, match=r"^teacher.system: expected a text"):
            read_prompt(TeacherConfig(path="t", system=f"@{missing}"))
    assert read_prompt(TeacherConfig(path="t")) is None
