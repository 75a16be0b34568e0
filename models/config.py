"""Shapes and constants of decoders."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from .rope import Rope

PLAIN_ROPE = Rope()

Activation = Literal["silu", "gelu"]
"""Of the gate projection; gelu in its form with tanh."""


class CheckpointError(ValueError):
    """A checkpoint folder cannot be served; the message names the cause and what to do."""


@dataclass(frozen=True)
class Experts:
    """The mixture of experts that takes the place of a layer's feed-forward network."""

    count: int
    chosen: int
    """Experts that see a token."""
    size: int
    """Features of one expert."""
    scores: Literal["softmax", "softmax of chosen", "sigmoid"] = "softmax"
    """What weighs the chosen ones: a softmax over all experts or over the chosen only, or a sigmoid of each."""
    normalized: bool = True
    """Whether weights are divided by their sum."""
    scale: float = 1.0
    """Factor on all weights."""
    corrected: bool = False
    """Whether a bias of each expert is added to its score, for the choice only (arXiv 2412.19437, section 2.1.2)."""
    groups: int = 1
    """Groups that experts are in, one after the other."""
    chosen_groups: int = 1
    """Groups that experts are chosen from: those whose best two sum to most."""
    shared_size: int = 0
    """Features of a feed-forward network beside the experts, which sees every token; 0: there is none."""
    biases: bool = False
    """Whether the router and the experts have biases."""
    activation_limit: float | None = None
    """gpt-oss clamps gate and up projection to it, and multiplies ``gate * sigmoid(1.702 * gate)`` by up + 1."""
    dense_layers: tuple[int, ...] = ()
    """Layers that have a feed-forward network instead."""


@dataclass(frozen=True)
class LayerKind:
    """What distinguishes one layer of a model from another."""

    window: int | None
    """Keys that a query sees, its own included; None: all."""
    rope: Rope
    has_experts: bool


@dataclass(frozen=True)
class ModelConfig:
    """Shape and constants of a decoder."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position: int
    rope: Rope = PLAIN_ROPE
    rms_eps: float = 1e-6
    tie_embeddings: bool = False
    qkv_bias: bool = False
    """Whether the query, key and value projections have biases (Qwen2.5)."""
    o_bias: bool = False
    """Whether the output projection of attention has one."""
    qk_norm: bool = False
    """Whether every query and key head is normalised before the rotary embedding (Qwen3)."""
    window: int | None = None
    """Keys that a query sees in the layers of ``sliding``, its own included."""
    sliding: tuple[int, ...] = ()
    """Layers with a window."""
    window_rope: Rope | None = None
    """The rotary embedding of layers with a window; None: that of all others."""
    sinks: bool = False
    """Whether every head has a logit that takes part in the softmax and adds nothing (gpt-oss)."""
    attention_scale: float | None = None
    """Factor on attention scores; None: ``head_dim ** -0.5``."""
    score_cap: float | None = None
    """Attention scores become ``cap * tanh(score / cap)``."""
    query_growth: tuple[float, int] | None = None
    """``(beta, original)``: queries are multiplied by ``1 + beta * ln(1 + floor(position / original))`` (Llama 4)."""
    logit_cap: float | None = None
    """Logits become ``cap * tanh(logit / cap)``."""
    activation: Activation = "silu"
    float32_norms: bool = False
    """Whether norms are scaled in float32, before they are rounded to the dtype of activations."""
    norm_offset: float = 0.0
    """What norms add to their scales in checkpoints: 1 in Gemma's. It is added when weights are read."""
    sandwich_norms: bool = False
    """Whether what attention and feed-forward network return is normalised too (Gemma)."""
    embedding_scale: float = 1.0
    """Factor on embeddings, rounded to the dtype of weights."""
    experts: Experts | None = None

    @property
    def layer_kinds(self) -> tuple[LayerKind, ...]:
        """The kind of every layer."""
        return tuple(
            LayerKind(
                self.window if i in self.sliding else None,
                (self.window_rope or self.rope) if i in self.sliding else self.rope,
                self.experts is not None and i not in self.experts.dense_layers,
            )
            for i in range(self.num_layers)
        )

    @property
    def ffn_block(self) -> int:
        """Consecutive features of gate or up projection in the matrix that joins them; see :func:`joined_block`."""
        return joined_block(self.intermediate_size, self.num_kv_heads)

    @property
    def layer_weights(self) -> int:
        """Number of weights in the matrices of all layers."""
        d = self.hidden_size
        attention = d * self.head_dim * (2 * self.num_heads + 2 * self.num_kv_heads)
        dense = 3 * d * self.intermediate_size
        if self.experts is None:
            return self.num_layers * (attention + dense)
        mixed = d * self.experts.count + 3 * d * (self.experts.count * self.experts.size + self.experts.shared_size)
        return sum(attention + (mixed if kind.has_experts else dense) for kind in self.layer_kinds)

    @property
    def active_weights(self) -> int:
        """Number of weights in the matrices of all layers that one token is multiplied by."""
        if self.experts is None:
            return self.layer_weights
        layers = sum(kind.has_experts for kind in self.layer_kinds)
        unused = self.experts.count - self.experts.chosen
        return self.layer_weights - layers * unused * 3 * self.hidden_size * self.experts.size

    @property
    def table_weights(self) -> int:
        """Number of weights in the embedding and the output projection, which may be the same matrix."""
        return (1 if self.tie_embeddings else 2) * self.vocab_size * self.hidden_size


def joined_block(features: int, most_devices: int) -> int:
    """Consecutive features of gate or up projection in the matrix that joins them.

    It is 128, the lanes of a TPU, or the largest divisor that fits each device's share in any mesh that divides the
    model, of ``most_devices`` at most.
    """
    return math.gcd(features // math.gcd(features, most_devices), 128)
