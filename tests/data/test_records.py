"""Laws of the forms of records."""

import copy
import datetime
import functools
import json
import operator

import pytest
from samples import chat

from kd_jax.data.records import make_record

CALL = {"name": "add", "arguments": {"a": 12}}
TOOLS = [{"type": "function", "function": {"name": "add"}}]
CALLS = [{"type": "function", "function": CALL}]
SYSTEM = chat("S.", "Q.", "A.", roles="sua")
SHAREGPT = [{"from": "human", "value": "Q."}, {"from": "gpt", "value": "A."}]

SAME = {
    "chat": ({"messages": chat("Q.", "A.")}, chat("Q.", "A.")),
    "system": ({"messages": chat("Q.", "A."), "system": "S."}, SYSTEM),
    "system twice": ({"messages": SYSTEM, "system": "S."}, SYSTEM),
    "alpaca": ({"instruction": "Q.", "output": "A."}, chat("Q.", "A.")),
    "alpaca input": ({"instruction": "Q", "input": "x", "output": "A."}, chat("Q\n\nx", "A.")),
    "alpaca history": (
        {"instruction": "Q.", "output": "A.", "system": "S.", "history": [["Hi", "Ho"]]},
        [*chat("S.", "Hi", "Ho", roles="sua"), *chat("Q.", "A.")],
    ),
    "alpaca chosen": ({"instruction": "Q.", "chosen": "A.", "rejected": "B."}, chat("Q.", "A.")),
    "empty": (
        {"instruction": "Q.", "input": None, "output": "A.", "system": "", "history": []},
        chat("Q.", "A."),
    ),
    "sharegpt": ({"conversations": SHAREGPT, "system": "S."}, SYSTEM),
    "sharegpt with roles": ({"conversations": chat("Q.", "A.")}, chat("Q.", "A.")),
    "sharegpt in messages": ({"messages": SHAREGPT}, chat("Q.", "A.")),
    "sharegpt tools": (
        {
            "conversations": [
                {"from": "human", "value": "Q."},
                {"from": "function_call", "value": json.dumps(CALL)},
                {"from": "observation", "value": "24"},
                {"from": "gpt", "value": "A."},
            ]
        },
        [
            *chat("Q.", roles="u"),
            {"role": "assistant", "tool_calls": CALLS, "content": ""},
            {"role": "tool", "content": "24"},
            *chat("A.", roles="a"),
        ],
    ),
    "prompt of turns": (
        {"prompt": chat("Q.", roles="u"), "completion": chat("A.", roles="a")},
        chat("Q.", "A."),
    ),
    "chosen": ({"chosen": chat("Q.", "A."), "rejected": chat("Q.", "B.")}, chat("Q.", "A.")),
    "chosen with its prompt": ({"prompt": "Q.", "chosen": chat("Q.", "A.")}, chat("Q.", "A.")),
    "chosen after a prompt": (
        {"prompt": chat("Q.", roles="u"), "chosen": chat("A.", roles="a")},
        chat("Q.", "A."),
    ),
    "chosen after conversations": (
        {"conversations": SHAREGPT[:1], "chosen": SHAREGPT[1], "rejected": SHAREGPT[1]},
        chat("Q.", "A."),
    ),
    "parts": (
        {"messages": [{**turn, "content": [{"type": "text", "text": turn["content"]}]}
                      for turn in chat("Q.", "A.")]},
        chat("Q.", "A."),
    ),
    "JSON in a cell": ({"messages": json.dumps(chat("Q.", "A."))}, chat("Q.", "A.")),
    "text of arguments": (
        {"messages": [*chat("Q.", roles="u"), {"role": "assistant", "content": None, "tool_calls": [
            {"id": "c1", "function": {"name": "add", "arguments": '{"a": 12}'}},
            {"name": "say", "arguments": '"it"'}, {"name": "say", "arguments": "it"}]}]},
        [*chat("Q.", roles="u"), {"role": "assistant", "content": "", "tool_calls": [
            {"type": "function", "id": "c1", "function": CALL},
            *[{"type": "function", "function": {"name": "say", "arguments": "it"}}] * 2]}],
    ),
    "calls as text beside an old one": (
        {"messages": [*chat("Q.", roles="u"), {"role": "assistant", "content": "",
            "tool_calls": json.dumps(CALLS), "function_call": json.dumps(CALL)}]},
        [*chat("Q.", roles="u"), {"role": "assistant", "content": "", "tool_calls": [
            *CALLS, {"type": "function", "function": CALL}]}],
    ),
    "other keys of turns": (
        {"messages": [*chat("Q.", roles="u"), {"role": "assistant", "content": "A.", "name": "x",
            "reasoning_content": "R", "tool_calls": None, "tool_call_id": None}]},
        [*chat("Q.", roles="u"),
         {"role": "assistant", "content": "A.", "name": "x", "reasoning_content": "R"}],
    ),
}  # fmt: skip


