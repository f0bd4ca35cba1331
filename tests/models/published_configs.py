"""config.json of published models: facts of the public files, with the keys that matter here."""

from typing import Any

OLD = {
    "_name_or_path": "x", "architectures": ["LlamaForCausalLM"], "bos_token_id": 1,
    "eos_token_id": 2, "hidden_act": "silu", "initializer_range": 0.02, "pad_token_id": 0,
    "tie_word_embeddings": False, "torch_dtype": "float16", "transformers_version": "4.31.0",
    "use_cache": True, "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": None,
}  # fmt: skip
LLAMA3_ROPE = {
    "factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192, "rope_type": "llama3",
}  # fmt: skip
NEW = {**OLD, "attention_bias": False, "attention_dropout": 0.0, "mlp_bias": False}
LLAMA31 = {"rope_theta": 500000.0, "rope_scaling": LLAMA3_ROPE, "max_position_embeddings": 131072}
OLD_QWEN = {"sliding_window": 32768, "use_sliding_window": False, "max_window_layers": 28}
LINEAR = {"factor": 4.0, "type": "linear"}
YARN = {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"}


def sizes(
    D: int, F: int, L: int, N: int, K: int | None = None, V: int = 32000, **more: Any
) -> dict[str, Any]:
    shape = {
        "hidden_size": D, "intermediate_size": F, "num_hidden_layers": L,
        "num_attention_heads": N, "num_key_value_heads": K, "vocab_size": V,
        "max_position_embeddings": 4096,
    }  # fmt: skip
    return {key: value for key, value in shape.items() if value is not None} | more


def llama(*shape: Any, **more: Any) -> dict[str, Any]:
    return OLD | {"model_type": "llama"} | sizes(*shape, **more)


def llama3(*shape: Any, V: int = 128256, **more: Any) -> dict[str, Any]:
    given = {"rope_theta": 500000.0, "max_position_embeddings": 8192} | more
    return NEW | {"model_type": "llama"} | sizes(*shape, V=V) | given


def mistral(*shape: Any, window: int | None = None, **more: Any) -> dict[str, Any]:
    given = {"rope_theta": 10000.0, "sliding_window": window, "attention_dropout": 0.0} | more
    return OLD | {"model_type": "mistral"} | sizes(*shape) | given


def qwen2(*shape: Any, V: int = 151936, **more: Any) -> dict[str, Any]:
    given = {"rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "attention_dropout": 0.0} | OLD_QWEN
    return OLD | {"model_type": "qwen2"} | sizes(*shape, V=V) | given | more


def qwen3(*shape: Any, **more: Any) -> dict[str, Any]:
    given = {"head_dim": 128, "attention_bias": False, "sliding_window": None} | more
    return qwen2(*shape) | {"model_type": "qwen3"} | given


def granite(*shape: Any, **more: Any) -> dict[str, Any]:
    given = {"embedding_multiplier": 12.0, "residual_multiplier": 0.22, "rope_theta": 5000000.0}
    return NEW | {"model_type": "granite"} | sizes(*shape) | given | TIED | more


def olmo2(*shape: Any) -> dict[str, Any]:
    given = {"attention_bias": False, "rms_norm_eps": 1e-06, "rope_theta": 500000}
    return OLD | {"model_type": "olmo2"} | sizes(*shape, V=100352) | given


def phi3(*shape: Any, **more: Any) -> dict[str, Any]:
    given = {"attention_bias": False, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
    return OLD | {"model_type": "phi3"} | sizes(*shape, **more) | given


SEVEN, EIGHT = (4096, 11008, 32, 32), (4096, 14336, 32, 32, 8)
R1 = {"use_mrope": False, "rope_theta": 10000, "sliding_window": 4096, "max_window_layers": 21}
SMOL2 = {"is_llama_config": True, "rope_interleaved": False, "tie_word_embeddings": True}
SMOL2 |= {"rope_theta": 100000, "max_position_embeddings": 8192}
TIED = {"tie_word_embeddings": True}
GEMMA: dict[str, Any] = {
    "attention_bias": False, "bos_token_id": 2, "cache_implementation": "hybrid", "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06,
}  # fmt: skip
PUBLISHED: dict[str, dict[str, Any]] = {
    "huggyllama/llama-7b": llama(*SEVEN, max_sequence_length=2048, rms_norm_eps=1e-06),
    "huggyllama/llama-13b": llama(5120, 13824, 40, 40, max_sequence_length=2048),
    "openlm-research/open_llama_3b_v2": llama(3200, 8640, 26, 32, rms_norm_eps=1e-06),
    "princeton-nlp/Sheared-LLaMA-1.3B": llama(2048, 5504, 24, 16, 16),
    "JackFram/llama-68m": llama(768, 3072, 2, 12, rms_norm_eps=1e-06),
    "meta-llama/Llama-2-7b-hf": llama(*SEVEN, 32),
    "meta-llama/Llama-2-13b-chat-hf": llama(5120, 13824, 40, 40, 40),
    "meta-llama/Llama-2-70b-hf": llama(8192, 28672, 80, 64, 8),
    "allenai/tulu-2-dpo-7b": llama(*SEVEN, 32),
    "microsoft/Orca-2-7b": llama(*SEVEN, 32, 32003),
    "lmsys/vicuna-7b-v1.5": llama(*SEVEN, 32),
    "lmsys/vicuna-7b-v1.5-16k": llama(*SEVEN, 32, rope_scaling=LINEAR, max_sequence_length=16384),
    "togethercomputer/LLaMA-2-7B-32K": llama(*SEVEN, 32, rope_scaling={**LINEAR, "factor": 8.0}),
    "codellama/CodeLlama-7b-hf": llama(*SEVEN, 32, 32016, rope_theta=1000000),
    "codellama/CodeLlama-34b-hf": llama(8192, 22016, 48, 64, 8, rope_theta=1000000),
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": llama(2048, 5632, 22, 32, 4, attention_bias=False),
    "01-ai/Yi-6B": llama(4096, 11008, 32, 32, 4, 64000, rope_theta=5000000.0),
    "01-ai/Yi-34B-Chat": llama(7168, 20480, 60, 56, 8, 64000, rope_theta=5000000.0),
    "deepseek-ai/deepseek-llm-7b-base": llama(4096, 11008, 30, 32, 32, 102400),
    "deepseek-ai/deepseek-coder-6.7b-base": llama(
        *SEVEN, 32, 32256, rope_scaling=LINEAR, rope_theta=100000, max_position_embeddings=16384
    ),
    "deepseek-ai/deepseek-coder-1.3b-instruct": llama(
        2048, 5504, 24, 16, 16, 32256, rope_scaling=LINEAR, rope_theta=100000
    ),
    "HuggingFaceTB/SmolLM-135M": llama(576, 1536, 30, 9, 3, 49152, **TIED),
    "HuggingFaceTB/SmolLM2-135M": llama(576, 1536, 30, 9, 3, 49152, **SMOL2),
    "HuggingFaceTB/SmolLM2-360M-Instruct": llama(
        960, 2560, 32, 15, 5, 49152, **SMOL2, **{"transformers.js_config": {"dtype": "q4"}}
    ),
    "HuggingFaceTB/SmolLM2-1.7B": llama(2048, 8192, 24, 32, 32, 49152, **SMOL2),
    "meta-llama/Meta-Llama-3-8B": llama3(*EIGHT),
    "meta-llama/Meta-Llama-3-70B-Instruct": llama3(8192, 28672, 80, 64, 8),
    "gradientai/Llama-3-8B-Instruct-262k": llama3(*EIGHT, rope_theta=283461213.0),
    "NousResearch/Hermes-2-Pro-Llama-3-8B": llama3(*EIGHT, V=128288),
    "NousResearch/Hermes-3-Llama-3.1-8B": llama3(*EIGHT, **LLAMA31),
    "allenai/Llama-3.1-Tulu-3-8B": llama3(*EIGHT, V=128264, **LLAMA31),
    "meta-llama/Llama-Guard-3-8B": llama3(*EIGHT, **LLAMA31, eos_token_id=[128001, 128009]),
    "meta-llama/Llama-3.1-405B": llama3(16384, 53248, 126, 128, 8, **LLAMA31),
    "nvidia/Llama-3.1-Minitron-4B-Width-Base": llama3(
        3072, 9216, 32, 32, 8, **LLAMA31, head_dim=128
    ),
    "deepseek-ai/DeepSeek-R1-Distill-Llama-8B": llama3(*EIGHT, **LLAMA31),
    "unsloth/Llama-3.2-1B-Instruct": llama3(
        2048, 8192, 16, 32, 8, **LLAMA31, **TIED, head_dim=64, unsloth_fixed=True
    ),
    "mistralai/Mistral-7B-v0.1": mistral(*EIGHT, window=4096),
    "HuggingFaceH4/zephyr-7b-beta": mistral(*EIGHT, window=4096),
    "openchat/openchat-3.5-0106": mistral(*EIGHT, 32002, window=4096),
    "mistralai/Mistral-7B-Instruct-v0.2": mistral(*EIGHT, rope_theta=1000000.0),
    "mistralai/Mistral-Nemo-Instruct-2407": mistral(
        5120, 14336, 40, 32, 8, 131072, head_dim=128, rope_theta=1000000.0
    ),
    "mistralai/Mistral-Small-24B-Base-2501": mistral(
        5120, 32768, 40, 32, 8, 131072, head_dim=128, rope_theta=100000000.0
    ),
    "mistralai/Codestral-22B-v0.1": mistral(6144, 16384, 56, 48, 8, 32768, rope_theta=1000000.0),
    "h2oai/h2o-danube2-1.8b-base": mistral(2560, 6912, 24, 32, 8),
    "Qwen/Qwen1.5-0.5B": qwen2(1024, 2816, 24, 16, 16, max_window_layers=21, **TIED),
    "Qwen/Qwen1.5-7B-Chat": qwen2(*SEVEN, 32),
    "Qwen/Qwen2-7B-Instruct": qwen2(3584, 18944, 28, 28, 4, V=152064, sliding_window=131072),
    "Qwen/Qwen2.5-0.5B": qwen2(896, 4864, 24, 14, 2, max_window_layers=24, **TIED),
    "Qwen/Qwen2.5-Coder-7B": qwen2(3584, 18944, 28, 28, 4, V=152064),
    "Qwen/Qwen2.5-14B-Instruct": qwen2(5120, 13824, 48, 40, 8, V=152064, max_window_layers=70),
    "Qwen/Qwen2.5-32B": qwen2(5120, 27648, 64, 40, 8, V=152064),
    "Qwen/Qwen2.5-72B-Instruct": qwen2(8192, 29568, 80, 64, 8, V=152064, max_window_layers=70),
    "Qwen/Qwen2.5-7B-Instruct-1M": qwen2(
        3584, 18944, 28, 28, 4, V=152064, rope_theta=10000000.0,
        dual_chunk_attention_config={"chunk_size": 262144, "local_size": 8192},
    ),
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": qwen2(1536, 8960, 28, 12, 2, **R1),
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B": qwen2(
        3584, 18944, 28, 28, 4, V=152064, **R1 | {"max_window_layers": 28}
    ),
    "Qwen/Qwen3-0.6B": qwen3(1024, 3072, 28, 16, 8, **TIED),
    "Qwen/Qwen3-1.7B": qwen3(2048, 6144, 28, 16, 8, **TIED),
    "Qwen/Qwen3-4B-Instruct-2507": qwen3(2560, 9728, 36, 32, 8, **TIED, rope_theta=5000000),
    "Qwen/Qwen3-32B": qwen3(5120, 25600, 64, 64, 8),
}  # fmt: skip
PUBLISHED |= {
    "NousResearch/Yarn-Llama-2-7b-64k": llama(*SEVEN, 32, rope_scaling={**YARN, "finetuned": True}),
    "Qwen/Qwen2.5-7B-Instruct with YaRN, as its card says": qwen2(
        3584, 18944, 28, 28, 4, V=152064, rope_scaling=YARN
    ),
    "ibm-granite/granite-3b-code-base": llama(
        2560, 10240, 32, 32, 32, 49152, attention_bias=True, mlp_bias=True, **TIED
    ),
    "ibm-granite/granite-3.1-2b-base": granite(
        2048, 8192, 40, 32, 8, 49152, attention_multiplier=0.015625, logits_scaling=8.0
    ),
    "ibm-granite/granite-3.1-8b-instruct": granite(
        4096, 12800, 40, 32, 8, 49155, attention_multiplier=0.0078125, logits_scaling=16.0
    ),
    "HuggingFaceTB/SmolLM3-3B": OLD | sizes(
        2048, 11008, 36, 16, 4, 128256, model_type="smollm3", rope_theta=5000000.0,
        no_rope_layers=[1, 1, 1, 0] * 9, no_rope_layer_interval=4, sliding_window=None,
        use_sliding_window=False, max_window_layers=28, layer_types=["full_attention"] * 36,
        attention_bias=False, mlp_bias=False, rms_norm_eps=1e-06, **TIED,
    ),
    "allenai/OLMo-2-0425-1B": olmo2(2048, 8192, 16, 16, 16),
    "allenai/OLMo-2-1124-7B": olmo2(4096, 11008, 32, 32, 32),
    "microsoft/Phi-3-mini-4k-instruct": phi3(
        3072, 8192, 32, 32, 32, 32064, sliding_window=2047, rope_theta=10000.0,
        original_max_position_embeddings=4096,
    ),
    "microsoft/phi-4 14b": phi3(
        5120, 17920, 40, 40, 10, 100352, sliding_window=None, rope_theta=250000,
        original_max_position_embeddings=16384, max_position_embeddings=16384,
    ),
    "google/gemma-3-1b-it": GEMMA | sizes(
        1152, 6912, 26, 4, 1, 262144, model_type="gemma3_text", sliding_window=512,
        sliding_window_pattern=6, rope_local_base_freq=10000, rope_theta=1000000,
        final_logit_softcapping=None, attn_logit_softcapping=None,
    ),
}  # fmt: skip
NAMED_SMALLER = {"ibm-granite/granite-3.1-2b-base": 2.53e9, "allenai/OLMo-2-0425-1B": 1.48e9}
"""Weights of models whose names say less."""
WARNED = {
    "Qwen/Qwen2.5-7B-Instruct-1M": "dual_chunk_attention_config",
    "NousResearch/Yarn-Llama-2-7b-64k": "finetuned",
}
"""Models with a key that is not known."""

QUANTIZED = {"quantization_config": {"quant_method": "gptq", "bits": 4}}
PUBLISHED_REFUSED: dict[str, tuple[dict[str, Any], list[str]]] = {
    "TheBloke/Llama-2-7B-Chat-GPTQ": (llama(*SEVEN, 32) | QUANTIZED, ["quantization_config"]),
    "Qwen/Qwen2.5-7B-Instruct-AWQ": (
        qwen2(3584, 18944, 28, 28, 4, V=152064) | QUANTIZED, ["quantization_config"],
    ),
    "mlx-community/Meta-Llama-3-8B-4bit": (
        llama3(*EIGHT, quantization={"group_size": 64, "bits": 4}), ["quantization"],
    ),
    "microsoft/Phi-4-mini-instruct": (
        phi3(3072, 8192, 32, 24, 8, 200064, partial_rotary_factor=0.75, sliding_window=262144,
             rope_scaling={"type": "longrope", "long_factor": [1.0], "short_factor": [1.0]}),
        ["rope_type"],
    ),
    "google/gemma-2-2b": (
        GEMMA | sizes(2304, 9216, 26, 8, 4, 256000, model_type="gemma2", sliding_window=4096,
                      hidden_act="gelu_pytorch_tanh", attn_logit_softcapping=50.0,
                      final_logit_softcapping=30.0),
        ["model_type", "hidden_activation", "query_pre_attn_scalar", "hidden_act",
         "attn_logit_softcapping", "final_logit_softcapping", "sliding_window"],
    ),
    "internlm/internlm2-7b": (
        llama(*EIGHT, 92544, bias=False) | {"model_type": "internlm2"}, ["model_type"],
    ),
    "baichuan-inc/Baichuan-7B": (
        llama(*SEVEN, None, 64000) | {"model_type": "baichuan"}, ["model_type"],
    ),
    "mistralai/Mixtral-8x7B-v0.1": (
        mistral(*EIGHT) | {"model_type": "mixtral", "num_local_experts": 8,
                           "num_experts_per_tok": 2},
        ["model_type", "num_local_experts", "num_experts_per_tok"],
    ),
}  # fmt: skip
