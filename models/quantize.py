"""Weight matrices in 8 bits, with one float32 scale per output channel.

A weight is ``values * scale``, symmetric. Activations are multiplied by the values in their own dtype, which holds
8-bit values exactly; sums are float32, and the scale multiplies the result. No dequantized copy is stored: values are
converted on their way into the product (:mod:`.product`).

Plain scaled products instead of qwix (0.1.8), which intercepts ``jnp.einsum`` while a model is traced, replaces
parameters by objects of its own, and needs the full model in memory to quantize it: the two functions here suffice.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from .product import product

EIGHT_BITS: dict[str, Any] = {"int8": jnp.dtype(jnp.int8), "fp8": jnp.dtype(jnp.float8_e4m3fn)}
"""Name in configurations and flags -> dtype."""

SCALE = "_scale"
"""The scales of the parameter ``x`` are the parameter ``x_scale``, of the shape of its last axis."""


def quantize(weight: jax.Array, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """Quantize a weight ``[I, O]`` to values ``[I, O]`` in the 8-bit ``dtype`` and float32 scales ``[O]``.

    The largest magnitude of a channel maps to the largest value of the dtype. A channel of zeros has scale 1.
    """
    largest = float(jnp.iinfo(dtype).max if jnp.issubdtype(dtype, jnp.integer) else jnp.finfo(dtype).max)
    full = weight.astype(jnp.float32)
    scale = jnp.abs(full).max(0) / largest
    scale = jnp.where(scale < jnp.finfo(jnp.float32).tiny, 1.0, scale)  # NaN is kept, so that it shows
    values = full / scale
    if jnp.issubdtype(dtype, jnp.integer):
        values = jnp.round(values)
    return jnp.clip(values, -largest, largest).astype(dtype), scale


def matrix(
    shape: tuple[int, int], dtype: Any, quantized_dtype: Any, rngs: nnx.Rngs
) -> tuple[nnx.Param[Any], nnx.Param[Any] | None]:
    """A random weight ``[I, O]``: in ``dtype``, or with scales in ``quantized_dtype`` (see :func:`quantize`)."""
    weight = 0.02 * jax.random.normal(rngs.params(), shape, dtype)
    if quantized_dtype is None:
        return nnx.Param(weight), None
    values, scale = quantize(weight, quantized_dtype)
    return nnx.Param(values), nnx.Param(scale)


def project(x: jax.Array, weight: nnx.Param[Any], scale: nnx.Param[Any] | None) -> jax.Array:
    """Multiply ``x [T, I]`` by ``weight [I, O]`` as :func:`matrix` makes it; the result has the dtype of ``x``."""
    x = _keep_layout(x)
    if scale is None and weight[...].dtype == x.dtype:
        return _keep_layout(x @ weight[...])
    sums = product(x, weight[...])
    return _keep_layout((sums if scale is None else sums * scale[...]).astype(x.dtype))


def _keep_layout(x: jax.Array) -> jax.Array:
    """Stop XLA from moving a neighbouring reshape of ``x`` into the product.

    It would transpose the weights on every step for that.
    """
    return jax.lax.optimization_barrier(x)
