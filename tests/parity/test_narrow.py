"""Checkpoints in fewer bits answer as transformers does with the weights that they stand for."""

from __future__ import annotations

import pytest
from support.gpt_oss_files import write_gpt_oss
from support.narrow_writers import WRITERS, write_narrow
from support.parity import check_logits, check_tokens

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("default"),  # theirs are not ours to turn into errors
]


def ask(again, narrow):
    """Put the golden answers of transformers to the wide weights beside the narrow ones; False: a near tie."""
    import numpy as np
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(again, dtype=torch.float32).eval()
    prompt = torch.from_numpy(np.random.default_rng(0).integers(160, size=(1, 40)))
    with torch.inference_mode():
        text = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=64,
            min_new_tokens=64,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=None,
        )
        logits = model(text).logits[0]
    best = logits[39:-1].topk(2).values
    np.savez(
        narrow / "golden.npz",
        prompt=prompt[0].numpy().astype(np.int32),
        logits=logits[:40].numpy(),
        tokens=text[0, 40:].numpy().astype(np.int32),
    )
    return bool((best[:, 0] - best[:, 1]).min() > 1e-2)


@pytest.mark.parametrize("name", WRITERS)
async def test_logits_and_tokens(name, tmp_path):
    import torch
    import transformers

    config = transformers.Qwen2Config(
        vocab_size=160,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.3,
        tie_word_embeddings=False,
    )
    for seed in range(20):
        wide, narrow, again = (tmp_path / f"{kind} {seed}" for kind in ("wide", "narrow", "again"))
        torch.manual_seed(seed)
        transformers.Qwen2ForCausalLM(config).save_pretrained(wide)
        write_narrow(wide, narrow, again, name)
        if ask(again, narrow):
            break
    check_logits(narrow)
    await check_tokens(narrow)


async def test_gpt_oss_as_it_is_published(tmp_path):
    for seed in range(20):
        narrow, again = (tmp_path / f"{kind} {seed}" for kind in ("narrow", "again"))
        write_gpt_oss(narrow, again, seed)
        if ask(again, narrow):
            break
    check_logits(narrow)
    await check_tokens(narrow)
