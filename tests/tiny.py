"""Tiny random models and a tiny tokenizer in Hugging Face form, written by transformers."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from kd_jax.config import (
    Config,
    DataConfig,
    LoraConfig,
    OptimConfig,
    StudentConfig,
    TeacherConfig,
)  # fmt: skip

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
DEFAULT_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
ADAPTED = ("q_proj", "down_proj")  # a step of these compiles in two thirds of all seven's time
SHAPE = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 131072,
}
# Each family's additions to config.json. As in Qwen3 0.6B, heads are wider than hidden_size /
# num_attention_heads; as in Qwen2, sliding windows are disabled.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"rope_parameters": LLAMA3},
    "mistral": {"rope_parameters": DEFAULT_ROPE, "sliding_window": None},
    "qwen2": {
        "rope_parameters": {**DEFAULT_ROPE, "rope_theta": 1000000.0},
        "use_sliding_window": False,
        "sliding_window": 16,
        "max_window_layers": 3,
    },
    "qwen3": {"rope_parameters": {**DEFAULT_ROPE, "rope_theta": 1000000.0}, "head_dim": 32},
    "granite": {
        "rope_parameters": DEFAULT_ROPE,
        "embedding_multiplier": 1.5,
        "residual_multiplier": 0.7,
        "attention_multiplier": 0.3,
        "logits_scaling": 1.75,
    },
    "smollm3": {
        "rope_parameters": DEFAULT_ROPE,
        "no_rope_layer_interval": 2,
        "pad_token_id": 0,
        "use_sliding_window": False,
        "sliding_window": None,
    },
    "olmo2": {"rope_parameters": DEFAULT_ROPE},
    "phi3": {
        "rope_parameters": {**DEFAULT_ROPE, "partial_rotary_factor": 0.5},
        "sliding_window": None,
        "pad_token_id": 0,
    },
    "gemma3_text": {
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "rope_theta": 1000000.0, "factor": 8.0},
            "sliding_attention": DEFAULT_ROPE,
        },
        "head_dim": 32,
        "query_pre_attn_scalar": 24,
        "sliding_window": 12,
        "sliding_window_pattern": 2,
    },
}
SPECIAL = ["<|begin|>", "<|pad|>", "<|start|>", "<|end|>", "<|eot|>"]
# Llama 3's format. Like Llama 3.1's template it contains a date, by default today's.
TEMPLATE = (
    "{%- if not date_string is defined -%}"
    "{%- set date_string = strftime_now('%d %b %Y') -%}{%- endif -%}"
    "{{- '<|begin|>' -}}"
    "{{- '<|start|>system<|end|>\n\nToday: ' + date_string + '<|eot|>' -}}"
    "{%- for m in messages -%}"
    "{{- '<|start|>' + m['role'] + '<|end|>\n\n' + m['content'] | trim + '<|eot|>' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|start|>assistant<|end|>\n\n' -}}{%- endif -%}"
)
WORDS = [
    "Name the colour of the sky.",
    "How many legs has a cat?",
    "A cat has four legs.",
    "The sky is blue, and grass is green.",
    "What is two plus three? It is five.",
    "Write a word that rhymes with cat: hat.",
]


def write_tokenizer(folder: Path, words: list[str] = WORDS) -> None:
    """Writes tokenizer.json and its config: byte-level BPE with a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(words, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|begin|>", eos_token="<|eot|>", pad_token="<|pad|>"
    )
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)


def make_config(family: str = "llama", **changes: Any) -> dict[str, Any]:
    """Returns a config.json."""
    options = {**SHAPE, "model_type": family, "tie_word_embeddings": True, **FAMILIES[family]}
    return options | changes


def make_torch_model(family: str = "llama", seed: int = 0, **changes: Any) -> Any:
    """Returns transformers' model, float32; logits have a standard deviation above 1."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    config = AutoConfig.for_model(**make_config(family, **changes))
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("norm.weight"):
                weight.copy_(1 + 0.3 * torch.randn_like(weight))
            elif name.endswith(".bias"):
                weight.copy_(torch.randn_like(weight))
            elif name.startswith(("model.embed_tokens", "lm_head")):
                weight.copy_(torch.randn_like(weight) * 4 / weight.shape[1] ** 0.5)
            else:
                weight.copy_(torch.randn_like(weight) * 1.5 / weight.shape[1] ** 0.5)
    return model


def write_model(
    folder: Path, seed: int = 0, dtype: str = "float32", *, family: str = "llama", **changes: Any
) -> Path:
    """Writes a random model and the tiny tokenizer; returns the folder."""
    import torch

    make_torch_model(family, seed, **changes).to(getattr(torch, dtype)).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def one_device() -> Any:
    """Returns the mesh of the default device alone."""
    import jax

    from kd_jax.config import MeshConfig
    from kd_jax.parallel.mesh import make_mesh

    device = jax.config.jax_default_device or jax.devices()[0]
    return make_mesh(MeshConfig(), 1, [device])


def make_spec(arch: Any, dtype: str = "float32", **options: Any) -> Any:
    """Returns a DecoderSpec, on one device by default."""
    from kd_jax.models.decoder import DecoderSpec
    from kd_jax.parallel.mesh import Layout

    options = {"layout": Layout(one_device()), **options}
    return DecoderSpec(arch=arch, dtype=np.dtype(dtype), **options)


def arrays_of(decoder: Any) -> dict[str, Any]:
    """Returns a decoder's arrays by Flax path."""
    from flax import nnx

    state = nnx.to_flat_state(nnx.state(decoder))
    return {".".join(map(str, path)): variable[...] for path, variable in state}


