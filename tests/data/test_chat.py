"""Laws of the text: reading, chat templates, target tokens."""

import dataclasses
import datetime
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
from samples import chat, record, records_of, rows_of, same_rows

from kd_jax.config import DataConfig, UserError
from kd_jax.data import chat as data_chat
from kd_jax.data.records import Record


@pytest.fixture(scope="module")
def llama3(real_data):
    return data_chat.load_tokenizer(real_data / "llama3_tokenizer")


def test_a_llamas_generic_tokenizer_is_autotokenizers_without_its_imports(tmp_path):
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    tiny.write_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert data_chat._tokenizer_class(tmp_path) is PreTrainedTokenizerFast
    ours, auto = data_chat.load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    auto.backend_tokenizer.no_truncation()
    auto.backend_tokenizer.no_padding()
    assert type(ours) is type(auto)
    assert ours.backend_tokenizer.to_str() == auto.backend_tokenizer.to_str()
    assert ours.special_tokens_map == auto.special_tokens_map
    assert ours.chat_template == auto.chat_template
    for text in ('{"model_type": "mistral"}', "[]", ""):  # loaded by AutoTokenizer, or its errors
        (tmp_path / "config.json").write_text(text)
        assert data_chat._tokenizer_class(tmp_path) is AutoTokenizer


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
        some = [record(messages) for messages in conversations]
        documents, problems = data_chat.tokenize(tokenizer, some, template, config)
        assert not problems
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


def test_loss_covers_exactly_answers_and_their_end(tokenizer):
    check_mask(tokenizer, CONVERSATIONS, tiny.TEMPLATE, "<|eot|>")


def test_loss_covers_exactly_answers_and_their_end_with_llama3(llama3):
    check_mask(llama3, CONVERSATIONS, llama3.get_chat_template(), "<|eot_id|>")


@pytest.mark.parametrize("name", ["gsm8k_alpaca.json", "roleplay_chat.jsonl"])
def test_loss_covers_exactly_answers_and_their_end_on_real_data(name, llama3, real_data):
    conversations = [one.messages for one in records_of(real_data / name)[::10]]
    check_mask(llama3, conversations, llama3.get_chat_template(), "<|eot_id|>")


def test_what_follows_the_end_of_turn_has_no_loss(tokenizer):
    template = tiny.TEMPLATE.replace("+ '<|eot|>' -}}{%- endfor", "+ '<|eot|>\n' -}}{%- endfor")
    check_mask(tokenizer, [chat("Hi.", "Blue.", "And?", "Green.")], template, "<|eot|>")


# Qwen3's form: an empty thought before the answers after the last question alone.
THINKING = (
    "{%- set last = namespace(user=0) -%}"
    "{%- for m in messages -%}"
    "{%- if m.role == 'user' -%}{%- set last.user = loop.index0 -%}{%- endif -%}"
    "{%- endfor -%}"
    "{%- for m in messages -%}"
    "{{- '<|start|>' + m.role + '\n' -}}"
    "{%- if m.role == 'assistant' and loop.index0 > last.user -%}{{- '<think>\n\n</think>\n\n' -}}"
    "{%- endif -%}"
    "{{- m.content.strip() + '<|eot|>\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|start|>assistant\n' -}}{%- endif -%}"
)


def test_a_thought_written_before_the_last_answer_alone_is_part_of_it(tokenizer):
    messages = chat("Hi.", "Blue.", "And?", "Green.", "More?", "Blue.")
    ((document,), _) = data_chat.tokenize(
        tokenizer, [record(messages)], THINKING, DataConfig(path="")
    )
    shown = tokenizer.decode(document.tokens[document.target], clean_up_tokenization_spaces=False)
    assert shown == "Blue.<|eot|>Green.<|eot|><think>\n\n</think>\n\nBlue.<|eot|>"


