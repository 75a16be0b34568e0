"""Grouped products in jax.numpy: the reference, and the CPU's kernel.

The weight of an expert is copied, as float32 in the processor's cache, and multiplied by the rows of its block: few
rows one at a time, since XLA reads a weight fastest for a single row, and many at once. Both ways sum in the order of
the inputs, so a row's result is the same, bit for bit, whatever else is in the step. With 2 to 63 rows XLA would sum in
another order.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from astraea_jax.models.experts import Mixture
from astraea_jax.models.matrix import Matrix
from astraea_jax.models.product import widened

from .grouped import Blocks, Dispatch, GroupedProduct, fed_forward

FEW = 8
"""Rows of a block where experts see few rows."""
TILE, MORE = 64, 32
"""The fewest rows that are multiplied at once, and how many more the next larger product has, at least."""
ALONE = 12
"""Rows up to which one at a time is faster than :data:`TILE` at once."""
MOST = 512
"""Rows of the largest block."""
DEPTH = 512
"""Inputs that are summed at once, at most: XLA's CPU library splits longer sums."""
WIDTH = 64
"""Outputs are multiplied in multiples of it: XLA's CPU library sums others in another order."""
COPIED = 2**21
"""Numbers of a weight that are copied at once: 8 MiB."""


class GroupedReference(GroupedProduct):
    """A loop over the blocks in use."""

    name = "reference"

    def block_rows(self, rows: int, experts: int) -> int:
        """One where it is likely that no expert sees two rows; enough for most experts where they see many."""
        if rows <= experts // 2:
            return 1
        if rows <= 2 * FEW * experts:
            return FEW
        return min(MOST, -(-5 * rows // (4 * experts * TILE)) * TILE)

    def product(self, x: jax.Array, matrix: Matrix, blocks: Blocks) -> jax.Array:
        size = len(x) // len(blocks.experts)

        def block(n: jax.Array, out: jax.Array) -> jax.Array:
            rows = jax.lax.dynamic_slice_in_dim(x, n * size, size)
            return _put(out, _of_expert(rows, matrix, blocks.experts[n], blocks.sizes[n]), n * size)

        return jax.lax.fori_loop(0, blocks.used, block, jnp.zeros((len(x), matrix.weight.shape[-1]), x.dtype))

    def experts(self, x: jax.Array, sent: Dispatch, mixture: Mixture) -> jax.Array:
        """Do all that is done to a block while it is in the cache, and write its rows end to end."""
        blocks = sent.blocks
        size = len(sent.tokens) // len(blocks.experts)
        starts = jnp.cumsum(blocks.sizes) - blocks.sizes

        def block(n: jax.Array, out: jax.Array) -> jax.Array:
            expert, used = blocks.experts[n], blocks.sizes[n]
            rows = x[jax.lax.dynamic_slice_in_dim(sent.tokens, n * size, size)]
            product = partial(_of_expert, expert=expert, used=used)
            rows = fed_forward(rows, mixture, product, lambda bias: bias[expert])
            return _put(out, rows, starts[n])  # what is not in use gives way to the next block

        out = jnp.zeros((sent.rows.size + size - 1, x.shape[1]), x.dtype)
        out = jax.lax.fori_loop(0, blocks.used, block, out)
        return out[starts[sent.rows // size] + sent.rows % size]


def _of_expert(rows: jax.Array, matrix: Matrix, expert: jax.Array, used: jax.Array) -> jax.Array:
    """Multiply ``rows [B, I]``, of which the first ``used`` are in use, by the matrix of an expert."""
    inputs, outputs = rows.shape[1], matrix.weight.shape[-1]
    depth = next(n for n in range(min(DEPTH, inputs), 0, -1) if inputs % n == 0)
    x = rows.astype(jnp.float32).reshape(len(rows), -1, depth).swapaxes(0, 1)
    size = min(outputs, max(WIDTH, COPIED // inputs // WIDTH * WIDTH))

    def put(i: jax.Array | int, out: jax.Array) -> jax.Array:
        first = jnp.minimum(i * size, outputs - size)  # the last ones compute some outputs of those before again
        weight = jnp.pad(_widened(matrix, expert, first, size), ((0, 0), (0, -size % WIDTH)))
        part = _product(x, weight.reshape(len(x), depth, -1), used)[:, :size]
        return _put(out, part.astype(rows.dtype), first, 1)

    out = jnp.zeros((len(rows), outputs), rows.dtype)
    return put(0, out) if size == outputs else jax.lax.fori_loop(0, -(-outputs // size), put, out)


def _widened(matrix: Matrix, expert: jax.Array, first: jax.Array, size: int) -> jax.Array:
    """Weights ``[I, size]`` float32 of an expert, for ``size`` outputs from ``first``."""
    weight = matrix.weight[...]
    part = widened(jax.lax.dynamic_slice(weight, (expert, 0, first), (1, weight.shape[1], size))[0])
    if matrix.form is None:
        return part
    return part * jax.lax.dynamic_slice_in_dim(matrix.scales[...][expert], first, size, 1)


def _product(x: jax.Array, weight: jax.Array, used: jax.Array) -> jax.Array:
    """``x [S, B, I / S]`` times ``weight [S, I / S, O]``, summed over S: ``[B, O]``, of the first ``used`` rows."""
    rows = x.shape[1]
    out = jnp.zeros((rows, weight.shape[-1]), jnp.float32)
    if rows == 1:
        return _summed(x, weight)

    def one(i: jax.Array, out: jax.Array) -> jax.Array:
        return _put(out, _summed(jax.lax.dynamic_slice_in_dim(x, i, 1, 1), weight), i)

    def alone() -> jax.Array:
        return jax.lax.fori_loop(0, used, one, out)

    def at_once(size: int) -> jax.Array:
        return _put(out, _summed(x[:, :size], weight), 0)

    if rows < TILE:
        return alone()
    more = max(MORE, rows // 8)
    sizes = [*range(TILE, rows, more), rows]
    which = jnp.where(used <= ALONE, 0, 1 + jnp.maximum(0, -(-(used - TILE) // more)))
    return jax.lax.switch(which, [alone, *(partial(at_once, n) for n in sizes)])


def _summed(x: jax.Array, weight: jax.Array) -> jax.Array:
    # The barrier keeps XLA from giving product and sum to its library together, which would sum in another order.
    parts = jax.lax.optimization_barrier(jax.lax.dot_general(x, weight, (((2,), (1,)), ((0,), (0,)))))
    out = parts[0]
    for part in parts[1:]:
        out = out + part
    return out


def _put(out: jax.Array, part: jax.Array, first: jax.Array | int, axis: int = 0) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(out, part, first, axis)
