"""Weight matrices in eight bits, with one float32 scale per output channel.

A weight is ``values * scale``, symmetric. Activations are multiplied by the values in their own dtype, in which eight
bits are exact, the sums are float32, and the scale multiplies what comes out. So nothing wide has to be stored: XLA
widens values on their way into the product (on a CPU into a temporary copy of the one matrix).

Plain scaled products and not qwix (0.1.8): it intercepts ``jnp.einsum`` while a model is traced, replaces parameters by
objects of its own, and quantises a model that is wide in memory, where all we need is the two functions here.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

EIGHT_BITS: dict[str, Any] = {"int8": jnp.dtype(jnp.int8), "fp8": jnp.dtype(jnp.float8_e4m3fn)}
"""What users call them -> dtype."""

SCALE = "_scale"
"""The scales of the parameter ``x`` are the parameter ``x_scale``, of the shape of its last axis."""


def quantize(weight: jax.Array, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """Values ``[I, O]`` in the eight-bit ``dtype`` and float32 scales ``[O]`` of a weight ``[I, O]``.

    The largest number of a channel becomes the largest of the dtype. A channel of zeros has scale 1.
    """
    largest = float(jnp.iinfo(dtype).max if jnp.issubdtype(dtype, jnp.integer) else jnp.finfo(dtype).max)
    wide = weight.astype(jnp.float32)
    scale = jnp.abs(wide).max(0) / largest
    scale = jnp.where(scale < jnp.finfo(jnp.float32).tiny, 1.0, scale)  # not so NaN, which must stay to be seen
    values = wide / scale
    if jnp.issubdtype(dtype, jnp.integer):
        values = jnp.round(values)
    return jnp.clip(values, -largest, largest).astype(dtype), scale


def matrix(
    shape: tuple[int, int], dtype: Any, narrow: Any, rngs: nnx.Rngs
) -> tuple[nnx.Param[Any], nnx.Param[Any] | None]:
    """A random weight ``[I, O]`` in ``dtype``, or in the eight-bit dtype ``narrow`` with its scales; see
    :func:`quantize`."""
    weight = 0.02 * jax.random.normal(rngs.params(), shape, dtype)
    if narrow is None:
        return nnx.Param(weight), None
    values, scale = quantize(weight, narrow)
    return nnx.Param(values), nnx.Param(scale)


def project(x: jax.Array, weight: nnx.Param[Any], scale: nnx.Param[Any] | None) -> jax.Array:
    """``x [T, I]`` times ``weight [I, O]``, in the dtype of ``x``; the weight is as :func:`matrix` makes it."""
    x = _as_it_is(x)
    if scale is None:
        return _as_it_is(x @ weight[...])
    sums = jnp.matmul(x, weight[...].astype(x.dtype), preferred_element_type=jnp.float32)
    return _as_it_is((sums * scale[...]).astype(x.dtype))


def _as_it_is(x: jax.Array) -> jax.Array:
    """``x``, whose axes XLA does not change: it would carry a reshape that comes before or after into the product, and
    for that bring the weights into another order, on every step."""
    return jax.lax.optimization_barrier(x)
