"""New small models: a tokenizer trained on a corpus, random weights in Hugging Face form."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kd_jax.data.encode import LLAMA3
from kd_jax.models.architecture import read_architecture
from kd_jax.models.weight_table import tensor_shapes, weights
from kd_jax.weights.export import new_folder

BEGIN, START, END, END_OF_TURN = (
    "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"
)  # fmt: skip
PAD = "<|pad|>"
SPECIAL = (BEGIN, START, END, END_OF_TURN, PAD)
# Llama 3's chat template without the system turn.
TEMPLATE = (
    "{{- bos_token -}}{%- for m in messages -%}"
    f"{{{{- '{START}' + m['role'] + '{END}\n\n' + m['content'] | trim + '{END_OF_TURN}' -}}}}"
    "{%- endfor -%}"
    f"{{%- if add_generation_prompt -%}}{{{{- '{START}assistant{END}\n\n' -}}}}{{%- endif -%}}"
)
SHAPE = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "dtype": "float32",
}


def make_tokenizer(exchanges: Sequence[tuple[str, str]], vocab_size: int) -> Any:
    """Returns a byte-level BPE tokenizer with a chat template, trained on (instruction, answer)."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    turns = (("user", "\n\n", question, "assistant", answer) for question, answer in exchanges)
    tokenizer.train_from_iterator((text for turn in turns for text in turn), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BEGIN,
        eos_token=END_OF_TURN,
        pad_token=PAD,
        chat_template=TEMPLATE,
    )


def write_llama(folder: Path, tokenizer: Any, seed: int, **shape: int) -> int:
    """Writes a randomly initialised Llama and its tokenizer; returns the number of parameters.

    Matrices are normal with standard deviation 1 / sqrt(inputs), divided by sqrt(2 L) where they
    write into the residual stream. Rows of the embedding have unit norm on average.
    """
    from safetensors.numpy import save_file

    eos = tokenizer.eos_token_id
    config = {
        **SHAPE,
        **shape,
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": eos,
    }
    arch = read_architecture(config, str(folder))
    rng = np.random.default_rng(seed)
    tensors = {}
    for name, size in tensor_shapes(weights(arch), arch).items():
        if len(size) == 1:
            tensors[name] = np.ones(size, np.float32)
            continue
        scale = size[-1] ** -0.5
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            scale *= (2 * arch.num_hidden_layers) ** -0.5
        tensors[name] = rng.normal(0.0, scale, size).astype(np.float32)
    with new_folder(folder) as place:
        save_file(tensors, place / "model.safetensors", metadata={"format": "pt"})
        (place / "config.json").write_text(json.dumps(config, indent=2))
        (place / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
        tokenizer.save_pretrained(place)
    return sum(x.size for x in tensors.values())