def random_tensors(config: dict[str, Any], seed: int = 0) -> dict[str, np.ndarray]:
    """Returns random float32 tensors for a config.json by Hugging Face name, without torch."""
    from kd_jax.models.architecture import read_architecture
    from kd_jax.models.weight_table import hf_names, weights

    arch, rng = read_architecture(config, "tiny"), np.random.default_rng(seed)
    tensors = {}
    for path, weight in weights(arch).items():
        for name in hf_names(path, arch):
            shape = weight.shape[1:] if path.startswith("layers.") else weight.shape
            value = rng.normal(size=shape) * 2 / shape[-1] ** 0.5
            tensors[name] = (1 + 0.1 * value if len(shape) == 1 else value).astype(np.float32)
    return tensors


def write_plain_model(
    folder: Path, seed: int = 0, *, family: str = "llama", **changes: Any
) -> Path:
    """Writes a random tied model without torch, and the tiny tokenizer; returns the folder."""
    from safetensors.numpy import save_file

    config = make_config(family, **changes)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = random_tensors(config, seed)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    write_tokenizer(folder)
    return folder


def write_data(path: Path, count: int = 24) -> Path:
    """Writes `count` Alpaca records of different lengths, as JSON lines."""
    lines = []
    for i in range(count):
        question, answer = WORDS[i % 6], " ".join(WORDS[: 1 + i % 4])
        lines.append(json.dumps({"instruction": question, "input": "", "output": answer}))
    path.write_text("\n".join(lines) + "\n")
    return path


def plain_config(**changes: Any) -> Config:
    """Returns a config of models and data that need not be there."""
    given = {
        "workdir": "w",
        "teacher": TeacherConfig(path="t"),
        "student": StudentConfig(path="s"),
        "data": DataConfig(path="d"),
        "steps": 10,
    }
    return Config(**given | changes)


def write_config(
    folder: Path,
    *,
    teacher: Any = "teacher",
    student: Any = "student",
    data: Any = "train.jsonl",
    dtype: Any = "auto",
    rows: dict[str, Any] | None = None,
    **fields: Any,
) -> Path:
    """Writes FOLDER/config.py, a LoRA run of four steps, and returns its path.

    Args:
      teacher: a path, of the folder unless it is absolute, as student and data; or a TeacherConfig
        or None.
      rows: fields of DataConfig.
      fields: of Config.
    """
    if isinstance(teacher, str | Path):
        teacher = TeacherConfig(path=str(folder / teacher), dtype=dtype)
    options = {"seq_len": 128, "batch_size": 8, "cache_dir": str(folder / "rows")}
    given = {
        "workdir": "unset",
        "teacher": teacher,
        "student": StudentConfig(path=str(folder / student), dtype=dtype),
        "data": DataConfig(path=str(folder / data), **options | (rows or {})),
        "lora": LoraConfig(rank=4, alpha=8.0, target_modules=ADAPTED),
        "optim": OptimConfig(learning_rate=1e-2, warmup_steps=2),
        "compilation_cache": None,
        "steps": 4,
    }
    file = folder / "config.py"
    source = (
        f"from kd_jax.config import *\n\ndef get_config():\n    return {Config(**given | fields)}"
    )
    file.write_text(source + "\n")
    return file


def read_lines(file: Path) -> list[Any]:
    """Returns the objects of a file of JSON lines."""
    return [json.loads(line) for line in file.read_text().splitlines()]


def trace(workdir: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    """Returns the lines of a run's file without what depends on time and machine."""
    clocks = ("seconds", "per_second", "bytes")
    lines = read_lines(workdir / name)
    return [{k: v for k, v in line.items() if not k.endswith(clocks)} for line in lines]


def logits(model, tokens, positions, segment_ids):
    """Returns a Decoder's logits [B, S, V] float32."""
    import jax.numpy as jnp

    hidden = model(tokens, positions, segment_ids)
    head = model.head_weight().astype(hidden.dtype)
    return jnp.einsum("BSD,VD->BSV", hidden, head, preferred_element_type=jnp.float32)
