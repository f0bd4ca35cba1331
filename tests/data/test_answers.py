"""Laws of the position of answers, for templates in the style of published ones."""

import datetime
import json
import time
from types import SimpleNamespace

import pytest
import tiny
from samples import chat, record

from kd_jax.config import DataConfig, UserError
from kd_jax.config.checks import parse_date
from kd_jax.data import answers, forms, hidden, templates
from kd_jax.data import chat as data_chat
from kd_jax.data.records import Record

DAY = "26 Jul 2024"
TURN = "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
CHATML = "{% for m in messages %}" + TURN + "{% endfor %}"
PROMPT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
LAST = (
    "{% set last = namespace(user=-1) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set last.user = loop.index0 %}{% endif %}{% endfor %}"
)
LLAMA2 = (
    "{% set ns = namespace(system='') %}{% for m in messages %}{% if m.role == 'system' %}"
    "{% set ns.system = '<<SYS>>\n' + m.content + '\n<</SYS>>\n\n' %}{% elif m.role == 'user' %}"
    "{{ bos_token + '[INST] ' + ns.system + m.content | trim + ' [/INST]' }}"
    "{% set ns.system = '' %}{% else %}{{ ' ' + m.content | trim + ' ' + eos_token }}{% endif %}"
    "{% endfor %}"
)
MISTRAL = (
    "{{ bos_token }}{% if tools %}{{ '[AVAILABLE_TOOLS] ' + tools | tojson }}"
    "{{ '[/AVAILABLE_TOOLS]' }}{% endif %}{% for m in messages %}{% if m.role == 'user' %}"
    "{{ '[INST] ' + m.content + '[/INST]' }}{% elif m.role == 'tool' %}"
    "{{ '[TOOL_RESULTS] ' + m.content + '[/TOOL_RESULTS]' }}{% elif m.tool_calls %}"
    "{{ '[TOOL_CALLS] [' }}{% for c in m.tool_calls %}{{ c.function | tojson }}{% endfor %}"
    "{{ ']' + eos_token }}{% elif m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}"
    "{% else %}{{ raise_exception('Only user, assistant and tool roles') }}{% endif %}{% endfor %}"
)
PHI3 = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ '<|endoftext|>' }}"
    "{% endif %}"
)
ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}"
    "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role') }}"
    "{% endif %}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' }}"
    "{{ m.content | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
QWEN3 = (  # thoughts in the answers after the last question alone, empty ones written out
    LAST
    + "{% for m in messages %}{% if m.role == 'assistant' %}{% set content = m.content or '' %}"
    "{% set thought = m.reasoning_content or '' %}{% if '</think>' in content %}"
    "{% set thought = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{{ '<|im_start|>assistant\n' }}{% if loop.index0 > last.user %}"
    "{{ '<think>\n' + thought + '\n</think>\n\n' }}{% endif %}{{ content }}"
    "{% for c in m.tool_calls or [] %}{{ '<tool_call>' + c.function | tojson + '</tool_call>' }}"
    "{% endfor %}{{ '<|im_end|>\n' }}{% else %}" + TURN + "{% endif %}{% endfor %}" + PROMPT
)
R1 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}"
    "{{ '<A>' + m.content.split('</think>')[-1] + eos_token }}{% elif m.role == 'user' %}"
    "{{ '<U>' + m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<A><think>\n' }}{% endif %}"
)
GRANITE = (
    "{% if messages[0].role != 'system' %}{{ '<|start|>system<|end|>Today is ' }}"
    "{{ strftime_now('%B %d, %Y') + '.<|eot|>\n' }}{% endif %}{% for m in messages %}"
    "{{ '<|start|>' + m.role + '<|end|>' + m.content + '<|eot|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant<|end|>' }}{% endif %}"
)
PLAIN = "{% for m in messages %}{{ '### ' + m.role + ':\n' + m.content + '\n\n' }}{% endfor %}"
PLAIN_PROMPT = "{% if add_generation_prompt %}{{ '### assistant:\n' }}{% endif %}"
MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{% else %}"
    "{{ m.content + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}" + PROMPT
)
PARTS = CHATML.replace("m.content", "m.content[0].text") + PROMPT

