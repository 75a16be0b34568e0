"""Gated feed-forward networks (GLU Variants Improve Transformer, arXiv 2002.05202)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import nnx

from .config import Activation, ModelConfig, joined_block
from .matrix import Forms, Matrix

if TYPE_CHECKING:
    from .operations import Operations


class MLP(nnx.Module):
    """A gated feed-forward network of ``features``.

    Gate and up projection are one product, ``[D, 2 * F]``, in which blocks of the two alternate
    (:func:`.config.joined_block`), so that it can be sharded by features.
    """

    def __init__(self, config: ModelConfig, features: int, dtype: Any, forms: Forms, rngs: nnx.Rngs, name: str = "mlp"):
        d = config.hidden_size
        self.block, self.activation = joined_block(features, config.num_kv_heads), config.activation
        self.gate_up = Matrix((d, 2 * features), dtype, forms(f"{name}.gate_up"), rngs)
        self.down = Matrix((features, d), dtype, forms(f"{name}.down"), rngs, summed=True)

    def divisible(self, devices: int) -> bool:
        """Whether each device's part of its matrices consists of whole blocks that share a scale."""
        return self.gate_up.divisible(devices) and self.down.divisible(devices)

    def __call__(self, x: jax.Array, ops: Operations) -> jax.Array:
        return ops.multiply(activated(ops.multiply(x, self.gate_up), self.block, self.activation), self.down)


def activated(gate_up: jax.Array, block: int, activation: Activation, limit: float | None = None) -> jax.Array:
    """Gate the up projection: ``[T, 2 * F] -> [T, F]``.

    Args:
        gate_up: both projections, in alternate blocks.
        block: features in a block.
        activation: of the gate.
        limit: gpt-oss's clamp (:attr:`.config.Experts.activation_limit`).
    """
    both = gate_up.reshape(gate_up.shape[0], -1, 2, block)
    gate, up = both[:, :, 0], both[:, :, 1]
    if limit is not None:
        gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
        inner = (up + 1) * gate * jax.nn.sigmoid(1.702 * gate)
    else:
        inner = (jax.nn.silu(gate) if activation == "silu" else jax.nn.gelu(gate, approximate=True)) * up
    return inner.reshape(gate_up.shape[0], -1)
