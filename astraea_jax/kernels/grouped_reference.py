"""Grouped products in jax.numpy, block after block: the reference, and the CPU's kernel."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from astraea_jax.models.matrix import Matrix
from astraea_jax.models.product import product

from .grouped import Blocks

ROWS = 8


class GroupedReference:
    """A loop over the blocks in use."""

    name = "reference"

    def block_rows(self, rows: int, experts: int) -> int:
        return ROWS

    def product(self, x: jax.Array, matrix: Matrix, blocks: Blocks) -> jax.Array:
        weight, outputs = matrix.weight[...], matrix.weight.shape[-1]
        size = len(x) // len(blocks.experts)

        def put(i: jax.Array, result: jax.Array) -> jax.Array:
            rows = jax.lax.dynamic_slice_in_dim(x, i * size, size)
            out = product(rows, weight[blocks.experts[i]])
            if matrix.form is not None:
                out = out * matrix.scales[...][blocks.experts[i], 0]
            return jax.lax.dynamic_update_slice_in_dim(result, out.astype(x.dtype), i * size, 0)

        return jax.lax.fori_loop(0, blocks.used, put, jnp.zeros((len(x), outputs), x.dtype))
