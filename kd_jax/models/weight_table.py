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
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
"""Projections that some families store as one, parts one after the other along `out`."""
NORMS = {
    "before": ("input_layernorm", "post_attention_layernorm"),
    "after": ("post_attention_layernorm", "post_feedforward_layernorm"),
    "around": (
        "input_layernorm", "post_attention_layernorm",
        "pre_feedforward_layernorm", "post_feedforward_layernorm",
    ),
}  # fmt: skip
"""A layer's norms by Architecture.norms, in order of use."""


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
    norm = Weight((D,), ("norm",))
    shapes: dict[str, Any] = {  # projection -> out, in, their dimensions, and whether it has a bias
        "self_attn.q_proj": (NH, D, "heads", "embed", arch.qkv_bias),
        "self_attn.k_proj": (KH, D, "heads", "embed", arch.qkv_bias),
        "self_attn.v_proj": (KH, D, "heads", "embed", arch.qkv_bias),
        "self_attn.o_proj": (D, NH, "embed", "heads", arch.o_bias),
        "mlp.gate_proj": (F, D, "mlp", "embed", arch.mlp_bias),
        "mlp.up_proj": (F, D, "mlp", "embed", arch.mlp_bias),
        "mlp.down_proj": (D, F, "embed", "mlp", arch.mlp_bias),
    }
    if arch.fused_projections:
        for fused, parts in FUSED.items():
            parent = "mlp" if fused.startswith("gate") else "self_attn"
            each = [shapes.pop(f"{parent}.{part}") for part in parts]
            shapes[f"{parent}.{fused}"] = (sum(x[0] for x in each), *each[0][1:])
    norms = [f"{name}.weight" for name in NORMS[arch.norms]]
    half = len(norms) // 2  # of attention, and of the MLP
    matrices = {f"{n}.weight": Weight(x[:2], x[2:4]) for n, x in shapes.items()}
    attention = {n: x for n, x in matrices.items() if n.startswith("self_attn")}
    table = dict.fromkeys(norms[:half], norm) | attention | dict.fromkeys(norms[half:], norm)
    table |= matrices
    table |= {f"{n}.bias": Weight(x[:1], x[2:3]) for n, x in shapes.items() if x[4]}
    if arch.qk_norm != "none":
        widths = (H, H) if arch.qk_norm == "head" else (NH, KH)
        for name, width in zip(("q_norm", "k_norm"), widths, strict=True):
            table[f"self_attn.{name}.weight"] = Weight((width,), ("norm",))
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


def head_weights(arch: Architecture) -> dict[str, Weight]:
    """Returns the lm_head by dotted path, or the tied embedding."""
    path = "embed_tokens.weight" if arch.tie_word_embeddings else HEAD
    return {path: weights(arch)[path]}


def is_adapter(name: str) -> bool:
    """Returns True if a dotted path names a LoRA factor."""
    return name.endswith(FACTORS)


def adapter_weights(lora: LoraConfig, arch: Architecture) -> dict[str, Weight]:
    """Returns the LoRA factors A [L, rank, in] and B [L, out, rank] by dotted path."""
    table, rank = {}, lora.rank
    for path, weight in weights(arch).items():
        name = path.split(".")[-2]
        names = (name, *FUSED.get(name, ()))  # a fused one is adapted for any of its parts
        if any(x in lora.target_modules for x in names) and len(weight.layer_shape) == 2:
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


def tensor_shapes(table: Mapping[str, Weight], arch: Architecture) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of a table's tensors by Hugging Face name."""
    return {
        name: weight.layer_shape for path, weight in table.items() for name in hf_names(path, arch)
    }


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
