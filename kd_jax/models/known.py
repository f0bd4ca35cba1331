"""Well-known models on the hub, to plan without a download: config.json without default values."""

from typing import Any

_LLAMA_3_ROPE = {
    "factor": 8.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
_LLAMA_3: dict[str, Any] = {
    "max_position_embeddings": 131072,
    "model_type": "llama",
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_scaling": _LLAMA_3_ROPE,
    "rope_theta": 500000.0,
    "vocab_size": 128256,
}
_LLAMA_3_2 = {
    **_LLAMA_3,
    "rope_scaling": {**_LLAMA_3_ROPE, "factor": 32.0},
    "tie_word_embeddings": True,
}

_QWEN2: dict[str, Any] = {
    "max_position_embeddings": 32768,
    "model_type": "qwen2",
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
    "vocab_size": 151936,
}
_QWEN2_BASE = {**_QWEN2, "max_position_embeddings": 131072}

_QWEN3: dict[str, Any] = {
    "max_position_embeddings": 40960,
    "model_type": "qwen3",
    "num_key_value_heads": 8,
    "rope_theta": 1000000,
    "vocab_size": 151936,
}


def _sizes(hidden: int, mlp: int, layers: int, heads: int, **others: Any) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        **others,
    }


_LLAMA_70B = _LLAMA_3 | _sizes(8192, 28672, 80, 64)
_QWEN2_0P5B = _sizes(896, 4864, 24, 14, num_key_value_heads=2)
_QWEN2_1P5B = _sizes(1536, 8960, 28, 12, num_key_value_heads=2)
_QWEN2P5_3B = _sizes(2048, 11008, 36, 16, num_key_value_heads=2)
_QWEN2P5_7B = _sizes(
    3584, 18944, 28, 28, num_key_value_heads=4, tie_word_embeddings=False, vocab_size=152064
)
KNOWN_MODELS: dict[str, dict[str, Any]] = {
    "meta-llama/Llama-3.1-8B-Instruct": _LLAMA_3 | _sizes(4096, 14336, 32, 32),
    "meta-llama/Llama-3.1-70B-Instruct": _LLAMA_70B,
    "meta-llama/Llama-3.3-70B-Instruct": _LLAMA_70B,
    "meta-llama/Llama-3.2-1B-Instruct": _LLAMA_3_2 | _sizes(2048, 8192, 16, 32),
    "meta-llama/Llama-3.2-3B-Instruct": _LLAMA_3_2 | _sizes(3072, 8192, 28, 24),
    "Qwen/Qwen2-0.5B": _QWEN2_BASE | _QWEN2_0P5B,
    "Qwen/Qwen2-0.5B-Instruct": _QWEN2 | _QWEN2_0P5B,
    "Qwen/Qwen2-1.5B": _QWEN2_BASE | _QWEN2_1P5B,
    "Qwen/Qwen2-1.5B-Instruct": _QWEN2 | _QWEN2_1P5B,
    "Qwen/Qwen2.5-3B-Instruct": _QWEN2 | _QWEN2P5_3B,
    "Qwen/Qwen2.5-7B-Instruct": _QWEN2 | _QWEN2P5_7B,
    "Qwen/Qwen3-8B": _QWEN3 | _sizes(4096, 12288, 36, 32),
    "Qwen/Qwen3-14B": _QWEN3 | _sizes(5120, 17408, 40, 40),
    "HuggingFaceTB/SmolLM2-135M-Instruct": {
        "max_position_embeddings": 8192,
        "model_type": "llama",
        "num_key_value_heads": 3,
        "rms_norm_eps": 1e-05,
        "rope_theta": 100000,
        "tie_word_embeddings": True,
        "vocab_size": 49152,
        **_sizes(576, 1536, 30, 9),
    },
    "mistralai/Mistral-7B-Instruct-v0.3": {
        "max_position_embeddings": 32768,
        "model_type": "mistral",
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "vocab_size": 32768,
        **_sizes(4096, 14336, 32, 32),
    },
}
