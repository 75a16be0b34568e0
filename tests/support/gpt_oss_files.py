"""A tiny random gpt-oss as OpenAI publishes it, its experts in MXFP4, beside the same with wide experts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file
from support.narrow_writers import mxfp4

FIELDS: dict[str, Any] = {
    "architectures": ["GptOssForCausalLM"],
    "model_type": "gpt_oss",
    "vocab_size": 260,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "experts_per_token": 2,
    "sliding_window": 9,
    "layer_types": ["sliding_attention", "full_attention"],
    "max_position_embeddings": 256,
    "initial_context_length": 32,
    "rope_theta": 150000.0,
    "rope_scaling": {
        "rope_type": "yarn",
        "factor": 8.0,
        "original_max_position_embeddings": 32,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
    },
    "attention_bias": True,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "swiglu_limit": 7.0,
    "tie_word_embeddings": False,
    "eos_token_id": None,
    "pad_token_id": 0,
}
QUANTIZED = {
    "quant_method": "mxfp4",
    "modules_to_not_convert": [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ],
}


def write_gpt_oss(narrow: Path, again: Path, seed: int = 0) -> None:
    """Write a folder with ``*_blocks`` and ``*_scales``, and one with the weights that these stand for.

    Weights are large enough that greedy choices differ clearly; all but the experts are bfloat16.
    """
    rng, d, f, experts = np.random.default_rng(seed), 64, FIELDS["intermediate_size"], FIELDS["num_local_experts"]

    def drawn(*shape: int, spread: float = 0.16) -> np.ndarray:
        return (spread * rng.standard_normal(shape)).astype(jnp.bfloat16)

    common = {"model.embed_tokens.weight": drawn(260, d), "lm_head.weight": drawn(260, d)}
    common["model.norm.weight"] = np.ones(d, jnp.bfloat16)
    fewer: dict[str, np.ndarray] = {}
    wide: dict[str, np.ndarray] = {}
    for i in range(FIELDS["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            common[f"{layer}.{norm}.weight"] = np.ones(d, jnp.bfloat16)
        for name, outputs, inputs in (("q", 64, d), ("k", 32, d), ("v", 32, d), ("o", d, 64)):
            common[f"{layer}.self_attn.{name}_proj.weight"] = drawn(outputs, inputs)
            common[f"{layer}.self_attn.{name}_proj.bias"] = drawn(outputs)
        common[f"{layer}.self_attn.sinks"] = drawn(4, spread=1.0)
        common[f"{layer}.mlp.router.weight"] = drawn(experts, d)
        common[f"{layer}.mlp.router.bias"] = drawn(experts)
        for name, outputs, inputs in (("gate_up_proj", 2 * f, d), ("down_proj", d, f)):
            expert = f"{layer}.mlp.experts.{name}"
            common[f"{expert}_bias"] = drawn(experts, outputs)
            blocks, scales, weight = mxfp4(drawn(experts, outputs, inputs).astype(np.float32))
            fewer |= {f"{expert}_blocks": blocks, f"{expert}_scales": scales}
            wide[expert] = weight.swapaxes(1, 2)
    for folder, own, more in ((narrow, fewer, {"quantization_config": QUANTIZED}), (again, wide, {})):
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: np.ascontiguousarray(array) for name, array in (common | own).items()}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps({**FIELDS, "dtype": "bfloat16", **more}))