def test_system_message_is_kept_and_not_trained_on(tokenizer):
    messages = chat("Be brief.", "Name it.", "Blue.", roles="sua")
    ((document,), _) = data_chat.tokenize(
        tokenizer, [record(messages)], tiny.TEMPLATE, DataConfig(path="")
    )
    assert "Be brief." in tokenizer.decode(document.tokens)
    assert "Be brief." not in tokenizer.decode(document.tokens[document.target])


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('no') }}",
        "{% for m in messages %}",
        "{{ messages[0].content + 1 }}",
        "{{ messages[0].content }}",
        "{{ unknown_function() }}",
        "{% for i in range(10**12) %}{% endfor %}",
        "{{ 'a' * 10**12 }}",
        "{% for i in range(99999) %}{{ 'a' * 99999 }}{% endfor %}",
    ],
)
def test_template_that_rejects_every_conversation_is_refused_once(template, tokenizer):
    some = [record(chat("Q.", "A."))] * 3
    with pytest.raises(UserError, match=r"^data\.chat-template: expected a template that .*"):
        data_chat.tokenize(tokenizer, some, template, DataConfig(path=""))


def freeze(monkeypatch, day: int) -> None:
    import transformers.utils.chat_template_utils as module

    moment = datetime.datetime(2030, 1, day)
    monkeypatch.setattr(module, "datetime", SimpleNamespace(now=lambda: moment))


TODAY = "\n{% set date_string = strftime_now('%d %b %Y') -%}" + tiny.TEMPLATE


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
    shown, *_ = data_chat.render(tokenizer, record(chat("Q.", "A.")), template, "01 Jan 2030")
    assert shown == texts[0]


@pytest.mark.parametrize("date", ["{{ date_string }}", "{{ strftime_now('%d %b %Y') }}"])
def test_template_shows_the_configured_date(date, tokenizer):
    template = date + tiny.TEMPLATE.replace("strftime_now('%d %b %Y')", "'05 May 2020'")
    shown, *_ = data_chat.render(tokenizer, record(chat("Q.", "A.")), template, "01 Jan 2030")
    assert shown.startswith("01 Jan 2030<|begin|>") and "Today: 01 Jan 2030<|eot|>" in shown


def test_chat_template_is_the_files_else_the_students_else_the_teachers(tmp_path):
    def having(template):
        return SimpleNamespace(chat_template=template, name_or_path="model")

    config = DataConfig(path="")
    assert data_chat.chat_template_of(config, having("s"), having("t")) == "s"
    assert data_chat.chat_template_of(config, having(None), having("t")) == "t"
    assert data_chat.chat_template_of(config, having(None)) is None
    with pytest.raises(UserError, match=r"data\.chat-template: no tokenizer has a template"):
        data_chat.render_prompt(None, chat("Hi.", roles="u"), None, "26 Jul 2024")
    config = DataConfig(path="", chat_template=str(tmp_path / "file.jinja"))
    with pytest.raises(
        UserError, match=r"data\.chat-template: expected a Jinja file in UTF-8, got .*f"
    ):
        data_chat.chat_template_of(config, having("s"))
    (tmp_path / "file.jinja").write_text("ü", encoding="utf-8")
    assert data_chat.chat_template_of(config, having("s")) == "ü"


# Tokenizers.


def test_unusable_tokenizer_is_refused(tmp_path):
    with pytest.raises(UserError, match="expected tokenizer files"):
        data_chat.load_tokenizer(tmp_path)


def test_text_is_between_the_begin_and_the_end_of_text(tokenizer):
    """As the tokenizer encodes text with its special tokens, and its end token after it."""
    config = DataConfig(path="")
    plain = Record("d:1", [], text="Once.", answers=((0, 5),))
    asked = Record("d:2", [], text="Q: five", answers=((2, 7),))
    documents, _ = data_chat.tokenize(tokenizer, [plain, asked], None, config)
    for given, document in zip((plain, asked), documents, strict=True):
        want = [*tokenizer(given.text)["input_ids"], tokenizer.eos_token_id]
        assert document.tokens.tolist() == want
    assert documents[0].target.tolist() == [False] + [True] * (len(documents[0].tokens) - 1)
    learned = tokenizer.decode(documents[1].tokens[documents[1].target])
    assert learned == " five" + tokenizer.eos_token
