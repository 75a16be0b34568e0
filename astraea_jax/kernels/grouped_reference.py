"""Grouped products in jax.numpy: the reference, and for CPUs what the kernels in C++ do not read.

The weight of an expert is copied, as float32 in the processor's cache, and multiplied by the rows of its block. Only
experts that are used are read, and a row's result does not depend on others (:mod:`astraea_jax.models.rowwise`).
"""

from __future__ import annotations

from functools import partial, reduce

import jax
import jax.numpy as jnp

from astraea_jax.models.experts import Mixture
from astraea_jax.models.matrix import Matrix
from astraea_jax.models.narrow import Codes, parts_of_outputs
from astraea_jax.models.product import widened
from astraea_jax.models.rowwise import TILE, WIDTH, first_rows

from .grouped import Blocks, Dispatch, GroupedProduct, fed_forward

FEW = 8
"""Rows of a block where experts see few rows."""
MOST = 512
"""Rows of the largest block."""
COPIED = 2**21
"""Numbers of a weight that are copied at once: 8 MiB."""


class GroupedReference(GroupedProduct):
    """A loop over the blocks in use."""

    name = "reference"

    def block_rows(self, rows: int, experts: int) -> int:
        """One where experts hardly ever see two rows; enough for most experts where they see many."""
        if rows <= experts // 2:
            return 1
        if rows <= 2 * FEW * experts:
            return FEW
        return min(MOST, -(-5 * rows // (4 * experts * TILE)) * TILE)

    def product(self, x: jax.Array, matrix: Matrix, blocks: Blocks) -> jax.Array:
        size = len(x) // len(blocks.experts)

        def block(n: jax.Array, out: jax.Array) -> jax.Array:
            rows = jax.lax.dynamic_slice_in_dim(x, n * size, size)
            rows = _of_expert(rows, matrix, blocks.experts[n], blocks.sizes[n])
            return jax.lax.dynamic_update_slice_in_dim(out, rows, n * size, 0)

        return jax.lax.fori_loop(0, blocks.used, block, jnp.zeros((len(x), matrix.weight.shape[-1]), x.dtype))

    def choices(self, x: jax.Array, sent: Dispatch, mixture: Mixture) -> jax.Array:
        """Do all that is done to a block while it is in the cache, and write its rows end to end."""
        blocks = sent.blocks
        size = len(sent.tokens) // len(blocks.experts)
        starts = jnp.cumsum(blocks.sizes) - blocks.sizes

        def block(n: jax.Array, out: jax.Array) -> jax.Array:
            expert, used = blocks.experts[n], blocks.sizes[n]
            rows = x[jax.lax.dynamic_slice_in_dim(sent.tokens, n * size, size)]
            product = partial(_of_expert, expert=expert, used=used)
            rows = fed_forward(rows, mixture, product, lambda bias: bias[expert])
            # What is not in use gives way to the next block.
            return jax.lax.dynamic_update_slice_in_dim(out, rows, starts[n], 0)

        out = jnp.zeros((sent.rows.size + size - 1, x.shape[1]), x.dtype)
        out = jax.lax.fori_loop(0, blocks.used, block, out)
        return out[starts[sent.rows // size] + sent.rows % size]


def _of_expert(rows: jax.Array, matrix: Matrix, expert: jax.Array, used: jax.Array) -> jax.Array:
    """Multiply ``rows [B, I]``, of which the first ``used`` are in use, by the matrix of an expert."""
    inputs, outputs = rows.shape[1], matrix.weight.shape[-1]
    size = min(outputs, max(WIDTH, COPIED // inputs // WIDTH * WIDTH))

    def put(i: jax.Array | int, out: jax.Array) -> jax.Array:
        first = jnp.minimum(i * size, outputs - size)  # the last ones compute some outputs of those before again
        parts = _parts(rows.astype(jnp.float32), matrix, expert, first, size)
        part = reduce(jnp.add, (first_rows(x, weights, used) for x, weights in parts))
        return jax.lax.dynamic_update_slice_in_dim(out, part.astype(rows.dtype), first, 1)

    out = jnp.zeros((len(rows), outputs), rows.dtype)
    return put(0, out) if size == outputs else jax.lax.fori_loop(0, -(-outputs // size), put, out)


def _parts(
    rows: jax.Array, matrix: Matrix, expert: jax.Array, first: jax.Array, size: int
) -> list[tuple[jax.Array, jax.Array]]:
    """Rows and weights, both float32, whose products add up to that of rows with ``size`` outputs of an expert."""
    if matrix.form is None:
        weight = matrix.weight[...]
        return [(rows, widened(jax.lax.dynamic_slice(weight, (expert, 0, first), (1, weight.shape[1], size))[0]))]
    codes, scales, zeros = matrix.codes
    of_one = Codes(codes[expert], scales[expert], None if zeros is None else zeros[expert])
    return parts_of_outputs(rows, of_one, matrix.form, first, size)
