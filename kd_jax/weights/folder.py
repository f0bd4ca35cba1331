"""A model's folder: hub ids, architecture, fingerprint."""

import os
from collections.abc import Sequence
from pathlib import Path

import xxhash

from kd_jax.config import UserError
from kd_jax.config.errors import first_line
from kd_jax.models.architecture import Architecture, read_architecture
from kd_jax.weights.files import check_file, is_there, read_json
from kd_jax.weights.hashes import hash_files
from kd_jax.weights.kinds import describe_file, describe_folder
from kd_jax.weights.safetensors import INDEX

ORBAX = "orbax"

_MODEL_FILES = ("*.safetensors", "*.json", "*.jinja", "tokenizer.model", "merges.txt")
_SAME_WEIGHTS = ["consolidated*.safetensors", "original/*"]  # once more, in the maker's own form


def resolve(path: str, field: str, files: Sequence[str] = _MODEL_FILES) -> Path:
    """Returns the local folder of a path or hub id, downloading missing files of a hub id.

    Args:
      files: patterns of the files to download.
    """
    folder = Path(os.path.expanduser(path))
    if os.path.isdir(folder):  # False for a name that is too long, which Path.is_dir raises for
        return check_files(folder, files)
    if is_there(folder):
        got = describe_file(folder)
        raise UserError(f"{field}: expected a folder or a hub id, got {path}, which is {got}")
    if path.startswith(("/", ".", "~")) or path.count("/") != 1:
        raise UserError(f"{field}: expected a folder or a hub id, got {path}, which is not there")
    from huggingface_hub import snapshot_download

    try:
        wanted = list(files)
        folder = Path(snapshot_download(path, allow_patterns=wanted, ignore_patterns=_SAME_WEIGHTS))
    except Exception as error:
        raise UserError(
            f"{field}: {path} is no local folder, and fetching it from the hub failed "
            f"({type(error).__name__}: {first_line(error)}). "
            "Check the name, the network and your token (HF_TOKEN), or give a folder"
        ) from error
    return check_files(folder, files)


def check_files(folder: Path, patterns: Sequence[str]) -> Path:
    """Returns the folder; raises UserError if a file is a pipe, a Git LFS pointer or the like."""
    for pattern in patterns:
        for path in sorted(folder.glob(pattern)):
            if is_there(path):
                check_file(path)
    return folder


def same_path(one: str, other: str) -> bool:
    """Returns True for two spellings of one folder, such as `t` and `x/../t/`, or of one hub id."""
    first, second = (Path(path).expanduser().resolve() for path in (one, other))
    return first == second


def load_architecture(folder: Path) -> Architecture:
    """Returns the architecture that config.json describes."""
    path = folder / "config.json"
    config = read_json(path) if os.path.lexists(path) else {}
    if not {"model_type", "hidden_size"} & config.keys():
        raise UserError(f"{path}: expected a model's config.json, {describe_folder(folder)}")
    return read_architecture(config, str(path))


def fingerprint(folder: Path) -> str:
    """Returns a hash of every byte that defines a folder's model or adapter, not of its name."""
    files = {folder / "config.json", folder / "adapter_config.json", folder / INDEX}
    files |= {*folder.glob("*.safetensors"), *(folder / ORBAX).rglob("*")}
    if (folder / INDEX).is_file():
        weight_map = read_json(folder / INDEX).get("weight_map")
        if isinstance(weight_map, dict):
            files |= {folder / str(name) for name in weight_map.values()}
    found = sorted(path for path in files if is_there(path))
    for path in found:
        check_file(path)
    digest = xxhash.xxh3_128()
    for path, value in zip(found, hash_files(found), strict=True):
        digest.update(f"{path.relative_to(folder)} {value}\n".encode())
    return digest.hexdigest()
