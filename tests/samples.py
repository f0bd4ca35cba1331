"""Sample records and helpers for the tests of chat templates and rows."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tiny

from kd_jax.config import DataConfig
from kd_jax.data import chat as data_chat
from kd_jax.data import rows
from kd_jax.data.files import read_raw
from kd_jax.data.records import Record, make_record
from kd_jax.data.rows import Rows, make_rows


def chat(*contents: str, roles: str = "ua") -> list[dict[str, str]]:
    names = {"s": "system", "u": "user", "a": "assistant"}
    letters = roles * (len(contents) // len(roles))
    return [{"role": names[r], "content": c} for r, c in zip(letters, contents, strict=True)]


def record(messages: list[dict[str, Any]], **more: Any) -> Record:
    return make_record("d:1", {"messages": messages, **more})


def records_of(path: Path | str, split: str = "train") -> list[Record]:
    return [make_record(*raw) for raw in read_raw(str(path), split, 0, None)]


ALPACA = [
    {"instruction": "Add.", "input": "2, 3", "output": "Five 🙂"},
    {"instruction": "Name it.", "input": "", "output": "Blue."},
    {"instruction": "Line\u2028break.", "input": "", "output": "[{}]"},
]
CHATS = [
    {"messages": chat("Add.\n\n2, 3", "Five 🙂")},
    {"messages": chat("Name it.", "Blue.")},
    {"messages": chat("Line\u2028break.", "[{}]")},
]


def write_lines(path: Path, records: list[Any]) -> Path:
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
    path.write_text("".join(lines), encoding="utf-8")
    return path


def write_folder(folder: Path) -> Path:
    folder.mkdir()
    write_lines(folder / "train.jsonl", CHATS)
    write_lines(folder / "test.jsonl", CHATS[:1])
    return folder


# Special tokens: the tiny tokenizer's to Llama 3's.
LLAMA3 = {
    "<|begin|>": "<|begin_of_text|>",
    "<|pad|>": "<|finetune_right_pad_id|>",
    "<|start|>": "<|start_header_id|>",
    "<|end|>": "<|end_header_id|>",
    "<|eot|>": "<|eot_id|>",
}


def write_stand_ins(folder: Path) -> Path:
    """Writes small stand-ins for the real data, in the same formats."""
    tokenizer = folder / "llama3_tokenizer"
    tiny.write_tokenizer(tokenizer)
    for file in tokenizer.iterdir():
        text = file.read_text(encoding="utf-8")
        for ours, theirs in LLAMA3.items():
            text = text.replace(ours, theirs)
        file.write_text(text, encoding="utf-8")
    alpaca = [
        {**record, "output": f"{record['output']} {i / 7:.3f} = {i}/7\n日本 ${i}"}
        for i in range(20)
        for record in ALPACA
    ]
    (folder / "gsm8k_alpaca.json").write_text(json.dumps(alpaca, indent=0), encoding="utf-8")
    chats = [
        {"messages": chat(f"You are knight {i}.", f"“Aye!” *bows* 🐉\n\n- {i}\t", "And?", " No. ")}
        for i in range(60)
    ]
    write_lines(folder / "roleplay_chat.jsonl", chats)
    return folder


def edited(folder: Path, change: Callable[[dict[str, Any]], Any]) -> Any:
    """Returns the tiny tokenizer with a changed tokenizer.json."""
    tiny.write_tokenizer(folder)
    file = folder / "tokenizer.json"
    tree = json.loads(file.read_text())
    change(tree)
    file.write_text(json.dumps(tree))
    return data_chat.load_tokenizer(folder)


def swap_merges(tree: dict[str, Any]) -> None:
    merges = tree["model"]["merges"]
    merges[0], merges[1] = merges[1], merges[0]


def rows_of(config: DataConfig, tokenizer: Any, template: str = tiny.TEMPLATE) -> Rows:
    return make_rows(config, tokenizer, template)


def same_rows(a: Rows, b: Rows) -> bool:
    return all(np.array_equal(getattr(a, name), getattr(b, name)) for name in rows.COLUMNS)
