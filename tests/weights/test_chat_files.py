"""Laws of the chat template and the end tokens in an export."""

import json
import shutil

import pytest
import tiny
from samples import chat

from kd_jax.config import DataConfig, UserError
from kd_jax.data import chat as data_chat
from kd_jax.inference.prompts import stop_tokens
from kd_jax.weights.chat_files import save_chat

DAY = "26 Jul 2024"
CHATML = (
    "{% for m in messages %}{{ '<|start|>' + m.role + '\n' + m.content + '<|end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)
NAMED = {"default": CHATML, "tool_use": "{{ tools | tojson }}" + CHATML}


@pytest.fixture
def base(tmp_path):
    """A base model's files: no template, and an end of text that ends no turn."""
    folder = tmp_path / "base"
    folder.mkdir()
    tiny.write_tokenizer(folder)
    (folder / "chat_template.jinja").unlink()
    (folder / "config.json").write_text(json.dumps({"eos_token_id": 1, "bos_token_id": 0}))
    return folder


def ends(folder):
    from transformers import GenerationConfig

    return GenerationConfig.from_pretrained(folder).eos_token_id


@pytest.mark.parametrize("template", [CHATML, NAMED], ids=["one", "named"])
@pytest.mark.parametrize("old", [None, "{{ 'another' }}"], ids=["base", "instruct"])
def test_transformers_renders_an_export_as_we_trained_it_and_stops_at_its_end(
    template, old, base, tmp_path
):
    if old:
        config = base / "tokenizer_config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"chat_template": old}))
        (base / "chat_template.jinja").write_text(old)
        (base / "additional_chat_templates").mkdir()
        (base / "additional_chat_templates" / "tool_use.jinja").write_text(old)
    out = tmp_path / "out"
    shutil.copytree(base, out)
    save_chat(base, out, template, DAY)
    theirs = data_chat.load_tokenizer(out)
    for tools in (None, [{"type": "function", "function": {"name": "add"}}]):
        talk = chat("Hi.", roles="u")
        shown = theirs.apply_chat_template(
            talk, tools=tools, tokenize=False, add_generation_prompt=True
        )
        chosen = template["tool_use"] if tools and isinstance(template, dict) else CHATML
        ours = data_chat.render_prompt(theirs, talk, chosen.replace("tools", "[]"), DAY)
        assert shown.removeprefix(json.dumps(tools)) == ours.removeprefix("[]")
    assert ends(out) == [1, 3]
    assert "chat_template" not in json.loads((out / "tokenizer_config.json").read_text())


def test_an_export_that_has_template_and_end_is_left_alone(base, tmp_path):
    (base / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [1, 3], "_from_model_config": True})
    )
    (base / "chat_template.jinja").write_text(CHATML)
    out = tmp_path / "out"
    shutil.copytree(base, out)
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    save_chat(base, out, CHATML, DAY)
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before
    save_chat(base, out, CHATML.replace("<|end|>", "<|eot|>"), DAY)
    changed = json.loads((out / "generation_config.json").read_text())
    assert changed == {"eos_token_id": [1, 3, 4]}


def test_a_template_in_an_old_json_file_is_exported_as_jinja(base, tmp_path):
    (base / "chat_template.json").write_text(json.dumps({"chat_template": CHATML}))
    assert data_chat.load_tokenizer(base).chat_template == CHATML
    (tmp_path / "out").mkdir()
    save_chat(base, tmp_path / "out", CHATML, DAY)
    assert (tmp_path / "out/chat_template.jinja").read_text() == CHATML


def test_an_end_of_several_tokens_or_none_is_no_end_token(base, tmp_path):
    for mark in ("END", ""):
        out = tmp_path / f"out{mark}"
        shutil.copytree(base, out)
        save_chat(base, out, CHATML.replace("<|end|>", mark), DAY)
        assert not (out / "generation_config.json").exists()


@pytest.mark.parametrize("wrong", ["4", {"a": 1}, [[4]], [4, None], True], ids=str)
def test_end_tokens_that_are_no_ids_are_refused(wrong, base, tmp_path):
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": wrong}))
    for use in (
        lambda: save_chat(base, tmp_path, CHATML, DAY),
        lambda: stop_tokens(base, data_chat.load_tokenizer(base)),
    ):
        with pytest.raises(UserError, match="eos_token_id: expected a token id or a list, got"):
            use()


def test_a_runs_template_is_the_saved_one_else_the_configured_file(tmp_path):
    (tmp_path / "t.jinja").write_text("é")
    data = DataConfig(path="d", chat_template=str(tmp_path / "t.jinja"))
    assert data_chat.saved_template(tmp_path, data) == "é"
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": NAMED}))
    assert data_chat.saved_template(tmp_path, data) == NAMED
    (tmp_path / "chat_template.json").unlink()
    assert data_chat.saved_template(tmp_path, DataConfig(path="d")) is None
