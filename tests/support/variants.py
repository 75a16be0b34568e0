"""Tiny random checkpoints as transformers itself writes them, and what it makes of a prompt (needs torch).

python tests/support/variants.py        writes tests/parity/goldens/ again
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np

GOLDENS = Path(__file__).parents[1] / "parity" / "goldens"
PROMPT = 40
TOKENS = 64
VOCABULARY = 160


@dataclass(frozen=True)
class Variant:
    name: str
    architecture: str
    heads: int
    kv_heads: int
    tied: bool
    dtype: str = "float32"
    shard_bytes: int | None = None


VARIANTS = (
    Variant("llama-gqa4-sharded", "Llama", 4, 1, tied=False, shard_bytes=60_000),
    Variant("llama-gqa1-tied-f16", "Llama", 4, 4, tied=True, dtype="float16"),
    Variant("qwen2-gqa8", "Qwen2", 8, 1, tied=False, dtype="bfloat16"),
    Variant("qwen2-gqa1-tied", "Qwen2", 4, 4, tied=True),
    Variant("qwen3-gqa4-tied", "Qwen3", 8, 2, tied=True),
    Variant("qwen3-gqa8-sharded-bf16", "Qwen3", 8, 1, tied=False, dtype="bfloat16", shard_bytes=40_000),
)


def write(variant: Variant, folder: Path, seed: int = 0) -> None:
    """A checkpoint by transformers, and ``golden.npz``: prompt, its logits ``[P, V]``, 64 greedy tokens.

    Weights are drawn large enough that the likeliest token leads clearly all along; a seed is skipped until it does,
    since a near tie could go either way for reasons of rounding alone.
    """
    import torch
    import transformers

    config = getattr(transformers, f"{variant.architecture}Config")(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=variant.heads,
        num_key_value_heads=variant.kv_heads,
        head_dim=8,
        max_position_embeddings=256,
        tie_word_embeddings=variant.tied,
        initializer_range=0.3,
        rope_theta=10_000.0,
        **_scaled_rope(variant),
    )
    while True:
        torch.manual_seed(seed)
        model = getattr(transformers, f"{variant.architecture}ForCausalLM")(config).eval()
        for name, weight in model.named_parameters():
            if name.endswith("bias") or "norm" in name:  # ones and zeros would hide a mix-up
                torch.nn.init.normal_(weight, 0.0 if name.endswith("bias") else 1.0, 0.3)
        for weight in model.parameters():  # rounded as stored, computed in float32
            weight.data = weight.data.to(getattr(torch, variant.dtype)).float()
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
        if (best[:, 0] - best[:, 1]).min() > 1e-2:
            break
        seed += 1000
    options = {} if variant.shard_bytes is None else {"max_shard_size": variant.shard_bytes}
    model.to(getattr(torch, variant.dtype)).save_pretrained(folder, **options)
    np.savez_compressed(
        folder / "golden.npz",
        prompt=prompt[0].numpy().astype(np.int32),
        logits=logits[:PROMPT].numpy(),
        tokens=text[0, PROMPT:].numpy().astype(np.int32),
    )


def _scaled_rope(variant: Variant) -> dict[str, object]:
    if variant.architecture != "Llama":
        return {}
    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    return {"rope_scaling": {**rope, "original_max_position_embeddings": 32, "rope_theta": 10_000.0}}


if __name__ == "__main__":
    shutil.rmtree(GOLDENS, ignore_errors=True)
    for one in VARIANTS:
        write(one, GOLDENS / one.name)
        print(one.name)  # noqa: T201