# Before and after an answer, as learned.
STYLES = {
    "llama 2": (LLAMA2, " ", " <|eot|>"),
    "llama 3": (tiny.TEMPLATE, "", "<|eot|>"),
    "chatml": (CHATML + PROMPT, "", "<|im_end|>"),
    "chatml with a system message": (
        "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nHelp.<|im_end|>\n' }}"
        "{% endif %}" + CHATML + PROMPT, "", "<|im_end|>",
    ),
    "mistral": (MISTRAL, " ", "<|eot|>"),
    "phi 3": (PHI3, "", "<|end|>"),
    "zephyr": (ZEPHYR, "", "<|eot|>"),
    "gemma": (GEMMA, "", "<end_of_turn>"),
    "granite": (GRANITE, "", "<|eot|>"),
    "llm-jp": ("{{ strftime_now('%Y-%m-%d') }}" + PLAIN.replace("\n\n", "</s>") + PLAIN_PROMPT, "",
               "</s>"),
    "a list of parts": (PARTS, "", "<|im_end|>"),
    "an answer opened always": (CHATML + "{{ '<|im_start|>assistant\n' }}", "", "<|im_end|>"),
    "marks": (MARKED, "", "<|im_end|>"),
}  # fmt: skip
TALKS = [
    chat("Hi.", "Blue."),
    chat("Hi.", "a", "assistant", "a", "<|im_start|>assistant", "It is 'five' <b>."),
]


def shown(tokenizer, messages, template, **more):
    found = answers.render(tokenizer, record(messages, **more), template, DAY)
    return [found.text[begin:end] for begin, end in found.spans], found


def learned(talk):
    return [turn["content"] for turn in talk if turn["role"] == "assistant"]


@pytest.mark.parametrize("style", STYLES)
def test_answers_are_learned_from_the_prompt_to_the_end_of_turn(style, tokenizer):
    template, before, after = STYLES[style]
    form = forms.form_of(tokenizer.special_tokens_map, template, DAY)
    assert not form.warnings
    assert form.end == after
    for talk in TALKS:
        spans, found = shown(tokenizer, talk, template)
        assert spans == [before + answer + after for answer in learned(talk)]
        assert not found.hidden
    spans, _ = shown(tokenizer, chat("Hi.", "Blue. ", "And?", "Red.\n"), template)
    for answer, span in zip(("Blue.", "Red."), spans, strict=True):
        assert span.startswith(before + answer) and span.endswith(after.strip())


@pytest.mark.parametrize(
    "style", [name for name in STYLES if name not in ("marks", "a list of parts")]
)
def test_answers_begin_where_the_generation_prompt_of_transformers_ends(style, tokenizer):
    template = STYLES[style][0]
    for talk in TALKS:
        _, found = shown(tokenizer, talk, template)
        for (begin, _), i in zip(found.spans, range(1, len(talk), 2), strict=True):
            prompt = data_chat.render_prompt(tokenizer, talk[:i], template, DAY)
            if "strftime" not in template:
                assert prompt == tokenizer.apply_chat_template(
                    talk[:i], chat_template=template, tokenize=False, add_generation_prompt=True
                )
            assert found.text[:begin] == prompt


def test_marks_give_the_mask_of_transformers(tokenizer):
    talks = [*TALKS, chat("Hi.", "\n\n naïve 🙂 \n"), chat("A", "B", "C", roles="aua")]
    documents, _ = data_chat.tokenize(
        tokenizer, [record(talk) for talk in talks], MARKED, DataConfig(path="")
    )
    for talk, document in zip(talks, documents, strict=True):
        theirs = tokenizer.apply_chat_template(
            talk, chat_template=MARKED, return_dict=True, return_assistant_tokens_mask=True
        )
        assert document.tokens.tolist() == theirs["input_ids"]
        assert document.target.tolist() == [bool(x) for x in theirs["assistant_masks"]]


