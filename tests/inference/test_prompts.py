"""Laws of stop conditions; tests/test_generate.py has those of prompts and text."""

import copy

import pytest
import tiny

from kd_jax.config import DataConfig
from kd_jax.data.chat import chat_template_of
from kd_jax.inference.prompts import template_stops


def stops(tokenizer, file=None):
    template = chat_template_of(DataConfig(path="unused", chat_template=file), tokenizer)
    return template_stops(tokenizer, template, "2024-07-26")


@pytest.mark.parametrize(
    "end, tokens, texts",
    [
        ("<|eot|>", {4}, []), ("<|end|>", {3}, []), ("<|end|><|eot|>", {3}, []),
        ("END", set(), ["END"]), ("END<|eot|>", set(), ["END"]), ("", set(), []),
    ],
)  # fmt: skip
def test_generation_stops_at_the_templates_end_of_turn(end, tokens, texts, tokenizer, tmp_path):
    other = copy.deepcopy(tokenizer)
    other.chat_template = "{{ 'not used' }}"
    file = tmp_path / "t.jinja"
    file.write_text(tiny.TEMPLATE.replace("<|eot|>", end))
    assert stops(other, str(file)) == (tokens, texts)
    other.chat_template = file.read_text()
    assert stops(other) == (tokens, texts)
    other.chat_template = None
    assert stops(other) == (set(), [])
