"""What a decoder is made of, read from a Hugging Face ``config.json``."""

from __future__ import annotations

from dataclasses import dataclass

ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}


class CheckpointError(ValueError):
    """A checkpoint folder cannot be served; the message names the cause and the way out."""


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1 frequency scaling of the rotary embedding (``rope_type: llama3``)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position: int


@dataclass(frozen=True)
class ModelConfig:
    """Shape and constants of a decoder: Llama 3.x, Qwen2.5 or Qwen3 (dense)."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position: int
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    rms_eps: float = 1e-6
    tie_embeddings: bool = False
    qkv_bias: bool = False
    """Qwen2.5 adds a bias to the query, key and value projections."""
    qk_norm: bool = False
    """Qwen3 normalises every query and key head before the rotary embedding."""