def test_a_tokenizer_that_joins_the_blank_to_the_first_word_learns_the_word(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["[UNK]", "▁[INST]", "▁Hi.", "▁[/INST]", "▁Blue.", "▁<|eot|>"]
    bare = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    bare.pre_tokenizer = pre_tokenizers.Metaspace()
    fast = PreTrainedTokenizerFast(tokenizer_object=bare, unk_token="[UNK]", bos_token="")
    template = LLAMA2.replace("bos_token + ", "").replace("eos_token", "'<|eot|>'")
    (document,), _ = data_chat.tokenize(
        fast, [record(chat("Hi.", "Blue."))], template, DataConfig(path="")
    )
    assert document.tokens.tolist() == [1, 2, 3, 4, 5]
    assert document.target.tolist() == [False, False, False, True, True]


SAID = {
    "no prompt": (CHATML, "there is no generation prompt: '<|im_start|>assistant'", "<|im_end|>"),
    "thought opened": (R1, "the generation prompt ends with '<think>'", "<|eot|>"),
    "contents alone": (
        "{% for m in messages %}{{ m.content }}{% endfor %}",
        "no end of turn follows an answer: the student does not", "",
    ),
    "no end": (PLAIN + PLAIN_PROMPT, "no end of turn follows an answer: the student does not", ""),
    "end of the last": (
        PLAIN + PLAIN_PROMPT.replace("{% endif", "{% else %}<end>{% endif"),
        "no end of turn follows an answer but the last", "",
    ),
    "marks without the end": (
        MARKED.replace("+ '<|im_end|>' }}{% endg", "}}{% endgeneration %}{{ '<|im_end|>' }}{# "
                       ).replace("{# eneration %}", ""),
        "no end of turn follows an answer: the student does not", "",
    ),
    "another prompt": (
        CHATML + PROMPT.replace("assistant\n", "model\n"), "but answers follow", "<|im_end|>",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", SAID)
def test_what_a_template_does_not_teach_is_said_and_headers_are_not_learned(kind, tokenizer):
    template, said, after = SAID[kind]
    (line,) = data_chat.describe_template(tokenizer, template, DAY)
    assert line.startswith("warning: the chat template: ") and said in line
    for talk in TALKS:
        spans, _ = shown(tokenizer, talk, template)
        *earlier, last = [answer + after for answer in learned(talk)]
        assert spans == [*earlier, last + "\n\n<end>" if kind == "end of the last" else last]


def test_rendering_is_linear_in_turns(tokenizer, monkeypatch):
    import transformers.utils.chat_template_utils as module

    calls = []
    apply = module.render_jinja_template
    monkeypatch.setattr(
        module, "render_jinja_template", lambda *a, **k: calls.append(1) or apply(*a, **k)
    )
    talk = chat(*[f"Number {i}?" for i in range(200)])
    template = CHATML + PROMPT + "{# new #}"
    for _ in range(3):
        spans, _ = shown(tokenizer, talk, template)
        assert spans == [f"Number {i}?<|im_end|>" for i in range(1, 200, 2)]
    assert len(calls) <= 10


THOUGHTS = [
    chat("Hi.", "Blue.", "Sure?", "<think>yes, Green</think>Green."),
    [
        *chat("Hi.", "Blue.", "Sure?", roles="uau"),
        {"role": "assistant", "content": "Green.", "reasoning_content": "yes, Green. It is"},
    ],
]


@pytest.mark.parametrize("talk", THOUGHTS, ids=["in the content", "in its own field"])
def test_thoughts_are_learned_where_the_template_shows_them(talk, tokenizer):
    thought = talk[-1].get("reasoning_content", "yes, Green")
    spans, found = shown(tokenizer, talk, QWEN3)
    last = f"<think>\n{thought}\n</think>\n\nGreen.<|im_end|>"
    assert spans == ["Blue.<|im_end|>", last] and not found.hidden
    # In the history the template drops it, so nothing is learned from an answer without it.
    spans, found = shown(tokenizer, [*talk, *chat("And?", "Red.")], QWEN3)
    assert spans == ["Blue.<|im_end|>", "<think>\n\n</think>\n\nRed.<|im_end|>"]
    assert found.hidden == {"dropped"}
    # A template that never shows thoughts.
    spans, found = shown(tokenizer, talk, R1)
    assert spans == ["Blue.<|eot|>", "Green.<|eot|>"]
    assert found.hidden == {"reasoning_content" if "reasoning_content" in talk[-1] else "thought"}


def test_a_record_whose_answers_are_not_shown_whole_is_named(tokenizer):
    bad = chat("Hi.", "<think>no</think>Blue.", "Sure?", roles="uau")
    some = [Record("d:1", chat("Hi.", "Blue."), (True, True)), Record("d:2", bad, (True,) * 3)]
    for train_on, problems in (
        ("assistant", ["d:2: the chat template shows none of its answers whole"]),
        ("all", []),
    ):
        config = DataConfig(path="", train_on=train_on)
        assert data_chat.tokenize(tokenizer, some, QWEN3, config)[1] == problems


def call(arguments):
    function = {"name": "add", "arguments": arguments}
    return {"role": "assistant", "content": "", "tool_calls": [{"id": "x1", "function": function}]}


TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {}}}]


