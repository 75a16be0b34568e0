"""The families of decoders that are served.

A family is a row of :data:`FAMILIES`: the fields that its class in transformers adds when they are absent, which of its
layers have a window, and a function from fields to the switches of :class:`.config.ModelConfig`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from .config_file import Json, flag, layers, number, optional_number, size
from .mixture_fields import glm_experts, gpt_oss_experts, qwen_experts
from .rope_fields import ORIGINAL
from .window_fields import Slides, all_layers, by_pattern, flagged, flagged_from

Switches = dict[str, Any]
"""Fields of :class:`.config.ModelConfig`."""


@dataclass(frozen=True)
class Family:
    """What models of one class in transformers have in common."""

    architecture: str
    model_type: str
    switches: Callable[[Json], Switches]
    """Field by field what differs from a plain Llama."""
    defaults: Json = field(default_factory=dict)
    """Fields that the class adds when they are absent."""
    rope: Json = field(default_factory=dict)
    """Its rotary embedding where the file has no parameters of one."""
    ropes: Literal["one", "by type"] = "one"
    """Whether layers with a window have a rotary embedding of their own."""
    partial: bool = False
    """Whether a part of each head may be rotated only."""
    slides: Slides = flagged_from
    """Which layers have a window."""
    typed: bool = False
    """Whether ``layer_types`` may say otherwise."""
    biased: bool = False
    """Whether the class reads ``attention_bias``."""
    activation: str = "hidden_act"
    """Name of the field of the activation."""


def _plain(fields: Json) -> Switches:
    return {}


def _biased(fields: Json) -> Switches:
    """``attention_bias`` of all four projections."""
    return {"qkv_bias": flag(fields, "attention_bias"), "o_bias": flag(fields, "attention_bias")}


def _qwen2(fields: Json) -> Switches:
    return {"qkv_bias": True}


def _qwen3(fields: Json) -> Switches:
    return {**_biased(fields), "qk_norm": True}


def _qwen3_moe(fields: Json) -> Switches:
    return {**_qwen3(fields), "experts": qwen_experts(fields, layers(fields))}


def _gpt_oss(fields: Json) -> Switches:
    return {**_biased(fields), "sinks": True, "float32_norms": True, "experts": gpt_oss_experts(fields)}


def _glm4_moe(fields: Json) -> Switches:
    return {
        "qkv_bias": flag(fields, "attention_bias"),
        "qk_norm": flag(fields, "use_qk_norm"),
        "experts": glm_experts(fields, layers(fields)),
    }


def _gemma2(fields: Json) -> Switches:
    return {
        **_biased(fields),
        "attention_scale": number(fields, "query_pre_attn_scalar") ** -0.5,
        "score_cap": optional_number(fields, "attn_logit_softcapping"),
        "logit_cap": optional_number(fields, "final_logit_softcapping"),
        "activation": "gelu",
        "float32_norms": True,
        "norm_offset": 1.0,
        "sandwich_norms": True,
        "embedding_scale": size(fields, "hidden_size") ** 0.5,
    }


def _gemma3(fields: Json) -> Switches:
    return {**_gemma2(fields), "qk_norm": True}


_WINDOW = {"use_sliding_window": False, "sliding_window": 4096}
_QWEN = {"num_key_value_heads": 32, "max_position_embeddings": 32_768, "rms_norm_eps": 1e-6, **_WINDOW}
_MISTRAL = {"num_key_value_heads": 8, "max_position_embeddings": 131_072, "rms_norm_eps": 1e-6, "sliding_window": 4096}
_GEMMA = {
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
}
_YARN = {"rope_type": "yarn", "beta_fast": 32.0, "beta_slow": 1.0}
_MINISTRAL_ROPE = {"rope_theta": 1e6, "factor": 16.0, ORIGINAL: 16_384, "mscale": 1.0, "mscale_all_dim": 1.0}

LLAMA = Family(
    "LlamaForCausalLM",
    "llama",
    _biased,
    {"max_position_embeddings": 2048, "rms_norm_eps": 1e-6, **_WINDOW},
    typed=True,
    biased=True,
)

FAMILIES: Mapping[str, Family] = {
    family.architecture: family
    for family in (
        LLAMA,
        Family("Qwen2ForCausalLM", "qwen2", _qwen2, _QWEN, typed=True, biased=True),
        Family("Qwen3ForCausalLM", "qwen3", _qwen3, {**_QWEN, "head_dim": 128}, typed=True, biased=True),
        Family(
            "Qwen3MoeForCausalLM",
            "qwen3_moe",
            _qwen3_moe,
            {**_QWEN, "num_key_value_heads": 4},
            biased=True,
            slides=flagged,
        ),
        Family("MistralForCausalLM", "mistral", _plain, _MISTRAL, slides=all_layers),
        Family("MinistralForCausalLM", "ministral", _plain, _MISTRAL, slides=all_layers, typed=True),
        Family(
            "Ministral3ForCausalLM",
            "ministral3",
            _plain,
            {"num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 262_144, "rms_norm_eps": 1e-5},
            rope={**_YARN, **_MINISTRAL_ROPE, "llama_4_scaling_beta": 0.1},
            slides=all_layers,
        ),
        Family(
            "Phi3ForCausalLM",
            "phi3",
            _plain,
            {"max_position_embeddings": 4096, ORIGINAL: 4096, "rms_norm_eps": 1e-5},
            partial=True,
            slides=all_layers,
        ),
        Family(
            "Gemma2ForCausalLM",
            "gemma2",
            _gemma2,
            {
                **_GEMMA,
                "vocab_size": 256_000,
                "max_position_embeddings": 8192,
                "attn_logit_softcapping": 50.0,
                "final_logit_softcapping": 30.0,
            },
            slides=by_pattern(2),
            typed=True,
            biased=True,
            activation="hidden_activation",
        ),
        Family(
            "Gemma3ForCausalLM",
            "gemma3_text",
            _gemma3,
            {**_GEMMA, "vocab_size": 262_208, "max_position_embeddings": 131_072},
            ropes="by type",
            slides=by_pattern(6),
            typed=True,
            biased=True,
            activation="hidden_activation",
        ),
        Family(
            "GptOssForCausalLM",
            "gpt_oss",
            _gpt_oss,
            {
                "num_key_value_heads": 8,
                "head_dim": 64,
                "sliding_window": 128,
                "max_position_embeddings": 131_072,
                "rms_norm_eps": 1e-5,
                "rope_theta": 150_000.0,
                "attention_bias": True,
            },
            rope={**_YARN, "factor": 32.0, "truncate": False, ORIGINAL: 4096},
            slides=by_pattern(2),
            typed=True,
            biased=True,
        ),
        Family(
            "Glm4MoeForCausalLM",
            "glm4_moe",
            _glm4_moe,
            {
                "num_key_value_heads": 8,
                "max_position_embeddings": 131_072,
                "rms_norm_eps": 1e-5,
                "partial_rotary_factor": 0.5,
            },
            partial=True,
            biased=True,
        ),
    )
}
"""Class in transformers -> family."""

COMPOSITES = {
    "Mistral3ForConditionalGeneration": ("mistral", "ministral3"),
    "Gemma3ForConditionalGeneration": ("gemma3_text",),
}
"""Class of a model that also sees pictures -> ``model_type`` of the text decoders within that are served; pictures are
not."""

ARCHITECTURES = (*FAMILIES, *COMPOSITES)
