"""Shapes of published models by name, for benchmarks with random weights."""

from __future__ import annotations

from dataclasses import replace

from .config import Experts, ModelConfig
from .families import read_config
from .published_fields import FIELDS
from .rope import Llama3, Rope


def _llama(hidden: int, inner: int, layers: int, heads: int, head_dim: int, factor: float, tied: bool) -> ModelConfig:
    rope = Rope(500_000.0, Llama3(factor, 1.0, 4.0, 8192))
    return ModelConfig(*(128_256, hidden, inner, layers, heads, 8, head_dim, 131_072, rope, 1e-5), tie_embeddings=tied)


def _qwen3(hidden: int, inner: int, layers: int, heads: int, tied: bool) -> ModelConfig:
    return ModelConfig(
        151_936, hidden, inner, layers, heads, 8, 128, 40_960, Rope(1_000_000.0), tie_embeddings=tied, qk_norm=True
    )


_QWEN25 = ModelConfig(151_936, 896, 4864, 24, 14, 2, 64, 32_768, Rope(1_000_000.0), tie_embeddings=True, qkv_bias=True)

_SMOLLM2 = ModelConfig(49_152, 576, 1536, 30, 9, 3, 64, 8192, Rope(100_000.0), tie_embeddings=True)

_TINY_32K = ModelConfig(517, 256, 1024, 2, 4, 2, 32, 32_768, tie_embeddings=True)

_MOE_1B = ModelConfig(
    *(49_152, 1024, 4096, 24, 16, 8, 64, 4096),
    rope=Rope(10_000.0),
    tie_embeddings=True,
    experts=Experts(count=32, chosen=8, size=512),
)

PUBLISHED: dict[str, ModelConfig] = {
    "tiny-32k": _TINY_32K,
    "moe-1b-a0.3b": _MOE_1B,
    "smollm2-135m": _SMOLLM2,
    "llama-3.1-8b": _llama(4096, 14_336, 32, 32, 128, 8.0, False),
    "llama-3.1-70b": _llama(8192, 28_672, 80, 64, 128, 8.0, False),
    "llama-3.2-1b": _llama(2048, 8192, 16, 32, 64, 32.0, True),
    "llama-3.2-3b": _llama(3072, 8192, 28, 24, 128, 32.0, True),
    "qwen2.5-0.5b": _QWEN25,
    "qwen2.5-7b": replace(
        _QWEN25,
        vocab_size=152_064,
        hidden_size=3584,
        intermediate_size=18_944,
        num_layers=28,
        num_heads=28,
        num_kv_heads=4,
        head_dim=128,
        tie_embeddings=False,
    ),
    "qwen3-0.6b": _qwen3(1024, 3072, 28, 16, True),
    "qwen3-1.7b": _qwen3(2048, 6144, 28, 16, True),
    "qwen3-4b": _qwen3(2560, 9728, 36, 32, True),
    "qwen3-8b": _qwen3(4096, 12_288, 36, 32, False),
    "qwen3-32b": _qwen3(5120, 25_600, 64, 64, False),
    **{name: read_config(fields) for name, fields in FIELDS.items()},
}
"""Shapes as published, for benchmarks with random weights; and nobody's, for CPUs: ``tiny-32k`` for
long contexts, and ``moe-1b-a0.3b``."""
