"""PEFT's LoRA adapters: tensor names, adapter_config.json and factors."""

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
from kd_jax.models.weight_table import FACTORS, adapter_weights, hf_names, shape_problems
from kd_jax.weights.files import read_json
from kd_jax.weights.safetensors import open_folder


def peft_name(name: str) -> str:
    """Returns PEFT's tensor name of a factor such as model.layers.0.mlp.up_proj.lora_A."""
    return f"base_model.model.{name}.weight"


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

# Keys that change the computation, with the values that mean plain LoRA. The initialisations left
# out (pissa, olora, loftq, ...) change the base model's weights as well.
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
    """Returns an error for each key of adapter_config.json that asks for more than plain LoRA."""
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
    """Returns the `model.layers.N...` modules that PEFT adapts; adds errors to `problems`."""
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
    """Returns True if a module matches PEFT's regular expression or list of name endings."""
    if isinstance(names, str):
        return names == "all-linear" or re.fullmatch(names, module) is not None
    return any(f".{module}".endswith(f".{name}") for name in names)


@dataclass(frozen=True, slots=True)
class Adapter:
    """A PEFT LoRA adapter in host memory."""

    factors: dict[str, np.ndarray]
    """A [rank, in] and B [out, rank], float32, by name: model.layers.0.mlp.up_proj.lora_A."""
    config: LoraConfig

    @property
    def scale(self) -> float:
        """The factor of B A."""
        return self.config.alpha / self.config.rank

    def factors_of(self, weight: str) -> tuple[np.ndarray, np.ndarray] | None:
        """Returns A and B of a weight by its Hugging Face name, None if it is not adapted."""
        stem = weight.removesuffix("weight")
        if f"{stem}lora_A" not in self.factors:
            return None
        return self.factors[f"{stem}lora_A"], self.factors[f"{stem}lora_B"]


def load_adapter(folder: Path, arch: Architecture) -> Adapter:
    """Reads a PEFT folder.

    Raises:
      UserError: it is not plain LoRA on projections of this architecture; all reasons are listed.
    """
    path = folder / "adapter_config.json"
    config = read_json(path)
    tensors = open_folder(folder, single="adapter_model.safetensors")
    problems = peft_problems(config)
    rank = config["r"] if type(config.get("r")) is int else 0
    every = LoraConfig(rank=rank, target_modules=LINEAR_NAMES)
    shapes = {
        name: weight.layer_shape
        for dotted, weight in adapter_weights(every, arch).items()
        for name in hf_names(dotted, arch)
    }
    modules = peft_targets(config, {name.rpartition(".")[0] for name in shapes}, problems)
    names = [name for name in shapes if name.rpartition(".")[0] in modules]
    if rank > 0:
        found = {name: tensor.shape for name, tensor in tensors.items()}
        problems += shape_problems(found, {peft_name(name): shapes[name] for name in names})
    if not modules:
        problems.append("target_modules, layers_to_transform: no projection is left to adapt")
    if problems:
        raise UserError(f"{path}: this adapter cannot be loaded:\n  " + "\n  ".join(problems))
    factors = {name: tensors[peft_name(name)].read().astype(np.float32) for name in names}
    alpha = config["lora_alpha"] * (math.sqrt(rank) if config.get("use_rslora") else 1)
    targets = tuple(n for n in LINEAR_NAMES if any(m.endswith(f".{n}") for m in modules))
    return Adapter(factors, LoraConfig(rank=rank, alpha=alpha, target_modules=targets))


def stack_adapter(adapter: Adapter, arch: Architecture) -> dict[str, np.ndarray]:
    """Returns the factors stacked over layers, by dotted path.

    Raises:
      UserError: the adapter adapts a projection in some layers only.
    """
    stacked, partly = {}, []
    for path in adapter_weights(adapter.config, arch):
        names = hf_names(path, arch)
        absent = [str(i) for i, name in enumerate(names) if name not in adapter.factors]
        if not absent:
            stacked[path] = np.stack([adapter.factors[name] for name in names])
        elif path.endswith(FACTORS[0]):
            partly.append(f"{path.rpartition('.')[0]}: none in layers {', '.join(absent)}")
    if partly:
        raise UserError(
            "student.adapter: expected factors in every layer to continue training, got some "
            "layers only:\n  " + "\n  ".join(partly) + "\nMerge the adapter into its base with peft"
        )
    return stacked
