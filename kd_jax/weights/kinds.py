"""Descriptions of paths that are no model, and of the path to give instead."""

from pathlib import Path
from typing import Any

from kd_jax.config import UserError
from kd_jax.weights.files import read_json


def describe_folder(folder: Path) -> str:
    """Returns the content of a folder without a usable model, and the remedy."""
    try:
        names = sorted(path.name for path in folder.iterdir())
    except OSError as error:
        return f"got {error}"
    suffixes = {Path(name).suffix for name in names}
    inner = [name for name in names if (folder / name / "config.json").is_file()]
    if "adapter_config.json" in names:
        return (
            f"got a PEFT adapter{_base_of(folder)}. Give its base model here, and this folder as "
            "the adapter (--student.adapter, --teacher.adapter), or merge them with peft"
        )
    if _is_workdir(folder):
        return (
            "got the workdir of a run. Export its student with python -m convert.to_hf --workdir "
            f"{folder} --out FOLDER, and give FOLDER"
        )
    if ".gguf" in suffixes:
        return "got GGUF files (llama.cpp), which are not read. Give the original safetensors model"
    if "params.json" in names or "consolidated.safetensors" in names:
        return (
            "got a model in its maker's own form (params.json, consolidated.*). Give the one in "
            "Hugging Face form, with config.json and model*.safetensors"
        )
    if (folder / "snapshots").is_dir():
        found = sorted(str(path) for path in (folder / "snapshots").iterdir())
        return f"got an entry of the hub's cache. Give its model: {', '.join(found) or 'none'}"
    if inner and "config.json" not in names:
        return f"got a folder of models. Give one of them: {', '.join(inner[:10])}"
    return f"got {', '.join(names[:10]) or 'an empty folder'}{' ...' if len(names) > 10 else ''}"


def describe_file(path: Path) -> str:
    """Returns the kind of a file, and the path to give instead."""
    if path.suffix == ".gguf":
        return "a GGUF file (llama.cpp). Give the folder of the original safetensors model"
    return f"a file. Give its folder, {path.parent}"


def _base_of(folder: Path) -> str:
    base = _read(folder / "adapter_config.json").get("base_model_name_or_path")
    return f" of {base}" if isinstance(base, str) else ""


def _is_workdir(folder: Path) -> bool:
    return {"config", "inputs", "versions"} <= _read(folder / "config.json").keys()


def _read(path: Path) -> dict[str, Any]:
    try:
        return read_json(path)
    except UserError:
        return {}
