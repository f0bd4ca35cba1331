"""The chat template and end tokens in a folder that transformers and servers read."""

import json
import shutil
from pathlib import Path
from typing import Any

from kd_jax.config import UserError
from kd_jax.data.chat import end_of_turn, load_tokenizer
from kd_jax.data.templates import TEMPLATE_FILE, Template
from kd_jax.models.config_keys import show
from kd_jax.weights.files import read_json

JINJA, OTHERS = "chat_template.jinja", "additional_chat_templates"


def save_chat(source: Path, folder: Path, template: Template, date: str) -> None:
    """Writes the template a run was trained with, and its end of turn as one more end token.

    Args:
      source: the student's folder, whose tokenizer files `folder` has too.
      date: data.date of the run.
    """
    tokenizer = load_tokenizer(source)
    if tokenizer.chat_template != template or (source / TEMPLATE_FILE).is_file():
        _write_template(folder, template)
    ids, _ = end_of_turn(tokenizer, template, date)
    if len(ids) != 1:
        return
    options = _generation_options(source)
    known = end_tokens(options, source)
    if ids[0] not in known:
        options.pop("_from_model_config", None)  # transformers would take config.json's end
        options["eos_token_id"] = [*known, *ids] if known else ids[0]
        _write_json(folder / "generation_config.json", options)


def end_tokens(options: dict[str, Any], place: Path) -> list[int]:
    """Returns the end tokens of a generation_config.json or config.json, which `place` names."""
    ends = options.get("eos_token_id")
    found = ends if isinstance(ends, list) else [] if ends is None else [ends]
    if not all(type(token) is int for token in found):
        raise UserError(f"{place}: eos_token_id: expected a token id or a list, got {show(ends)}")
    return found


def _write_template(folder: Path, template: Template) -> None:
    """Writes Jinja files, which transformers prefers to the tokenizer's configuration.

    Named ones that are there would be used in place of the one template of a run.
    """
    shutil.rmtree(folder / OTHERS, ignore_errors=True)
    named = {"default": template} if isinstance(template, str) else dict(template)
    (folder / JINJA).write_text(named.pop("default"), encoding="utf-8")
    for name, text in named.items():
        file = folder / OTHERS / f"{name}.jinja"
        file.parent.mkdir(exist_ok=True)
        file.write_text(text, encoding="utf-8")
    config = folder / "tokenizer_config.json"
    if config.is_file():  # other programs read the old one there
        _write_json(config, {k: v for k, v in read_json(config).items() if k != "chat_template"})


def _generation_options(source: Path) -> dict[str, Any]:
    """Returns generation_config.json, or its tokens as config.json has them."""
    file = source / "generation_config.json"
    if file.is_file():
        return read_json(file)
    config = read_json(source / "config.json")
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {name: config[name] for name in names if config.get(name) is not None}


def _write_json(file: Path, tree: dict[str, Any]) -> None:
    file.write_text(json.dumps(tree, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
