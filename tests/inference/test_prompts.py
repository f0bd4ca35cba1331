"""Laws of stop conditions; tests/test_generate.py has those of prompts and text."""

import copy

import pytest
import tiny

from kd_jax.inference.prompts import chat_stops


@pytest.mark.parametrize(
    "end, tokens, texts",
    [("<|eot|>", {4}, []), ("<|end|>", {3}, []), ("END", set(), ["END"]), ("", set(), [])],
)
def test_generation_stops_at_the_templates_end_of_turn(end, tokens, texts, tokenizer, tmp_path):
    other = copy.deepcopy(tokenizer)
    other.chat_template = "{{ 'not used' }}"
    file = tmp_path / "t.jinja"
    file.write_text(tiny.TEMPLATE.replace("<|eot|>", end))
    assert chat_stops(other, str(file), "2024-07-26") == (tokens, texts)
    other.chat_template = file.read_text()
    assert chat_stops(other, None, "2024-07-26") == (tokens, texts)
    other.chat_template = None
    assert chat_stops(other, None, "2024-07-26") == (set(), [])
