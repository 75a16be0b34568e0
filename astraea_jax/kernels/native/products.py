"""Products with weights on CPUs, in C++ (``products.cc``), for weights in the order in which it reads them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from astraea_jax.models.decoder import Decoder
from astraea_jax.models.experts import Mixture
from astraea_jax.models.matrix import Matrix
from astraea_jax.models.matrix import multiply as multiply_elsewhere
from astraea_jax.models.product import BITS, PANEL
from astraea_jax.models.product import product as product_elsewhere

DTYPES = (jnp.dtype(jnp.float32), BITS, jnp.dtype(jnp.int8))
"""Dtypes of weights that it reads."""


def put_in_panels(whole: nnx.Module) -> None:
    """Store what the kernels read as panels, in place: matrices in and below a module, and a decoder's table of tokens.

    Those of a mixture of experts are if both can be. What is in panels stays so, as replicas share a decoder.
    """
    for _, module in nnx.iter_modules(whole):
        if isinstance(module, Matrix) and module.weight.ndim == 2:
            _put((module,))
        elif isinstance(module, Mixture) and module.gate_up.weight.ndim == 3:
            _put((module.gate_up, module.down))
        elif isinstance(module, Decoder):
            tied = module.config.tie_embeddings
            head = module.embed if tied else module.lm_head
            if head.weight.ndim == 2 and head.weight.dtype in DTYPES:
                head.weight = nnx.Param(in_panels(head.weight[...], transposed=tied))


@partial(jax.jit, static_argnames="transposed")
def in_panels(weight: jax.Array, *, transposed: bool = False) -> jax.Array:
    """Put ``weight [..., I, O]`` in panels ``[..., ceil(O / PANEL), I, PANEL]``, padded with zeros.

    If it is ``transposed`` it is ``[O, I]``.
    """
    weight = weight.T if transposed else weight
    padded = jnp.pad(weight, [(0, 0)] * (weight.ndim - 1) + [(0, -weight.shape[-1] % PANEL)])
    return padded.reshape(*weight.shape[:-1], -1, PANEL).swapaxes(-3, -2)


def multiply(x: jax.Array, matrix: Matrix, used: jax.Array | None = None) -> jax.Array:
    """Do what :func:`astraea_jax.models.matrix.multiply` does, which it calls for what is not in panels.

    Of those that are, rows after the first ``used []`` int32 are zero, and take no time.
    """
    if matrix.weight.ndim != 3:
        return multiply_elsewhere(x, matrix)
    out = _call(x, matrix.weight[...], matrix.outputs, used)
    return (out if matrix.form is None else out * matrix.scales[0].astype(jnp.float32)).astype(x.dtype)


def product(x: jax.Array, weight: jax.Array, *, transposed: bool = False, used: jax.Array | None = None) -> jax.Array:
    """Do what :func:`astraea_jax.models.product.product` does; with panels the result is padded with zeros.

    ``used`` is as in :func:`multiply`.
    """
    if weight.ndim != 3:
        return product_elsewhere(x, weight, transposed=transposed)
    return _call(x, weight, len(weight) * PANEL, used)


def _put(matrices: Sequence[Matrix]) -> None:
    """Store matrices as panels if the kernels read all of them: not those in a form of groups or of 4 bits."""
    if any(one.weight.dtype not in DTYPES or (one.form and not one.form.by_output) for one in matrices):
        return
    for matrix in matrices:
        matrix.weight = nnx.Param(in_panels(matrix.weight[...]))


def _call(x: jax.Array, weight: jax.Array, outputs: int, used: jax.Array | None) -> jax.Array:
    """Multiply ``x [T, I]`` by panels: ``[T, O]`` float32."""
    result = jax.ShapeDtypeStruct((len(x), outputs), jnp.float32)
    rows = jnp.asarray(len(x) if used is None else used, jnp.int32).reshape(1)
    out: jax.Array = jax.ffi.ffi_call("astraea_product", result)(x.astype(jnp.float32), rows, weight)
    return out
