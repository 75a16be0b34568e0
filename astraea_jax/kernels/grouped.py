"""Mixtures of experts as products of blocks of rows, each block with the matrix of one expert.

Every choice of an expert by a token is a row. Rows are sorted by expert and laid into blocks of B, so that shapes are
static and no expert has a capacity: the blocks suffice for whatever the router chooses.

Axis letters: T tokens, k choices of each, E experts, N blocks, B rows of a block, D hidden size, F features of one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from astraea_jax.models.experts import Mixture
from astraea_jax.models.matrix import Matrix
from astraea_jax.models.mlp import activated


class Blocks(NamedTuple):
    """Which expert every block of rows is for. Blocks in use come first, by ascending expert."""

    experts: jax.Array
    """``[N]`` int32; blocks that are not in use repeat the last one in use, so that no weights are read for them."""
    sizes: jax.Array
    """``[N]`` int32, rows in use of each block, which come first; 0 where the block is not in use."""
    used: jax.Array
    """``[]`` int32, the number of blocks in use."""


class Dispatch(NamedTuple):
    """Tokens laid into blocks, and where to find what has become of them."""

    blocks: Blocks
    tokens: jax.Array
    """``[N * B]`` int32, the token of each row; 0 where the row is not in use."""
    rows: jax.Array
    """``[T, k]`` int32, the row of each choice; 0 where its expert is not among these."""
    here: jax.Array
    """``[T, k]`` bool, whether its expert is among these."""


class GroupedProduct(ABC):
    """Products of blocks of rows with the matrices of their experts, on one kind of device."""

    name: str

    def suited(self, mixture: Mixture) -> GroupedProduct:
        """What multiplies for this mixture: this, or another where its matrices are in a form that this cannot read."""
        return self

    @abstractmethod
    def block_rows(self, rows: int, experts: int) -> int:
        """B, for a step with T * k ``rows``."""

    def dispatched(self, index: jax.Array, experts: int) -> Dispatch:
        """:func:`dispatch`, or as a device does it best."""
        return dispatch(index, experts, self.block_rows(index.size, experts))

    @abstractmethod
    def product(self, x: jax.Array, matrix: Matrix, blocks: Blocks) -> jax.Array:
        """Multiply every block of B rows by the matrix of its expert.

        A row's result depends on no other row.

        Args:
            x: ``[N * B, I]``; rows that are not in use are finite.
            matrix: of every expert, ``[E, I, O]``, in any form (:class:`~astraea_jax.models.formats.Format`).
            blocks: the expert of each block.

        Returns:
            ``[N * B, O]`` in the dtype of ``x``, summed in float32; finite but undefined in rows that are not in use.
        """

    def experts(self, x: jax.Array, sent: Dispatch, mixture: Mixture) -> jax.Array:
        """What its expert makes of every row: ``x [T, D] -> [N * B, D]``; undefined in rows that are not in use."""
        blocks = sent.blocks
        size = len(sent.tokens) // len(blocks.experts)
        return fed_forward(
            x[sent.tokens],
            mixture,
            lambda rows, matrix: self.product(rows, matrix, blocks),
            lambda bias: jnp.repeat(bias[blocks.experts], size, axis=0),
        )

    def choices(self, x: jax.Array, sent: Dispatch, mixture: Mixture) -> jax.Array:
        """What its expert makes of every choice: ``x [T, D] -> [T, k, D]``; undefined where it is not among these."""
        return self.experts(x, sent, mixture)[sent.rows]


def fed_forward(
    rows: jax.Array,
    mixture: Mixture,
    product: Callable[[jax.Array, Matrix], jax.Array],
    of_experts: Callable[[jax.Array], jax.Array],
) -> jax.Array:
    """The feed-forward networks of experts.

    Args:
        rows: ``[…, D]``.
        mixture: whose experts they are.
        product: of rows with a matrix of their experts.
        of_experts: from biases ``[E, O]`` to those of the rows.
    """
    gate_up = product(rows, mixture.gate_up)
    if mixture.gate_up_bias is not None:
        gate_up = gate_up + of_experts(mixture.gate_up_bias[...]).astype(gate_up.dtype)
    inner = activated(gate_up, mixture.block, mixture.activation, mixture.experts.activation_limit)
    down = product(inner.astype(rows.dtype), mixture.down)
    return down if mixture.down_bias is None else down + of_experts(mixture.down_bias[...]).astype(down.dtype)


def most_blocks(rows: int, experts: int, size: int) -> int:
    """The most blocks of ``size`` that ``rows`` rows of ``experts`` experts can need."""
    return (rows + min(experts, rows) * (size - 1)) // size


def dispatch(index: jax.Array, experts: int, size: int) -> Dispatch:
    """Lay choices into blocks of ``size`` rows, in the order of tokens within an expert.

    Args:
        index: ``[T, k]`` int32, the expert of each choice; those outside of 0 to ``experts`` have none.
        experts: E.
        size: B.
    """
    chosen = jnp.where((index >= 0) & (index < experts), index, experts).reshape(-1)
    order = jnp.argsort(chosen, stable=True)
    by_expert = chosen[order]
    bounds = jnp.searchsorted(by_expert, jnp.arange(experts + 1), method="compare_all").astype(jnp.int32)
    counts = bounds[1:] - bounds[:-1]
    needed = -(-counts // size)
    ends = jnp.cumsum(needed)
    starts, used = ends - needed, ends[-1]
    block = jnp.arange(most_blocks(len(chosen), experts, size))
    expert = jnp.searchsorted(ends, jnp.minimum(block, used - 1), side="right", method="compare_all")
    expert = jnp.minimum(expert, experts - 1).astype(jnp.int32)  # none is in use if no choice is here
    first = size * (block - starts[expert])  # of an expert's rows, the block's first
    sizes = jnp.where(block < used, jnp.clip(counts[expert] - first, 0, size), 0)
    within = jnp.arange(size)
    source = bounds[expert, None] + first[:, None] + within
    tokens = jnp.where(within < sizes[:, None], order[jnp.minimum(source, len(order) - 1)] // index.shape[1], 0)
    rank = jnp.argsort(order)  # the place of each choice in the order
    of_choice = jnp.minimum(chosen, experts - 1)
    row = size * starts[of_choice] + rank - bounds[of_choice]
    here = chosen < experts
    return Dispatch(
        Blocks(expert, sizes, used),
        tokens.reshape(-1),
        jnp.where(here, row, 0).astype(jnp.int32).reshape(index.shape),
        here.reshape(index.shape),
    )


def mixed(grouped: GroupedProduct, x: jax.Array, index: jax.Array, weights: jax.Array, mixture: Mixture) -> jax.Array:
    """What the experts make of the tokens ``x [T, D]``, summed with ``weights [T, k]``; without the shared ones.

    ``index [T, k]`` counts the experts that ``mixture`` holds; choices of others add nothing. The order of the sum is
    that of a token's choices, so its result depends on no other token.
    """
    grouped = grouped.suited(mixture)
    experts: int = mixture.gate_up.weight.shape[0]
    sent = grouped.dispatched(index, experts)
    made = grouped.choices(x, sent, mixture).astype(jnp.float32)
    parts = jnp.where(sent.here[..., None], made * weights[..., None], 0.0)
    out = parts[:, 0]
    for i in range(1, index.shape[1]):  # in a fixed order
        out = out + parts[:, i]
    return out.astype(x.dtype)
