"""A model's folder: hub ids, architecture, fingerprint."""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

from kd_jax.config import UserError
from kd_jax.config.errors import first_line
from kd_jax.models.architecture import Architecture, read_architecture
from kd_jax.weights.files import read_json

ORBAX = "orbax"


_MODEL_FILES = ("*.safetensors", "*.json", "*.jinja", "tokenizer.model", "merges.txt")


def resolve(path: str, field: str, files: Sequence[str] = _MODEL_FILES) -> Path:
    """Returns the local folder of a path or hub id, downloading what a hub id lacks locally.

    Args:
      files: patterns of those wanted.
    """
    folder = Path(os.path.expanduser(path))
    if folder.is_dir():
        return folder
    if folder.exists():
        raise UserError(f"{field}: expected a folder or a hub id, got {path}, which is a file")
    if path.startswith(("/", ".", "~")) or path.count("/") != 1:
        raise UserError(f"{field}: expected a folder or a hub id, got {path}, which is not there")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(path, allow_patterns=list(files)))
    except Exception as error:
        raise UserError(
            f"{field}: {path} is no local folder, and fetching it from the hub failed "
            f"({type(error).__name__}: {first_line(error)}). "
            "Check the name, the network and your token (HF_TOKEN), or give a folder"
        ) from error


def load_architecture(folder: Path) -> Architecture:
    path = folder / "config.json"
    return read_architecture(read_json(path), str(path))


def fingerprint(folder: Path) -> str:
    """Returns a hash of what a folder's model or adapter is, whatever the folder's name.

    Of each megabyte of weights the first 4 KiB count: training and merging change nearly all
    values of a tensor, and so the hash, while hashing every byte would take longer than loading.
    """
    files = [folder / "config.json", folder / "adapter_config.json"]
    files += [*folder.glob("*.safetensors"), *(folder / ORBAX).rglob("*")]
    digest = hashlib.sha256()
    for path in sorted(path for path in files if path.is_file()):
        size = path.stat().st_size
        digest.update(f"{path.relative_to(folder)} {size}\n".encode())
        with open(path, "rb", buffering=0) as file:
            for start in range(0, size, 2**20):
                file.seek(start)
                digest.update(file.read(2**12))
    return digest.hexdigest()
