"""Small files: JSON read with one clear error, text written whole."""

import json
import os
from pathlib import Path
from typing import Any

from kd_jax.config import UserError


def read_json(path: Path) -> dict[str, Any]:
    try:
        tree = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path}: expected a JSON file, which is not there") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: expected JSON, got {error}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected a JSON object, got {type(tree).__name__}")
    return tree


def write_whole(file: Path, text: str) -> None:
    """Writes a file so that nobody ever reads half of it."""
    beside = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, file)
