"""The table of weights: paths, shapes, dimensions and Hugging Face names. Imports no jax."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from kd_jax.config import Config, LoraConfig
from kd_jax.models.architecture import Architecture

if TYPE_CHECKING:
    import jax

    from kd_jax.parallel.mesh import Layout

HEAD = "lm_head.weight"
FACTORS = ("lora_A", "lora_B")


@dataclass(frozen=True, slots=True)
class Weight:
    """Shape of an array, and its logical dimensions (keys of parallel.rules)."""

    shape: tuple[int, ...]
    dims: tuple[str, ...]

    @property
    def is_stacked(self) -> bool:
        """True if dimension 0 is layers, which are separate tensors in Hugging Face files."""
        return self.dims[0] == "layers"

    @property
    def layer_shape(self) -> tuple[int, ...]:
        """Shape of one layer's tensor, or of the whole array if it is not stacked."""
        return self.shape[1:] if self.is_stacked else self.shape

    def split(self, array: np.ndarray) -> list[np.ndarray]:
        """Returns the array's tensors as views, in the order of `hf_names`."""
        return list(array) if self.is_stacked else [array]


def layer_weights(arch: Architecture) -> dict[str, Weight]:
    """Returns the weights of one layer by Hugging Face name without `model.layers.N.`."""
    D, F, H = arch.hidden_size, arch.intermediate_size, arch.head_dim
    NH, KH = arch.num_attention_heads * H, arch.num_key_value_heads * H
    table = {
        "input_layernorm.weight": Weight((D,), ("norm",)),
        "self_attn.q_proj.weight": Weight((NH, D), ("heads", "embed")),
        "self_attn.k_proj.weight": Weight((KH, D), ("heads", "embed")),
        "self_attn.v_proj.weight": Weight((KH, D), ("heads", "embed")),
        "self_attn.o_proj.weight": Weight((D, NH), ("embed", "heads")),
        "post_attention_layernorm.weight": Weight((D,), ("norm",)),
        "mlp.gate_proj.weight": Weight((F, D), ("mlp", "embed")),
        "mlp.up_proj.weight": Weight((F, D), ("mlp", "embed")),
        "mlp.down_proj.weight": Weight((D, F), ("embed", "mlp")),
    }
    if arch.qkv_bias:
        table["self_attn.q_proj.bias"] = Weight((NH,), ("heads",))
        table["self_attn.k_proj.bias"] = Weight((KH,), ("heads",))
        table["self_attn.v_proj.bias"] = Weight((KH,), ("heads",))
    if arch.qk_norm:
        table["self_attn.q_norm.weight"] = Weight((H,), ("norm",))
        table["self_attn.k_norm.weight"] = Weight((H,), ("norm",))
    return table


def weights(arch: Architecture) -> dict[str, Weight]:
    """Returns the model's weights by dotted path; layers are stacked on a leading L."""
    V, D, L = arch.vocab_size, arch.hidden_size, arch.num_hidden_layers
    table = {
        f"layers.{name}": Weight((L, *weight.shape), ("layers", *weight.dims))
        for name, weight in layer_weights(arch).items()
    }
    table["embed_tokens.weight"] = Weight((V, D), ("vocab", "embed"))
    table["norm.weight"] = Weight((D,), ("norm",))
    if not arch.tie_word_embeddings:
        table["lm_head.weight"] = Weight((V, D), ("vocab", "embed"))
    return table


def is_adapter(name: str) -> bool:
    """Returns True if a dotted path names a LoRA factor."""
    return name.endswith(FACTORS)


def adapter_weights(lora: LoraConfig, arch: Architecture) -> dict[str, Weight]:
    """Returns the LoRA factors A [L, rank, in] and B [L, out, rank] by dotted path."""
    table, rank = {}, lora.rank
    for path, weight in weights(arch).items():
        name = path.split(".")[-2]
        if name in lora.target_modules and len(weight.layer_shape) == 2:
            (L, out, into), (layers, out_dim, into_dim) = weight.shape, weight.dims
            stem = path.removesuffix("weight")
            table[f"{stem}lora_A"] = Weight((L, rank, into), (layers, "rank", into_dim))
            table[f"{stem}lora_B"] = Weight((L, out, rank), (layers, out_dim, "rank"))
    return table


def trained_weights(config: Config, arch: Architecture) -> dict[str, Weight]:
    """Returns the student's trainable weights by dotted path."""
    return adapter_weights(config.lora, arch) if config.trainable == "lora" else weights(arch)


def projection_weight(
    config: Config, student: Architecture, teacher: Architecture | None
) -> Weight | None:
    """Returns the projection from student to teacher hidden size; None if unused."""
    if teacher is None or not config.compares_hidden or student.hidden_size == teacher.hidden_size:
        return None
    shape = (len(config.hidden.student_layers), teacher.hidden_size, student.hidden_size)
    return Weight(shape, ("layers", "embed", "embed"))


def abstract_weights(
    table: Mapping[str, Weight], layout: "Layout", dtype: str | Mapping[str, Any]
) -> "dict[str, jax.ShapeDtypeStruct]":
    """Returns the ShapeDtypeStructs of a table's arrays by path, with shardings.

    Args:
      dtype: one dtype, or a dtype for each path.
    """
    import jax

    return {
        path: jax.ShapeDtypeStruct(
            weight.shape,
            dtype if isinstance(dtype, str) else dtype[path],
            sharding=layout.sharding(weight.dims, weight.shape),
        )
        for path, weight in table.items()
    }


def hf_names(path: str, arch: Architecture) -> list[str]:
    """Returns the Hugging Face names of an array: one per layer, or a single one."""
    if path.startswith("layers."):
        return [
            f"model.layers.{i}.{path.removeprefix('layers.')}"
            for i in range(arch.num_hidden_layers)
        ]
    return [path if path == HEAD else f"model.{path}"]


def shape_problems(
    found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]
) -> list[str]:
    """Returns one message for each missing, unexpected or misshapen array."""
    lines = [f"missing: {n} {list(expected[n])}" for n in sorted(expected.keys() - found)]
    lines += [f"unexpected: {n} {list(found[n])}" for n in sorted(found.keys() - expected)]
    return lines + [
        f"misshapen: {n}: expected {list(expected[n])}, got {list(found[n])}"
        for n in sorted(expected.keys() & found.keys())
        if tuple(found[n]) != expected[n]
    ]