@pytest.mark.parametrize("arguments", [{"a": 1}, '{"a": 1}'], ids=["object", "text"])
def test_tool_calls_are_learned(arguments, tokenizer):
    talk = [
        *chat("Add.", roles="u"), call(arguments), {"role": "tool", "content": "7"},
        {"role": "assistant", "content": "It is 7."},
    ]  # fmt: skip
    spans, found = shown(tokenizer, talk, MISTRAL, tools=TOOLS)
    shown_call = '{"name": "add", "arguments": {"a": 1}}'
    assert spans == [f"[TOOL_CALLS] [{shown_call}]<|eot|>", "It is 7.<|eot|>"]
    assert not found.hidden and "[AVAILABLE_TOOLS]" in found.text
    spans, found = shown(tokenizer, talk, QWEN3, tools=TOOLS)
    assert spans[0] == f"<think>\n\n</think>\n\n<tool_call>{shown_call}</tool_call><|im_end|>"
    assert found.hidden == {"tools"}
    # Templates that add the arguments as text.
    spans, _ = shown(
        tokenizer,
        talk,
        MISTRAL.replace("c.function | tojson", "c.function.name + c.function.arguments"),
    )
    assert spans[0] == '[TOOL_CALLS] [add{"a": 1}]<|eot|>'
    # Templates that show none: nothing is learned from the turn.
    spans, found = shown(tokenizer, talk, CHATML + PROMPT)
    assert spans == ["It is 7.<|im_end|>"] and found.hidden == {"assistant", "tool_calls"}


def test_many_tool_calls_take_few_renderings(tokenizer, monkeypatch):
    calls = []
    apply = answers.apply_template
    monkeypatch.setattr(
        answers, "apply_template", lambda *a, **k: calls.append(1) or apply(*a, **k)
    )
    talk = chat("Add.", roles="u")
    for i in range(50):
        talk += [call({"a": i}), {"role": "tool", "content": str(i)}]
    talk += [{"role": "assistant", "content": "Done."}]
    spans, _ = shown(tokenizer, talk, MISTRAL, tools=TOOLS)
    shown_call = '[TOOL_CALLS] [{"name": "add", "arguments": {"a": %d}}]<|eot|>'
    assert spans == [*(shown_call % i for i in range(50)), "Done.<|eot|>"]
    assert len(calls) <= 4


@pytest.mark.parametrize("style", ["chatml", "llama 3", "an answer opened always", "marks"])
def test_an_answer_that_a_question_quotes_is_not_learned_there(style, tokenizer):
    template, before, after = STYLES[style]
    header = forms.form_of(tokenizer.special_tokens_map, template, DAY).header
    quoted = f"{header}{before}Blue.{after}"
    talk = chat("Hi.", "Blue.", quoted, "Blue.", quoted, quoted + "!")
    spans, found = shown(tokenizer, talk, template)
    assert spans == [f"{before}{answer}{after}" for answer in ("Blue.", "Blue.", quoted + "!")]
    begins = [begin for begin, _ in found.spans]
    assert begins[1] > found.text.find(quoted) + len(quoted)


def test_a_short_answer_is_not_found_in_what_surrounds_it(tokenizer):
    # The header differs between the last answer and earlier ones, so contents are searched.
    template = CHATML.replace(
        "m.role + '\n'", "m.role + ('\n<think>\n' if loop.last else '\n')"
    ) + PROMPT.replace("\n", "\n<think>\n")
    spans, _ = shown(tokenizer, chat("Hi.", "a", "No.", "sis", "Hm.", "t"), template)
    assert spans == ["a<|im_end|>", "sis<|im_end|>", "t<|im_end|>"]


