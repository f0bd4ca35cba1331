"""PEFT's LoRA adapters: tensor names, adapter_config.json and factors."""

import math
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import regex

from kd_jax.config import LoraConfig, UserError
from kd_jax.config.errors import first_lines
from kd_jax.config.run import LINEAR_NAMES
from kd_jax.models.architecture import Architecture
from kd_jax.models.config_keys import is_number, show
from kd_jax.models.weight_table import (
    FACTORS,
    FUSED,
    adapter_weights,
    hf_names,
    shape_problems,
    tensor_shapes,
)
from kd_jax.weights.files import is_there, read_json
from kd_jax.weights.kinds import describe_folder
from kd_jax.weights.safetensors import open_folder

MATCH_SECONDS = 2.0  # for all names; an expression can take for ever


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
}  # fmt: skip

# Keys that change the computation, with the values that mean plain LoRA. The initialisations left
# out (pissa, olora, loftq, ...) change the base model's weights as well.
_FIXED: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "use_dora": (False, None),
    "bias": ("none", None),
    "modules_to_save": (None, []),
    "layers_pattern": (None, "layers", ["layers"], [], ""),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "fan_in_fan_out": (False, None),
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
}


def peft_problems(config: Mapping[str, Any]) -> list[str]:
    """Returns an error for each key of adapter_config.json that asks for more than plain LoRA."""
    problems = [
        f"{key}: expected {values[0]!r}, got {show(config.get(key))}"
        for key, values in _FIXED.items()
        if config.get(key) not in values
    ]
    problems += [
        f"{key}: unknown, got {show(value)}"
        for key, value in config.items()
        if key not in _FIXED.keys() | _IGNORED | _READ and value not in (None, False, [], {})
    ]
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if type(rank) is not int or not 1 <= rank < 2**31:
        problems.append(f"r: expected a whole number of at least 1, got {show(rank)}")
    if not is_number(alpha) or not 0 < alpha < 1e9:
        problems.append(f"lora_alpha: expected a number above 0 and below 1e9, got {show(alpha)}")
    if not isinstance(config.get("use_rslora"), bool | None):
        problems.append(f"use_rslora: expected true or false, got {show(config['use_rslora'])}")
    return problems


def peft_targets(
    config: Mapping[str, Any], modules: Collection[str], problems: list[str]
) -> set[str]:
    """Returns the `model.layers.N...` modules that PEFT adapts; adds errors to `problems`."""
    wanted, excluded = config.get("target_modules") or [], config.get("exclude_modules") or []
    layers = config.get("layers_to_transform")
    chosen = {layers} if type(layers) is int else layers or []
    for key, value, kind in (
        ("target_modules", wanted, str),
        ("exclude_modules", excluded, str),
        ("layers_to_transform", chosen, int),
    ):
        if isinstance(value, str) and kind is str:
            continue
        if not isinstance(value, list | set) or not all(type(x) is kind for x in value):
            expected = "names or a regular expression" if kind is str else "whole numbers"
            problems.append(f"{key}: expected {expected}, got {config[key]!r:.80}")
            return set()
    end = time.monotonic() + MATCH_SECONDS
    try:
        for part in [wanted] if isinstance(wanted, str) else [[name] for name in wanted]:
            if not any(_is_named(module, part, end) for module in modules):
                known = ", ".join(LINEAR_NAMES)
                problems.append(f"target_modules: expected some of {known}, got {part!s:.80}")
        found = {m for m in modules if _is_named(m, wanted, end)}
        found = {m for m in found if not _is_named(m, excluded, end)}
    except (regex.error, TimeoutError, RecursionError, MemoryError) as error:
        what = f"target_modules, exclude_modules: {wanted!s:.80}, {excluded!s:.80}"
        reason = f"not matched in {MATCH_SECONDS} s" if isinstance(error, TimeoutError) else error
        problems.append(f"{what}: not a usable regular expression ({reason})")
        return set()
    return {m for m in found if not chosen or int(m.split(".")[2]) in chosen}


def _is_named(module: str, names: str | list[str], end: float) -> bool:
    """Returns True if a module matches PEFT's regular expression or list of name endings.

    Raises:
      TimeoutError: matching took until `end`, a time.monotonic().
    """
    if isinstance(names, str):
        if names == "all-linear":
            return True
        left = max(end - time.monotonic(), 0.01)
        return regex.fullmatch(names, module, timeout=left) is not None
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
    if not is_there(path):
        raise UserError(f"{path}: expected a PEFT adapter, {describe_folder(folder)}")
    config = read_json(path)
    tensors = open_folder(folder, single="adapter_model.safetensors")
    problems = peft_problems(config)
    rank = config["r"] if type(config.get("r")) is int and 0 < config["r"] < 2**31 else 0
    every = LoraConfig(rank=rank, target_modules=LINEAR_NAMES)
    shapes = tensor_shapes(adapter_weights(every, arch), arch)
    modules = peft_targets(config, {name.rpartition(".")[0] for name in shapes}, problems)
    names = [name for name in shapes if name.rpartition(".")[0] in modules]
    if rank > 0:
        found = {name: tensor.shape for name, tensor in tensors.items()}
        problems += shape_problems(found, {peft_name(name): shapes[name] for name in names})
    if not modules:
        problems.append("target_modules, layers_to_transform: no projection is left to adapt")
    if problems:
        shown = "\n  ".join(first_lines(problems))
        raise UserError(f"{path}: this adapter cannot be loaded:\n  {shown}")
    factors = {name: tensors[peft_name(name)].read().astype(np.float32) for name in names}
    alpha = config["lora_alpha"] * (math.sqrt(rank) if config.get("use_rslora") else 1)
    last = {module.rpartition(".")[2] for module in modules}
    adapted = last.union(*(FUSED.get(name, ()) for name in last))
    targets = tuple(name for name in LINEAR_NAMES if name in adapted)
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
