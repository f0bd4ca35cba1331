"""Laws of prompts: the conversation before an answer, their order, what cannot be used."""

import dataclasses

import numpy as np
import pytest
import tiny
from samples import chat, rows_of, write_lines

from kd_jax.config import UserError
from kd_jax.data.prompts import TeacherPrompt
from kd_jax.data.rows import make_rows
from kd_jax.onpolicy.prompts import Order, check_prompts, find_prompts
from kd_jax.onpolicy.samples import Sample, fill_rows, with_teacher

CHATS = [
    {"messages": chat("What is it?", "A cat.", "Sure?", "It is a cat, a cat.")},
    {"messages": [{"role": "system", "content": "Be brief."}, *chat("Name it.", "Blue.")]},
    {"messages": chat("One?", "Two.", "Three?", "Four.", "Five?", "Six.")},
]


@pytest.fixture
def rows(tokenizer, config, tmp_path):
    path = write_lines(tmp_path / "chats.jsonl", CHATS)
    return rows_of(dataclasses.replace(config, path=str(path), seq_len=256), tokenizer)


def test_each_answers_prompt_is_that_of_transformers(rows, tokenizer):
    found = find_prompts(rows, 128)
    ours = sorted(found.tokens(i).tolist() for i in range(len(found)))
    theirs = [
        tokenizer.apply_chat_template(
            record["messages"][:i],
            add_generation_prompt=True, date_string="26 Jul 2024", return_dict=False,
            chat_template=tiny.TEMPLATE,
        )
        for record in CHATS
        for i, turn in enumerate(record["messages"])
        if turn["role"] == "assistant"
    ]  # fmt: skip
    assert len(rows) < len(CHATS)  # packed
    assert len(theirs) == 6 and ours == sorted(theirs)


def test_the_teachers_own_prompts_precede_the_same_samples(tokenizer, config, tmp_path):
    path = write_lines(tmp_path / "chats.jsonl", CHATS)
    data = dataclasses.replace(config, path=str(path), seq_len=256)
    rows = make_rows(data, tokenizer, tiny.TEMPLATE, prompt=TeacherPrompt("Meow.", False, None))
    found = find_prompts(rows, 256, 512)
    assert len(found) == len(found.teacher) == 6
    answers = [np.arange(5 + i, dtype=np.int32) + 9 for i in range(6)]
    ours, theirs = (
        [Sample(side.tokens(i), x, np.zeros(len(x), np.float32)) for i, x in enumerate(answers)]
        for side in (found, found.teacher)
    )
    for sample, own in zip(ours, theirs, strict=True):
        plain, prompted = (tokenizer.decode(x.prompt) for x in (sample, own))
        assert "Meow." in prompted and "Meow." not in plain
        question = plain.rindex("<|start|>user")
        assert prompted.endswith(plain[question:])
    columns = fill_rows([ours[:3], ours[3:]], 512, 0)
    columns = with_teacher(columns, [theirs[:3], theirs[3:]], 640)
    mask = np.roll(columns["loss_mask"], -1, -1)
    following = np.roll(columns["teacher_tokens"], -1, -1)
    following = np.take_along_axis(following, columns["teacher_places"], -1)
    assert following[mask].tolist() == np.concatenate(answers).tolist()


def test_prompts_that_are_too_long_are_counted(rows):
    sizes = find_prompts(rows, 128)
    sizes = np.sort(sizes.end - sizes.begin)
    found = find_prompts(rows, int(sizes[2]))
    assert len(found) == 3 and found.num_long == 3
    line = check_prompts(found, "d.jsonl", 40, "data.seq-len 128 less on-policy.max-new-tokens")
    assert "3 prompts" in line and "3 longer ones are not used (data.seq-len 128" in line
    with pytest.raises(UserError, match=r"on-policy\.max-new-tokens: .* got 6 longer ones\. Lower"):
        check_prompts(find_prompts(rows, 5), "d.jsonl", 5, "data.seq-len 128")
    fields = ("data.seq-len", "teacher.seq-len")
    with pytest.raises(UserError, match=r"Lower it, or raise data\.seq-len and teacher\.seq-len$"):
        check_prompts(find_prompts(rows, 5), "d.jsonl", 5, "both", fields)


def test_text_has_no_prompt_and_a_completion_has_one(tokenizer, config, tmp_path):
    text = [{"text": "The sky is blue, and grass is green. " * 20}]
    path = write_lines(tmp_path / "text.jsonl", text)
    found = find_prompts(rows_of(dataclasses.replace(config, path=str(path)), tokenizer), 100)
    assert len(found) == 0 and found.num_without > 1  # each piece of it
    with pytest.raises(UserError, match=r"data\.path: expected conversations.* got plain text"):
        check_prompts(found, "text.jsonl", 100, "data.seq-len")
    pair = {"prompt": "How many legs has a cat?", "completion": " A cat has four legs."}
    path = write_lines(tmp_path / "pair.jsonl", [pair, *text])
    found = find_prompts(rows_of(dataclasses.replace(config, path=str(path)), tokenizer), 100)
    assert tokenizer.decode(found.tokens(0)).endswith(pair["prompt"]) and len(found) == 1
    assert "texts have none" in check_prompts(found, "pair.jsonl", 100, "data.seq-len")


def test_the_order_is_a_function_of_seed_and_drawing_and_passes_over_all_prompts(rows):
    prompts = find_prompts(rows, 100)
    order = Order(prompts, 3, max_new_tokens=20)
    drawings = [order.choose(i, 2, 2) for i in range(12)]
    assert drawings[7] == Order(prompts, 3, max_new_tokens=20).choose(7, 2, 2)
    assert drawings != [Order(prompts, 4, 20).choose(i, 2, 2) for i in range(12)]
    assert drawings[0] == order.choose(0, 2, 2)
    used = [number for drawing in drawings for row in drawing for number in row]
    assert set(used) == set(range(len(prompts)))
    for drawing in drawings:
        assert len(drawing) == 2 and drawing[0]
        for row in drawing:
            assert sum(len(prompts.tokens(i)) + 20 for i in row) <= 256


def test_sources_of_a_blend_give_their_share_of_prompts(tokenizer, config, tmp_path):
    words = {"a": "Name it.", "b": "How many legs has a cat?"}
    for name, text in words.items():
        write_lines(tmp_path / f"{name}.jsonl", [{"messages": chat(text, "Blue.")}] * 30)
    path = f"{tmp_path}/a.jsonl:0.8, {tmp_path}/b.jsonl:0.2"
    found = find_prompts(rows_of(dataclasses.replace(config, path=path), tokenizer), 100)
    order = Order(found, 0, max_new_tokens=20)
    used = [i for step in range(100) for row in order.choose(step, 3, 3) for i in row]
    share = np.mean([found.row[i] < found.rows.sources[0][2] for i in used])
    assert len(used) > 200 and share == pytest.approx(0.8, abs=0.05)
