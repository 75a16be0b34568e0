"""Tiny random checkpoints as transformers itself writes them, and what it makes of a prompt (needs torch).

python tests/support/variants.py        writes tests/parity/goldens/ again
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

GOLDENS = Path(__file__).parents[1] / "parity" / "goldens"
PROMPT = 40
TOKENS = 64
VOCABULARY = 160
DIFFERENT = 10
"""Tokens among them at least."""
SPREAD = 0.3
"""Of random weights."""


@dataclass(frozen=True)
class Variant:
    name: str
    architecture: str
    heads: int
    kv_heads: int
    tied: bool
    dtype: str = "float32"
    shard_bytes: int | None = None
    fields: Mapping[str, Any] = field(default_factory=dict)
    """Of its configuration, beside those that all have."""
    sees: bool = False
    """Whether it is the text decoder in a model for pictures, too."""
    max_context: int | None = None
    """To serve it with; None: the model's limit."""
    golden: bool = False
    """Whether what transformers makes of it is kept in tests/parity/goldens."""

    @property
    def family(self) -> str:
        """Name of the class that a ``config.json`` names."""
        return f"{self.architecture}For{'ConditionalGeneration' if self.sees else 'CausalLM'}"


def _yarn(**more: Any) -> dict[str, Any]:
    rope = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 8.0, "original_max_position_embeddings": 16}
    return {"rope_parameters": {**rope, **more}}


