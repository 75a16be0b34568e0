"""The smallest random model of most tests."""

from __future__ import annotations

from astraea_jax.models.config import ModelConfig

RANDOM = ModelConfig(
    vocab_size=260,
    hidden_size=64,
    intermediate_size=96,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    max_position=256,
    tie_embeddings=False,
    qk_norm=True,
)
