"""Products with the matrices of experts on CPUs, in C++ (``products.cc``), for weights in panels."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from astraea_jax.kernels.grouped import Blocks, GroupedProduct
from astraea_jax.kernels.grouped_reference import GroupedReference
from astraea_jax.models.experts import Mixture
from astraea_jax.models.matrix import Matrix


class GroupedNative(GroupedProduct):
    """Rows follow each other by expert, without gaps: every block is one row."""

    name = "native"

    def suited(self, mixture: Mixture) -> GroupedProduct:
        """The reference where matrices are not in panels (:func:`.products.put_in_panels`)."""
        return self if mixture.gate_up.weight.ndim == 4 else GroupedReference()

    def block_rows(self, rows: int, experts: int) -> int:
        """One."""
        return 1

    def product(self, x: jax.Array, matrix: Matrix, blocks: Blocks) -> jax.Array:
        """See :meth:`.GroupedProduct.product`; rows that are not in use are zero."""
        result = jax.ShapeDtypeStruct((len(x), matrix.outputs), jnp.float32)
        call = jax.ffi.ffi_call("astraea_grouped_product", result)
        out: jax.Array = call(x.astype(jnp.float32), blocks.experts, blocks.used.reshape(1), matrix.weight[...])
        if matrix.form is not None:
            out = out * matrix.scales[...][blocks.experts, 0].astype(jnp.float32)
        return out.astype(x.dtype)
