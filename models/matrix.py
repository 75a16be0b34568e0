"""Weight matrices, as they are or in fewer bits (:mod:`.formats`).

Plain scaled products instead of qwix (0.1.8), which intercepts ``jnp.einsum`` while a model is traced, replaces
parameters by objects of its own, and needs the full model in memory to quantize it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from .formats import MIDDLE, Format, quantize
from .narrow import Codes, narrow_product
from .product import product

Forms = Callable[[str], Format | None]
"""Form of the matrix at a path such as ``layers.3.attention.qkv``; None: it is not quantized."""


def plain(path: str) -> None:
    """No matrix is quantized."""


def everywhere(form: Format | None) -> Forms:
    """All matrices have the same form."""
    return lambda path: form


def within(forms: Forms, prefix: str) -> Forms:
    """Forms by the rest of the path."""
    return lambda path: forms(f"{prefix}.{path}")


class Matrix(nnx.Module):
    """A matrix ``[I, O]``, or one of every expert ``[E, I, O]``, at first random.

    ``weight`` holds its numbers or codes; ``scales`` and ``zeros``, where the form has them, are as large as
    :meth:`.Format.grid` says, for every expert. ``summed``: devices divide its inputs, so that a product is their sum.
    ``outputs``: O, however the weight is stored.
    """

    stack: InStack | None = None
    """Where a kernel finds the same without a copy, in layers that are one loop."""

    def __init__(
        self, shape: tuple[int, ...], dtype: Any, form: Format | None, rngs: nnx.Rngs, *, summed: bool = False
    ):
        self.summed, self.outputs = summed, shape[-1]
        self.form = form = form and form.fitted(shape[-2])
        self.weight = nnx.Param(0.02 * jax.random.normal(rngs.params(), shape, dtype))
        if form is not None:
            codes, scale = quantize(self.weight[...], form)
            self.weight, self.scales = nnx.Param(codes), nnx.Param(scale)
            if form.zeros:
                middle = MIDDLE if form.codes == "int4" else 0
                self.zeros = nnx.Param(jnp.full(scale.shape, middle, jnp.int8))

    def divisible(self, devices: int) -> bool:
        """Whether each device's part of it consists of whole blocks that share a scale."""
        if self.form is None:
            return True
        shape = self.weight.shape[-2] * self.form.per_item, self.weight.shape[-1]
        return self.form.divisible(shape, devices, summed=self.summed)

    @property
    def codes(self) -> Codes:
        """Its arrays, if it has a form."""
        return Codes(self.weight[...], self.scales[...], self.zeros[...] if self.form and self.form.zeros else None)


class InStack(nnx.Module):
    """The matrix of one of the layers whose matrices ``whole [L, …]`` are stacked.

    XLA reads a slice of a stack where it is, but copies it first for a kernel, which is given all of the stack instead.

    Args:
        whole: matrices of all layers.
        layer: ``[]`` int32, the one among them.
    """

    def __init__(self, whole: Matrix, layer: jax.Array):
        self.whole, self.layer = whole, nnx.Variable(layer)


def multiply(x: jax.Array, matrix: Matrix) -> jax.Array:
    """Multiply ``x [T, I]`` by a matrix ``[I, O]``; the result ``[T, O]`` has the dtype of ``x``."""
    x = _keep_layout(x)
    if matrix.form is not None:
        return _keep_layout(narrow_product(x, matrix.codes, matrix.form).astype(x.dtype))
    weight = matrix.weight[...]
    return _keep_layout(x @ weight if weight.dtype == x.dtype else product(x, weight).astype(x.dtype))


def _keep_layout(x: jax.Array) -> jax.Array:
    """Stop XLA from moving a neighbouring reshape of ``x`` into the product.

    It would transpose the weights on every step for that.
    """
    return jax.lax.optimization_barrier(x)