@pytest.mark.parametrize("form", SAME)
def test_every_form_becomes_turns(form):
    raw, messages = SAME[form]
    for given in (raw, json.dumps(raw).encode()):
        record = make_record("d:1", given)
        assert record.messages == messages and record.text is None
        assert len(record.learn) == len(messages)
        assert {key for key, _ in record.ignored} == {"rejected"} & raw.keys()


@pytest.mark.parametrize("tools", [TOOLS, TOOLS[0], json.dumps(TOOLS)])
def test_tools_are_kept(tools):
    assert make_record("d:1", {"messages": chat("Q.", "A."), "tools": tools}).tools == TOOLS
    assert make_record("d:1", {"conversations": SHAREGPT, "tools": tools}).tools == TOOLS


@pytest.mark.parametrize("key", ["weight", "train", "training", "loss"])
@pytest.mark.parametrize("off", [0, False, 0.0])
def test_answers_of_weight_zero_are_not_learned(key, off):
    turns = chat("Q.", "A.", "Q.", "A.")
    turns[1][key], turns[3][key], turns[2][key] = off, 1, 1
    record = make_record("d:1", {"messages": turns})
    assert record.learn == (True, False, True, True)
    assert record.ignored == ((key, "only the assistant's turns have a loss"),)


def test_answers_of_a_prompt_are_not_learned():
    prompt = chat("Q.", "A.", "Q.", roles="uau")
    record = make_record("d:1", {"prompt": prompt, "completion": chat("A.", roles="a")})
    assert record.learn[1] is False and record.learn[3] is True


@pytest.mark.parametrize("keys", [("prompt", "completion"), ("conversations", "chosen")])
def test_a_prompt_that_the_answer_repeats_is_read_once(keys):
    turns = chat("Q.", "A.")
    for answer in (turns, turns[1:]):
        record = make_record("d:1", dict(zip(keys, (turns[:1], answer), strict=True)))
        assert record.messages == turns and record.learn[1]


@pytest.mark.parametrize("key", ["completion", "chosen"])
def test_prompt_and_answer_of_text_need_no_template(key):
    record = make_record("d:1", {"prompt": "Q: ", key: "24", "system": "S.", "idx": 3})
    assert record.text == "Q: 24" and record.answers == ((3, 5),) and not record.messages
    assert [name for name, _ in record.ignored] == ["system", "idx"]


def test_plain_text_has_a_loss_everywhere():
    record = make_record("d:1", {"text": "Once."})
    assert record.text == "Once." and record.answers == ((0, 5),)


def test_unused_keys_are_named():
    turns = [{**turn, "refusal": "x", "id": 3, "audio": None} for turn in chat("Q.", "A.")]
    record = make_record(
        "d:1", {"messages": turns, "text": "x", "lang": "en", "extra": 1, "no": []}
    )
    assert {key for key, _ in record.ignored} == {"refusal", "id", "text", "lang", "extra"}


