"""Mixtures of experts: which experts see a token, and with what weights.

Axis letters: T tokens, D hidden size, E experts, k experts that see a token, F features of one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import nnx

from .config import Experts, ModelConfig, joined_block
from .matrix import Forms, Matrix
from .mlp import MLP, activated
from .product import product

if TYPE_CHECKING:
    from .operations import Operations


class Mixture(nnx.Module):
    """Experts that take the place of a layer's feed-forward network.

    Gate and up projection of an expert are joined as in :class:`.mlp.MLP`.
    """

    def __init__(self, config: ModelConfig, dtype: Any, forms: Forms, rngs: nnx.Rngs):
        assert config.experts is not None
        self.experts = e = config.experts
        self.activation = config.activation
        d = config.hidden_size
        self.block = joined_block(e.size, config.num_kv_heads)
        self.router = nnx.Param(0.02 * jax.random.normal(rngs.params(), (d, e.count), dtype))
        self.gate_up = Matrix((e.count, d, 2 * e.size), dtype, forms("mlp.gate_up"), rngs)
        self.down = Matrix((e.count, e.size, d), dtype, forms("mlp.down"), rngs)
        self.correction = nnx.Param(jnp.zeros(e.count, jnp.float32)) if e.corrected else None
        self.router_bias = nnx.Param(jnp.zeros(e.count, dtype)) if e.biases else None
        self.gate_up_bias = nnx.Param(jnp.zeros((e.count, 2 * e.size), dtype)) if e.biases else None
        self.down_bias = nnx.Param(jnp.zeros((e.count, d), dtype)) if e.biases else None
        self.shared = MLP(config, e.shared_size, dtype, forms, rngs, "mlp.shared") if e.shared_size else None

    def routed(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Experts ``[T, k]`` int32 of tokens ``x [T, D]``, and their weights ``[T, k]`` float32."""
        logits = product(x, self.router[...])
        if self.router_bias is not None:
            logits = logits + self.router_bias[...]
        return chosen_experts(self.experts, logits, None if self.correction is None else self.correction[...])

    def __call__(self, x: jax.Array, ops: Operations) -> jax.Array:
        out = ops.mixed(x, *self.routed(x), self)
        return out if self.shared is None else out + self.shared(x, ops)


Mixed = Callable[[jax.Array, jax.Array, jax.Array, Mixture], jax.Array]
"""``mixed(x [T, D], experts [T, k], weights [T, k], mixture) -> [T, D]``: what the experts make of the tokens, summed
with the weights; without the shared ones."""


def chosen_experts(experts: Experts, logits: jax.Array, correction: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """Choose k experts for every row of the router's ``logits [T, E]`` float32, by lower index where they tie.

    Args:
        experts: how they are chosen and weighed.
        logits: of the router.
        correction: ``[E]``, added to scores for the choice only.

    Returns:
        Experts ``[T, k]`` int32 and their weights ``[T, k]`` float32.
    """
    if experts.scores == "softmax of chosen":
        best, index = jax.lax.top_k(logits, experts.chosen)
        return index, jax.nn.softmax(best, axis=-1) * experts.scale
    scores = jax.nn.softmax(logits, axis=-1) if experts.scores == "softmax" else jax.nn.sigmoid(logits)
    rank = scores if correction is None else scores + correction
    if experts.groups > 1:
        grouped = rank.reshape(len(rank), experts.groups, -1)
        best_two = jax.lax.top_k(grouped, 2)[0].sum(-1)
        _, kept = jax.lax.top_k(best_two, experts.chosen_groups)
        open_ = jnp.zeros(best_two.shape, bool).at[jnp.arange(len(rank))[:, None], kept].set(True)
        rank = jnp.where(open_[:, :, None], grouped, -jnp.inf).reshape(rank.shape)
    _, index = jax.lax.top_k(rank, experts.chosen)
    weights = jnp.take_along_axis(scores, index, axis=1)
    if experts.normalized:
        weights = weights / (weights.sum(-1, keepdims=True) + (1e-20 if experts.scores == "sigmoid" else 0.0))
    return index, weights * experts.scale


def mixed(x: jax.Array, index: jax.Array, weights: jax.Array, mixture: Mixture) -> jax.Array:
    """See :data:`Mixed`; every expert computes every token."""
    share = jnp.zeros((len(x), mixture.experts.count), jnp.float32)
    share = share.at[jnp.arange(len(x))[:, None], index].set(weights)
    out = jnp.zeros(x.shape, jnp.float32)
    for e in range(mixture.experts.count):
        gate_up = product(x, mixture.gate_up.weight[e])
        if mixture.gate_up_bias is not None:
            gate_up = gate_up + mixture.gate_up_bias[e]
        inner = activated(gate_up, mixture.block, mixture.activation, mixture.experts.activation_limit)
        down = product(inner.astype(x.dtype), mixture.down.weight[e])
        if mixture.down_bias is not None:
            down = down + mixture.down_bias[e]
        out = out + share[:, e, None] * down
    return out.astype(x.dtype)
