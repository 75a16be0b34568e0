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
from .mlp import MLP
from .rowwise import rowwise

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
        self.down = Matrix((e.count, e.size, d), dtype, forms("mlp.down"), rngs, summed=True)
        self.correction = nnx.Param(jnp.zeros(e.count, jnp.float32)) if e.corrected else None
        self.router_bias = nnx.Param(jnp.zeros(e.count, dtype)) if e.biases else None
        self.gate_up_bias = nnx.Param(jnp.zeros((e.count, 2 * e.size), dtype)) if e.biases else None
        self.down_bias = nnx.Param(jnp.zeros((e.count, d), dtype)) if e.biases else None
        self.shared = MLP(config, e.shared_size, dtype, forms, rngs, "mlp.shared") if e.shared_size else None

    def divisible(self, devices: int) -> bool:
        """Whether devices can have whole experts, or parts of all that consist of whole blocks that share a scale."""
        whole = self.experts.count % devices == 0
        return whole or (self.gate_up.divisible(devices) and self.down.divisible(devices))

    def routed(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Experts ``[T, k]`` int32 of tokens ``x [T, D]``, and their weights ``[T, k]`` float32."""
        logits = rowwise(x, self.router[...])
        if self.router_bias is not None:
            logits = logits + self.router_bias[...]
        correction = None if self.correction is None else self.correction[...]
        return chosen_experts(self.experts, logits, correction)

    def __call__(self, x: jax.Array, ops: Operations) -> jax.Array:
        assert ops.mixed is not None, "a model with experts needs an operation for them"
        return ops.mixed(x, *self.routed(x), self)


Mixed = Callable[[jax.Array, jax.Array, jax.Array, Mixture], jax.Array]
"""``mixed(x [T, D], experts [T, k], weights [T, k], mixture) -> [T, D]``: what the experts make of the tokens, summed
with the weights, and the shared ones."""


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
        return index, _softmax(best) * experts.scale
    scores = _softmax(logits) if experts.scores == "softmax" else jax.nn.sigmoid(logits)
    rank = scores if correction is None else scores + correction
    if experts.groups > 1:
        grouped = rank.reshape(len(rank), experts.groups, -1)
        best_two = jax.lax.top_k(grouped, 2)[0].sum(-1)
        _, kept = jax.lax.top_k(best_two, experts.chosen_groups)
        open_ = jnp.zeros(best_two.shape, bool).at[jnp.arange(len(rank))[:, None], kept].set(True)
        rank = jnp.where(open_[:, :, None], grouped, -jnp.inf).reshape(rank.shape)
    weights, index = jax.lax.top_k(rank, experts.chosen)
    if rank is not scores:
        weights = jnp.take_along_axis(scores, index, axis=1)
    if experts.normalized:
        weights = weights / (_folded(jnp.add, weights) + (1e-20 if experts.scores == "sigmoid" else 0.0))
    return index, weights * experts.scale


def _softmax(logits: jax.Array) -> jax.Array:
    """As jax.nn.softmax, which XLA computes in ways that depend on T, and would round otherwise for some."""
    powers = jnp.exp(logits - _folded(jnp.maximum, logits))
    return powers / _folded(jnp.add, powers)


def _folded(join: Callable[[jax.Array, jax.Array], jax.Array], numbers: jax.Array) -> jax.Array:
    """``[T, n] -> [T, 1]``: halves are joined until one is left."""
    while (n := numbers.shape[-1]) > 1:
        half = n // 2
        joined = join(numbers[:, :half], numbers[:, half : 2 * half])
        numbers = jnp.concatenate([joined, numbers[:, 2 * half :]], axis=1)
    return numbers
