"""PEFT's LoRA adapters: names, configuration and factors."""

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kd_jax.config import LoraConfig, UserError
from kd_jax.config.run import LINEAR_NAMES
from kd_jax.models.architecture import Architecture
from kd_jax.models.table import FACTORS, hf_names, weights
from kd_jax.weights.files import read_json
from kd_jax.weights.safetensors import open_folder


def peft_name(module: str, factor: str) -> str:
    """Returns PEFT's name of a factor: `base_model.model.` + module + `.lora_A.weight`."""
    return f"base_model.model.{module}.{factor}.weight"


# Keys of adapter_config.json that do not change what a saved adapter computes.
_IGNORED = {
    "auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode",
    "peft_version", "lora_dropout", "loftq_config", "eva_config", "corda_config", "lora_ga_config",
    "megatron_core", "qalora_group_size", "runtime_config", "ensure_weight_tying",
}  # fmt: skip


_READ = {
    "r", "lora_alpha", "use_rslora", "target_modules", "exclude_modules", "layers_to_transform",
    "layers_pattern",
}  # fmt: skip


# Keys that change the computation, with the only values under which plain LoRA is right. The other
# initialisations (pissa, olora, loftq, ...) change the base model's weights as well.
_FIXED: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "use_dora": (False, None),
    "bias": ("none", None),
    "modules_to_save": (None, []),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "fan_in_fan_out": (False, None),
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
}


def peft_problems(config: Mapping[str, Any]) -> list[str]:
    """Returns what a parsed adapter_config.json asks for that plain LoRA does not do."""
    problems = [
        f"{key}: expected {values[0]!r}, got {config.get(key)!r}"
        for key, values in _FIXED.items()
        if config.get(key) not in values
    ]
    problems += [
        f"{key}: unknown, got {value!r}"
        for key, value in config.items()
        if key not in _FIXED.keys() | _IGNORED | _READ and value not in (None, False, [], {})
    ]
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if type(rank) is not int or rank < 1:
        problems.append(f"r: expected a whole number of at least 1, got {rank!r}")
    if not isinstance(alpha, int | float) or alpha <= 0:
        problems.append(f"lora_alpha: expected a number above 0, got {alpha!r}")
    return problems


def peft_targets(
    config: Mapping[str, Any], modules: Collection[str], problems: list[str]
) -> set[str]:
    """Returns those of the `model.layers.N...` modules that PEFT adapts under this config."""
    wanted, excluded = config.get("target_modules") or [], config.get("exclude_modules") or []
    layers = config.get("layers_to_transform")
    chosen = {layers} if isinstance(layers, int) else set(layers or [])
    try:
        for part in [wanted] if isinstance(wanted, str) else [[name] for name in wanted]:
            if not any(_is_named(module, part) for module in modules):
                known = ", ".join(LINEAR_NAMES)
                problems.append(f"target_modules: expected some of {known}, got {part}")
        found = {m for m in modules if _is_named(m, wanted) and not _is_named(m, excluded)}
    except re.error as error:
        problems.append(f"target_modules, exclude_modules: not a regular expression ({error})")
        return set()
    return {m for m in found if not chosen or int(m.split(".")[2]) in chosen}


def _is_named(module: str, names: str | list[str]) -> bool:
    """Tells whether PEFT's `names`, an expression or endings, mean this module."""
    if isinstance(names, str):
        return names == "all-linear" or re.fullmatch(names, module) is not None
    return any(f".{module}".endswith(f".{name}") for name in names)


@dataclass(frozen=True, slots=True)
class Adapter:
    """A PEFT LoRA adapter: factors by Hugging Face module name, and the scale of B A."""

    factors: dict[str, tuple[np.ndarray, np.ndarray]]
    config: LoraConfig
    scale: float


def load_adapter(folder: Path, arch: Architecture) -> Adapter:
    """Reads a PEFT folder; anything but plain LoRA on the seven projections is refused."""
    path = folder / "adapter_config.json"
    config = read_json(path)
    tensors = open_folder(folder, single="adapter_model.safetensors")
    shapes = {
        name.removesuffix(".weight"): weight.shape[1:]
        for array, weight in weights(arch).items()
        if array.endswith("_proj.weight")
        for name in hf_names(array, arch)
    }
    problems = peft_problems(config)
    modules = sorted(peft_targets(config, shapes, problems))
    wanted = {peft_name(module, factor) for module in modules for factor in FACTORS}
    problems += [f"missing: {name}" for name in sorted(wanted - tensors.keys())]
    problems += [f"unexpected: {name}" for name in sorted(tensors.keys() - wanted)]
    rank = config.get("r")
    for module in modules:
        num_out, num_in = shapes[module]
        for factor, shape in zip(FACTORS, ((rank, num_in), (num_out, rank)), strict=True):
            found = tensors.get(peft_name(module, factor))
            if found is not None and found.shape != shape:
                got = list(found.shape)
                problems.append(f"misshapen: {module}.{factor}: expected {list(shape)}, got {got}")
    if not modules:
        problems.append("target_modules, layers_to_transform: no projection is left to adapt")
    if problems:
        raise UserError(f"{path}: this adapter cannot be loaded:\n  " + "\n  ".join(problems))
    assert isinstance(rank, int)
    factors = {
        m: tuple(tensors[peft_name(m, factor)].read().astype(np.float32) for factor in FACTORS)
        for m in modules
    }
    alpha = config["lora_alpha"] * (math.sqrt(rank) if config.get("use_rslora") else 1)
    targets = tuple(n for n in LINEAR_NAMES if any(m.endswith(f".{n}") for m in modules))
    lora = LoraConfig(rank=rank, alpha=alpha, target_modules=targets)
    return Adapter(factors, lora, alpha / rank)  # type: ignore[arg-type]


def stack_adapter(adapter: Adapter, arch: Architecture) -> dict[str, np.ndarray]:
    """Returns the factors stacked over layers, by their dotted paths in a model."""
    stacked, partly = {}, []
    for path in weights(arch):
        module = path.removesuffix(".weight")
        names = [name.removesuffix(".weight") for name in hf_names(path, arch)]
        absent = [str(i) for i, name in enumerate(names) if name not in adapter.factors]
        if len(absent) == len(names):
            continue
        if absent:
            partly.append(f"{module}: none in layers {', '.join(absent)}")
            continue
        for k, factor in enumerate(FACTORS):
            stacked[f"{module}.{factor}"] = np.stack([adapter.factors[n][k] for n in names])
    if partly:
        raise UserError(
            "student.adapter: expected factors in every layer to go on from, got some layers only:"
            "\n  " + "\n  ".join(partly) + "\nMerge the adapter into its base with peft first"
        )
    return stacked