BAD = {
    "{": "expected JSON, got '{'",
    "3": "expected an object, got int",
    "[" * 100_000: "expected JSON, got b'[[[",
    '{"text": ' + "9" * 5000 + "}": "expected JSON, got Exceeds the limit",
    '{"text": "\\ud83d"}': "text: expected Unicode text, got half of a pair, '\\ud83d'",
    '{"text": "x", "text": "y"}': "expected JSON, got an object with the key 'text' twice",
    '{"messages": "[{\\"a\\": 1, \\"a\\": 2}]"}': "expected JSON, got an object with",
    "{}": "expected the keys messages, or conv",
    '{"question": "x", "answer": "y"}': "expected the keys messages, or conv",
    '{"instruction": "x"}': "expected the keys messages, or conv",
    '{"text": " "}': "text: expected some, got none",
    '{"instruction": "x", "output": " "}': "turn 2: expected an answer, got an empty one",
    '{"instruction": "x", "output": 3}': "turn 2: expected text, got 3",
    '{"instruction": "x", "output": null}': "turn 2: expected text, got None",
    '{"instruction": null, "output": "x"}': "instruction: expected text, got None",
    '{"instruction": "x", "input": [1], "output": "x"}': "input: expected text, got [1]",
    '{"instruction": "x", "input": 0, "output": "x"}': "input: expected text, got 0",
    '{"instruction": "x", "input": false, "output": "x"}': "input: expected text, got False",
    '{"instruction": "x", "input": [], "output": "x"}': "input: expected text, got []",
    '{"instruction": "x", "history": 0, "output": "x"}': "history: expected pairs",
    '{"instruction": "x", "history": ["q", "a"], "output": "x"}': "history: expected pairs",
    '{"instruction": "x", "system": 0, "output": "x"}': "system: expected text, got 0",
    '{"instruction": "x", "tools": ["f"], "output": "x"}': "tools: expected a list of objects",
    '{"messages": []}': "messages: expected a list of turns, got []",
    '{"messages": "x"}': "messages: expected a list of turns, got 'x'",
    '{"messages": ["x"]}': "turn 1: expected role and content, got 'x'",
    '{"messages": [{"role": "user"}]}': "turn 1: expected role and content, got {'role'",
    '{"messages": [{"role": "bot", "content": "x"}]}': "turn 1: expected role system|developer|",
    '{"messages": [{"role": [], "content": "x"}]}': "turn 1: expected role system|developer|",
    '{"messages": [{"role": "user", "content": [1]}]}': "turn 1: expected text, got [1]",
    '{"messages": [{"role": "user", "content": [{"type": "image"}]}]}': "turn 1: expected parts",
    '{"messages": [{"role": "user", "content": "x"}]}': "expected a turn of the assistant",
    '{"messages": [{"role": "assistant", "content": "x", "weight": 0.5}]}': "turn 1: weight: exp",
    '{"messages": [{"role": "assistant", "content": "x", "train": "no"}]}': "turn 1: train: exp",
    '{"messages": [{"role": "assistant", "content": "", "tool_calls": "[]"}]}': "turn 1: ex",
    '{"messages": [{"role": "assistant", "tool_calls": [3]}]}': "turn 1: tool_calls: expected",
    '{"messages": [{"role": "assistant", "function_call": 3}]}': "turn 1: tool_calls: expected",
    '{"messages": [{"role": "system", "content": "x"}, {"role": "assistant", "content": "y"}], '
    '"system": "z"}': "system: expected none beside a system turn",
    '{"conversations": [{"from": "gpt", "value": 3}]}': "turn 1: expected text, got 3",
    '{"chosen": "x", "rejected": "y"}': "chosen: expected a list of turns, got 'x'",
    '{"prompt": "x", "completion": ""}': "completion: expected an answer, got an empty one",
    '{"prompt": 3, "completion": "x"}': "prompt: expected text or turns, got 3",
}


@pytest.mark.parametrize("record", BAD)
def test_bad_record_is_refused_by_name(record):
    with pytest.raises(ValueError) as caught:
        make_record("d:1", record.encode())
    assert str(caught.value).startswith(BAD[record])
    assert len(str(caught.value).splitlines()) == 1 and len(str(caught.value)) < 300


VALUES = [
    None, 0, 1, 0.5, float("nan"), True, "", "x", [], {}, [[]], [{}], "[", '{"a":', 10**400,
    "\ud800", [None], ["x"], [["a", "b"]], {"role": "user"}, {"type": "text"},
    [{"type": "text", "text": None}], datetime.date(2024, 7, 26), b"x",
]  # fmt: skip


def places(tree, at=()):
    """Yields the path of each value in a tree."""
    yield at
    for key in (
        tree if isinstance(tree, dict) else range(len(tree) if isinstance(tree, list) else 0)
    ):
        yield from places(tree[key], (*at, key))


@pytest.mark.parametrize("form", SAME)
def test_any_value_anywhere_is_used_or_refused_in_one_line(form):
    for *path, last in list(places(SAME[form][0]))[1:]:
        for value in VALUES:
            tree = copy.deepcopy(SAME[form][0])
            inner = functools.reduce(operator.getitem, path, tree)
            inner[last] = value
            try:
                record = make_record("d:1", tree)
            except ValueError as error:
                assert len(str(error).splitlines()) == 1 and len(str(error)) < 400
                continue
            assert record.text or all(isinstance(x["content"], str) for x in record.messages)