def test_what_the_template_does_not_show_is_counted():
    plain = SimpleNamespace(special_tokens_map={"bos_token": "<s>", "eos_token": "<|eot|>"})
    talk = [
        {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi.", "name": "Z"},
        {**call({"a": 1}), "content": "Well.", "reasoning_content": "hm", "thinking": "ho"},
        {"role": "tool", "content": "6"}, {"role": "assistant", "content": "It is 7."},
    ]  # fmt: skip
    _, found = shown(plain, talk, R1, tools=TOOLS)
    assert found.hidden == {
        "system",
        "name",
        "tool_calls",
        "reasoning_content",
        "thinking",
        "tool",
        "tools",
    }
    lines = hidden.describe_hidden({"tools": 1204, "system": 1}, "d.jsonl")
    assert lines == [
        "warning: d.jsonl: 1,204 records have `tools`, which the chat template does not show",
        "warning: d.jsonl: 1 record has a system message, which the chat template does not show",
    ]
    everything = set(hidden.HIDDEN) - {"user", "thought", "dropped", "assistant"}
    assert found.hidden == everything


def test_only_the_answers_to_learn_are_learned(tokenizer):
    for template in (CHATML + PROMPT, MARKED):
        one = Record("d:1", TALKS[1], (True, False, True, True, True, False))
        found = answers.render(tokenizer, one, template, DAY)
        assert [found.text[b:e] for b, e in found.spans] == ["a<|im_end|>"]


def test_parts_are_joined_or_passed_on(tokenizer):
    parts = [{"type": "text", "text": "Bl"}, {"type": "text", "text": "ue."}]
    talk = [{"role": "user", "content": parts}, {"role": "assistant", "content": parts}]
    for template in (CHATML + PROMPT, PARTS):
        assert shown(tokenizer, talk, template)[0] == ["Blue.<|im_end|>"]
    image = {"role": "user", "content": [{"type": "image", "url": "x"}]}
    with pytest.raises(ValueError, match=r"turn 1: expected parts of type text, got 'image'"):
        shown(tokenizer, [image, *talk[1:]], CHATML)


def test_named_templates_are_chosen_as_transformers_chooses(tokenizer):
    named = {"default": CHATML + PROMPT, "tool_use": MISTRAL}
    assert shown(tokenizer, TALKS[0], named)[0] == ["Blue.<|im_end|>"]
    assert shown(tokenizer, TALKS[0], named, tools=TOOLS)[0] == [" Blue.<|eot|>"]
    for wrong in ({"tool_use": MISTRAL}, {}, {"default": 3}, [], 3):
        with pytest.raises(UserError, match="m: expected Jinja text, or texts with the name def"):
            templates.check_template(wrong, "m")


@pytest.mark.parametrize(
    "name, content",
    [
        ("t.jinja", b"\xff\xfe{{ m }}"), ("t.json", b"{"), ("t.json", b"[]"),
        ("t.json", b'{"chat_template": [{"name": "tool_use", "template": "x"}]}'),
        ("t.json", b"[" * 100_000),
    ],
)  # fmt: skip
def test_files_that_are_no_template_are_refused(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=r"^data\.chat-template: expected "):
        templates.read_template(tmp_path / name)


def test_a_template_may_lie_in_a_json_file(tmp_path):
    file = tmp_path / "chat_template.json"
    file.write_text(json.dumps({"chat_template": "é"}))
    assert templates.read_template(file) == "é"
    file.write_text(json.dumps({"chat_template": [{"name": "default", "template": "é"}]}))
    assert templates.read_template(file) == {"default": "é"}


@pytest.mark.parametrize(
    "template", ["{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
                 "{% set ns = namespace(x='a') %}{% for i in range(99) %}"
                 "{% set ns.x = ns.x ~ ns.x %}{% endfor %}"]
)  # fmt: skip
def test_an_endless_template_is_refused(template, tokenizer, monkeypatch):
    monkeypatch.setattr(templates, "MAX_SECONDS", 0.2)
    monkeypatch.setattr(templates, "MAX_BYTES", 2**27)
    began = time.process_time()
    for whole in (template + CHATML, "{% if messages | length == 6 %}" + template + "{% endif %}"):
        with pytest.raises(UserError, match=r"^data\.chat-template: expected a template that"):
            shown(tokenizer, TALKS[1], whole + CHATML)
    assert time.process_time() - began < 20


@pytest.mark.parametrize(
    "form", ["%Y-%m-%d", "%d %b %Y", "%B %-d, %Y", "%A, %d/%m/%y %H:%M", "%%d %j", "%c", "no code"]
)
def test_a_template_writes_the_date_in_its_own_format(form, tokenizer):
    template = "{{ strftime_now('" + form + "') }}|" + CHATML
    for date in ("26 Jul 2024", "2024-07-26", "26 July 2024"):
        text = data_chat.render_prompt(tokenizer, chat("Hi.", roles="u"), template, date)
        assert text.split("|")[0] == datetime.datetime(2024, 7, 26).strftime(form)


def test_a_wrong_date_is_refused(tokenizer):
    assert parse_date("2024-13-01") is None
    for date in ("yesterday", "", "2024"):
        with pytest.raises(UserError, match=r"^data\.date: expected 26 Jul 2024 or 2024-07-26"):
            data_chat.render_prompt(tokenizer, [], CHATML, date)


def test_half_a_character_is_refused(tokenizer):
    record = Record("d:1", chat("Hi.", "Blue."), (True, True))
    with pytest.raises(ValueError, match="expected Unicode text, got half of a pair"):
        answers.render(tokenizer, record, CHATML + "\ud83d", DAY)
