"""The one table of weights: paths, shapes, dimensions and Hugging Face names."""

from dataclasses import dataclass

from kd_jax.config import Config, LoraConfig
from kd_jax.models.architecture import Architecture

HEAD = "lm_head.weight"
FACTORS = ("lora_A", "lora_B")


@dataclass(frozen=True, slots=True)
class Weight:
    """What one tensor looks like: its shape and the logical names of its dimensions."""

    shape: tuple[int, ...]
    dims: tuple[str, ...]


def layer_weights(arch: Architecture) -> dict[str, Weight]:
    """Returns each tensor of one layer by its name below `model.layers.N.`."""
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
    """Returns every tensor of the model by dotted path; those of the layers have a leading L."""
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
    """Tells whether an array's dotted path is that of a low-rank factor."""
    return name.endswith(FACTORS)


def adapter_weights(lora: LoraConfig, arch: Architecture) -> dict[str, Weight]:
    """Returns the low-rank factors of LoRA by the path of their weight and their name."""
    table, rank = {}, lora.rank
    for path, weight in weights(arch).items():
        name = path.split(".")[-2]
        if name in lora.target_modules and len(weight.shape) == 3:
            (L, out, into), (layers, out_dim, into_dim) = weight.shape, weight.dims
            stem = path.removesuffix("weight")
            table[f"{stem}lora_A"] = Weight((L, rank, into), (layers, "rank", into_dim))
            table[f"{stem}lora_B"] = Weight((L, out, rank), (layers, out_dim, "rank"))
    return table


def trained_weights(config: Config, arch: Architecture) -> dict[str, Weight]:
    return adapter_weights(config.lora, arch) if config.trainable == "lora" else weights(arch)


def projection_weight(
    config: Config, student: Architecture, teacher: Architecture | None
) -> Weight | None:
    """Returns the shape of what brings student states to the teacher's width, or None for none."""
    if teacher is None or not config.compares_hidden or student.hidden_size == teacher.hidden_size:
        return None
    shape = (len(config.hidden.student_layers), teacher.hidden_size, student.hidden_size)
    return Weight(shape, ("layers", "embed", "embed"))


def hf_names(path: str, arch: Architecture) -> list[str]:
    """Returns the Hugging Face names of one array: those of all layers, or its only one."""
    if path.startswith("layers."):
        rest = path.removeprefix("layers.")
        return [f"model.layers.{i}.{rest}" for i in range(arch.num_hidden_layers)]
    return [path if path == HEAD else f"model.{path}"]


def abstract_weights(table, layout, dtype):
    import jax

    return {
        path: jax.ShapeDtypeStruct(
            weight.shape, dtype, sharding=layout.sharding(weight.dims, weight.shape)
        )
        for path, weight in table.items()
    }