def _longrope(head_dim: int, original: int, **more: Any) -> dict[str, Any]:
    factors = {f"{name}_factor": [1 + step * i for i in range(head_dim // 2)] for name, step in _STEPS.items()}
    rope = {"rope_type": "longrope", "rope_theta": 10_000.0, **factors, **more}
    return {"rope_parameters": rope, "original_max_position_embeddings": original}


_STEPS = {"short": 0.25, "long": 1.5}
_LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_LLAMA = {"rope_scaling": {**_LLAMA3, "original_max_position_embeddings": 32, "rope_theta": 10_000.0}}
_THREE = {"num_hidden_layers": 3}
_GEMMA = {
    **_THREE,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "sliding_window": 7,
    "query_pre_attn_scalar": 24,
}
_GEMMA_ROPES = {
    "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 100_000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1_000.0},
}
_EXPERTS = {**_THREE, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_GLM = {
    **_THREE,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
    "routed_scaling_factor": 1.5,
    "n_shared_experts": 2,
}
_GPT_OSS = {**_THREE, "num_local_experts": 6, "num_experts_per_tok": 2, "sliding_window": 9}

VARIANTS = (
    Variant("llama-gqa4-sharded", "Llama", 4, 1, False, shard_bytes=60_000, fields=_LLAMA, golden=True),
    Variant("llama-gqa1-tied-f16", "Llama", 4, 4, True, dtype="float16", fields=_LLAMA, golden=True),
    Variant(
        "llama-biases-linear",
        "Llama",
        4,
        2,
        False,
        fields={"attention_bias": True, "rope_parameters": {**_GEMMA_ROPES["full_attention"]}},
    ),
    Variant("qwen2-gqa8", "Qwen2", 8, 1, False, dtype="bfloat16", golden=True),
    Variant("qwen2-gqa1-tied", "Qwen2", 4, 4, True, golden=True),
    Variant(
        "qwen2-window",
        "Qwen2",
        4,
        2,
        False,
        fields={**_THREE, "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    ),
    Variant("qwen3-gqa4-tied", "Qwen3", 8, 2, True, golden=True),
    Variant("qwen3-gqa8-sharded-bf16", "Qwen3", 8, 1, False, dtype="bfloat16", shard_bytes=40_000, golden=True),
    Variant("qwen3-yarn-biases", "Qwen3", 4, 2, False, fields={**_yarn(), "attention_bias": True}),
    Variant("mistral-window", "Mistral", 4, 2, False, fields={"sliding_window": 7}),
    Variant("mistral-f16", "Mistral", 4, 1, False, dtype="float16", fields={"sliding_window": None}),
    Variant("mistral3-pictures", "Mistral3", 4, 2, False, fields={"sliding_window": None}, sees=True),
    Variant(
        "ministral-mixed-windows",
        "Ministral",
        4,
        2,
        True,
        fields={"sliding_window": 9, "layer_types": ["full_attention", "sliding_attention"]},
    ),
    Variant(
        "ministral3-growth",
        "Ministral3",
        4,
        2,
        True,
        fields=_yarn(mscale=1.0, mscale_all_dim=1.0, llama_4_scaling_beta=0.1),
        golden=True,
    ),
    Variant(
        "ministral3-mscale-bf16",
        "Ministral3",
        4,
        1,
        False,
        dtype="bfloat16",
        fields=_yarn(beta_fast=4.0, mscale=1.0, mscale_all_dim=0.0, llama_4_scaling_beta=0.0),
    ),
    Variant("phi3-window", "Phi3", 4, 2, False, fields={"sliding_window": 11}),
    Variant("phi3-short", "Phi3", 4, 2, False, fields=_longrope(8, 128), max_context=128),
    Variant(
        "phi3-long-partial-tied",
        "Phi3",
        4,
        2,
        True,
        fields=_longrope(6, 32, partial_rotary_factor=0.75),
        golden=True,
    ),
    Variant("gemma2-caps", "Gemma2", 4, 2, True, fields=_GEMMA),
    Variant(
        "gemma3-windows-ropes", "Gemma3", 4, 1, True, fields={**_GEMMA, "rope_parameters": _GEMMA_ROPES}, golden=True
    ),
    Variant("gemma3-pictures-bf16", "Gemma3", 4, 2, True, dtype="bfloat16", fields=_GEMMA, sees=True),
    Variant("qwen3moe-normed", "Qwen3Moe", 4, 2, False, fields={**_EXPERTS, "norm_topk_prob": True}, golden=True),
    Variant(
        "qwen3moe-dense-layers-bf16",
        "Qwen3Moe",
        8,
        1,
        True,
        dtype="bfloat16",
        fields={**_EXPERTS, "num_hidden_layers": 4, "mlp_only_layers": [1], "decoder_sparse_step": 2},
    ),
    Variant("gptoss-sinks", "GptOss", 4, 2, False, fields={**_GPT_OSS, **_yarn(truncate=False)}, golden=True),
    Variant("gptoss-bf16", "GptOss", 8, 1, False, dtype="bfloat16", fields={**_GPT_OSS, "num_hidden_layers": 2}),
    Variant(
        "glm4moe-norms-biases",
        "Glm4Moe",
        4,
        2,
        False,
        fields={**_GLM, "use_qk_norm": True, "attention_bias": True},
        golden=True,
    ),
    Variant(
        "glm4moe-groups",
        "Glm4Moe",
        4,
        1,
        False,
        fields={**_GLM, "n_group": 4, "topk_group": 2, "first_k_dense_replace": 2},
    ),
)


def write(variant: Variant, folder: Path, seed: int = 0) -> None:
    """A checkpoint by transformers, and ``golden.npz``: prompt, its logits ``[P, V]``, 64 greedy tokens.

    Weights are drawn large enough that the likeliest token leads clearly all along; a seed is skipped until it does,
    since a near tie could go either way for reasons of rounding alone.
    """
    import torch

    while True:
        model = _model(variant, seed)
        prompt = torch.randint(VOCABULARY, (1, PROMPT))
        with torch.inference_mode():
            text = model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),  # else it hides tokens that look like padding
                max_new_tokens=TOKENS,
                min_new_tokens=TOKENS,
                do_sample=False,
                pad_token_id=0,
                eos_token_id=None,
            )
            logits = model(text).logits[0]
        best = logits[PROMPT - 1 : -1].topk(2).values
        if (best[:, 0] - best[:, 1]).min() > 1e-2 and len(set(text[0, PROMPT:].tolist())) > DIFFERENT:
            break
        seed += 1000
    options = {} if variant.shard_bytes is None else {"max_shard_size": variant.shard_bytes}
    model.to(getattr(torch, variant.dtype)).save_pretrained(folder, **options)
    np.savez_compressed(
        folder / "golden.npz",
        prompt=prompt[0].numpy().astype(np.int32),
        logits=logits[:PROMPT].numpy(),
        tokens=text[0, PROMPT:].numpy().astype(np.int32),
        max_context=variant.max_context or 0,
    )


def _model(variant: Variant, seed: int) -> Any:
    """A random model with weights as they are stored, which it computes with in float32."""
    import torch
    import transformers

    torch.manual_seed(seed)
    model = getattr(transformers, variant.family)._from_config(_config(variant), attn_implementation="eager").eval()
    centre = 0.0 if variant.architecture.startswith("Gemma") else 1.0
    for name, weight in [*model.named_parameters(), *model.named_buffers()]:  # ones and zeros would hide a mix-up
        if "norm" in name:
            torch.nn.init.normal_(weight, centre, SPREAD)
        elif name.endswith(("bias", "sinks")) or "experts" in name or ".gate." in name or ".router." in name:
            torch.nn.init.normal_(weight, 0.0, SPREAD)
    if variant.architecture.startswith("Gemma"):  # else scaled embeddings drown the rest, and a token follows itself
        model.get_input_embeddings().weight.data *= 0.1
        model.get_decoder().norm.weight.data += 30
    for weight in model.parameters():
        weight.data = weight.data.to(getattr(torch, variant.dtype)).float()
    return model


def _config(variant: Variant) -> Any:
    """Its configuration in transformers."""
    import transformers

    shape = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": variant.heads,
        "num_key_value_heads": variant.kv_heads,
        "head_dim": 8,
        "max_position_embeddings": 256,
        "tie_word_embeddings": variant.tied,
        "initializer_range": SPREAD,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    if not any(name.startswith("rope_") for name in variant.fields) and variant.architecture != "Gemma3":
        shape["rope_theta"] = 10_000.0
    fields = {**shape, **variant.fields}
    if not variant.sees:
        name = "Gemma3Text" if variant.architecture == "Gemma3" else variant.architecture
        return getattr(transformers, f"{name}Config")(**fields)
    text = {"Mistral3": "mistral", "Gemma3": "gemma3_text"}[variant.architecture]
    eyes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    kind = {"Mistral3": {"model_type": "pixtral", "head_dim": 8}, "Gemma3": {"model_type": "siglip_vision_model"}}
    return getattr(transformers, f"{variant.architecture}Config")(
        text_config={"model_type": text, **fields},
        vision_config={**eyes, **kind[variant.architecture], "image_size": 28, "patch_size": 14},
        tie_word_embeddings=variant.tied,
    )


if __name__ == "__main__":
    if not sys.argv[1:]:
        shutil.rmtree(GOLDENS, ignore_errors=True)
    for one in VARIANTS:
        if one.golden and (not sys.argv[1:] or one.name in sys.argv[1:]):
            write(one, GOLDENS / one.name)
            print(one.name)  # noqa: T201
