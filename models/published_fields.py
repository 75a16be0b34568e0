"""Fields of the ``config.json`` of published models that are no plain Llama, Qwen2.5 or Qwen3.

Sizes agree with the published numbers of parameters (``tests/models/test_config.py``). Not compared with the files
themselves: the rotary embeddings of Devstral, and ``intermediate_size`` of mixtures without dense layers. The factors
of Phi-4-mini's LongRoPE are not its own.
"""

from __future__ import annotations

from typing import Any

Fields = dict[str, Any]


def _fields(architecture: str, vocab: int, hidden: int, inner: int, layers: int, heads: int, **more: Any) -> Fields:
    return {
        "architectures": [f"{architecture}ForCausalLM"],
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        **more,
    }


def _mistral(vocab: int, hidden: int, inner: int, layers: int, **more: Any) -> Fields:
    common = {"num_key_value_heads": 8, "head_dim": 128, "rms_norm_eps": 1e-5, "sliding_window": None}
    return _fields("Mistral", vocab, hidden, inner, layers, 32, **{**common, **more})


def _ministral3(hidden: int, inner: int, layers: int, heads: int, **rope: Any) -> Fields:
    yarn = {"rope_type": "yarn", "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0}
    length = int(rope["factor"] * rope["original_max_position_embeddings"])
    more = {"rope_parameters": {**yarn, **rope}, "max_position_embeddings": length}
    return _fields("Ministral3", 131_072, hidden, inner, layers, heads, **more)


def _qwen3_moe(hidden: int, inner: int, layers: int, heads: int, **more: Any) -> Fields:
    common = {"head_dim": 128, "num_experts_per_tok": 8, "norm_topk_prob": True}
    return _fields("Qwen3Moe", 151_936, hidden, inner, layers, heads, **common, **more)


def _gemma3(hidden: int, inner: int, layers: int, heads: int, **more: Any) -> Fields:
    stretched = {"sliding_window": 1024, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    return _fields("Gemma3", 262_208, hidden, inner, layers, heads, **{**stretched, **more})


def _gpt_oss(layers: int, experts: int) -> Fields:
    return _fields("GptOss", 201_088, 2880, 2880, layers, 64, num_local_experts=experts)


def _glm(hidden: int, inner: int, layers: int, experts: int, size: int, **more: Any) -> Fields:
    common = {"head_dim": 128, "attention_bias": True, "rope_theta": 1e6}
    mixture = {"n_routed_experts": experts, "moe_intermediate_size": size}
    return _fields("Glm4Moe", 151_552, hidden, inner, layers, 96, **common, **mixture, **more)


_CODER: Fields = {"rope_theta": 1e7, "max_position_embeddings": 262_144}
_LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 48, "long_factor": [1.0] * 48}

FIELDS: dict[str, Fields] = {
    "mistral-7b-v0.1": _mistral(32_000, 4096, 14_336, 32, sliding_window=4096, max_position_embeddings=32_768),
    "mistral-small-24b": _mistral(131_072, 5120, 32_768, 40, rope_theta=1e9),
    "ministral-3-8b": _ministral3(
        *(4096, 14_336, 34, 32),
        rope_theta=1e6,
        factor=16.0,
        original_max_position_embeddings=16_384,
        llama_4_scaling_beta=0.1,
    ),
    "devstral-small-2-24b": _ministral3(
        *(5120, 32_768, 40, 32),
        rope_theta=1e8,
        factor=48.0,
        original_max_position_embeddings=8192,
        llama_4_scaling_beta=0.1,
    ),
    "devstral-2-123b": _ministral3(
        *(12_288, 28_672, 88, 96),
        rope_theta=1e6,
        factor=64.0,
        original_max_position_embeddings=4096,
        llama_4_scaling_beta=0.0,
    ),
    "phi-4": _fields(
        *("Phi3", 100_352, 5120, 17_920, 40, 40),
        num_key_value_heads=10,
        max_position_embeddings=16_384,
        rope_theta=250_000.0,
    ),
    "phi-4-mini": _fields(
        *("Phi3", 200_064, 3072, 8192, 32, 24),
        num_key_value_heads=8,
        max_position_embeddings=131_072,
        original_max_position_embeddings=4096,
        partial_rotary_factor=0.75,
        rope_scaling=_LONGROPE,
        tie_word_embeddings=True,
    ),
    "gemma-2-9b": _fields("Gemma2", 256_000, 3584, 14_336, 42, 16, num_key_value_heads=8),
    "gemma-3-1b": _gemma3(
        *(1152, 6912, 26, 4),
        vocab_size=262_144,
        num_key_value_heads=1,
        sliding_window=512,
        max_position_embeddings=32_768,
        rope_scaling=None,
    ),
    "gemma-3-4b": _gemma3(2560, 10_240, 34, 8),
    "gemma-3-27b": _gemma3(5376, 21_504, 62, 32, num_key_value_heads=16, head_dim=128, query_pre_attn_scalar=168),
    "qwen3-30b-a3b": _qwen3_moe(2048, 6144, 48, 32, rope_theta=1e6, max_position_embeddings=40_960),
    "qwen3-coder-30b-a3b": _qwen3_moe(2048, 5472, 48, 32, **_CODER),
    "qwen3-coder-480b-a35b": _qwen3_moe(
        *(6144, 8192, 62, 96),
        **{**_CODER, "num_key_value_heads": 8, "num_experts": 160, "moe_intermediate_size": 2560},
    ),
    "gpt-oss-20b": _gpt_oss(24, 32),
    "gpt-oss-120b": _gpt_oss(36, 128),
    "glm-4.5-air": _glm(4096, 10_944, 46, 128, 1408),
    "glm-4.5": _glm(
        *(5120, 12_288, 92, 160, 1536),
        use_qk_norm=True,
        first_k_dense_replace=3,
        routed_scaling_factor=2.5,
    ),
}
"""Name -> fields."""
