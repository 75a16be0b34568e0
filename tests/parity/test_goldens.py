"""Checkpoints and answers written by transformers once (tests/support/variants.py), without torch."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.parity import check_logits, check_tokens

FOLDERS = sorted(path for path in Path(__file__).with_name("goldens").iterdir() if path.is_dir())


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: path.name)
def test_prefill_logits(folder):
    check_logits(folder)


@pytest.mark.serves("native", "tested", "windows", "sinks", "experts", "norms of heads in float32")
@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: path.name)
async def test_greedy_tokens_in_a_batch(folder):
    await check_tokens(folder)


@pytest.mark.serves("reference", "tested", "windows", "sinks", "experts", "norms of heads in float32")
@pytest.mark.parametrize("name", ["gemma3-windows-ropes", "glm4moe-norms-biases", "gptoss-sinks"])
async def test_greedy_tokens_of_the_reference(name):
    await check_tokens(Path(__file__).with_name("goldens") / name, attention="reference")


def test_the_goldens_cover_what_is_served():
    text = " ".join(folder.name for folder in FOLDERS)
    for word in (
        *("llama", "qwen2", "qwen3", "ministral3", "phi3", "gemma3", "qwen3moe", "gptoss", "glm4moe"),
        *("gqa1", "gqa4", "gqa8", "tied", "sharded", "f16", "bf16", "windows", "sinks", "long", "partial"),
    ):
        assert word in text
