"""Arrays of a decoder by their paths, and how they are filled while weights are read."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx

from .decoder import Decoder
from .formats import Format, quantize
from .matrix import Matrix

Place = tuple[Any, ...]
Parameters = dict[Place, Any]
"""Path such as ``("layers", 0, "attention", "o", "weight")`` -> array, or its shape and sharding."""

SCALES, ZEROS = "scales", "zeros"
"""Last part of the path of a matrix's scales and zeros, which lie beside its weight."""


def matrix_forms(decoder: Decoder) -> dict[str, Format]:
    """Form of each matrix that has one, by its path without ``weight``, joined by dots."""
    return {
        ".".join(map(str, path)): node.form
        for path, node in nnx.iter_graph(decoder)
        if isinstance(node, Matrix) and node.form is not None
    }


def beside(path: Place, name: str) -> Place:
    """The path of the scales or zeros of the matrix whose weight is at ``path``."""
    return (*path[:-1], name)


def is_weight(path: Place) -> bool:
    """Whether a parameter is neither scales nor zeros."""
    return path[-1] not in (SCALES, ZEROS)


def put(array: np.ndarray, sharding: jax.sharding.Sharding) -> jax.Array:
    """Give every device of this process its part of an array."""
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def fill(params: Parameters, path: Place, array: np.ndarray) -> None:
    """Put an array into the place of the shape at ``path``, in the dtype that it has there."""
    leaf = params[path]
    params[path] = leaf.replace(put(array.astype(leaf.dtype, copy=False), leaf.sharding))


def fill_quantized(params: Parameters, path: Place, weight: jax.Array, form: Format) -> None:
    """Put a weight at ``path`` in this form, with its scales beside it."""
    leaf, scale = params[path], params[beside(path, SCALES)]
    make = _quantizer(form, (leaf.sharding, scale.sharding))
    values, scales = jax.block_until_ready(make(weight))  # else many full weights could wait on the device
    params[path], params[beside(path, SCALES)] = leaf.replace(values), scale.replace(scales)


def fill_all(params: Parameters, wide: Parameters, forms: Mapping[str, Format]) -> None:
    """Put all weights of ``wide``, which is used up, into ``params``: matrices in their forms, others as they are."""
    for path in list(wide):
        leaf = wide.pop(path)
        if beside(path, SCALES) in params:
            fill_quantized(params, path, leaf[...], forms[".".join(map(str, path[:-1]))])
        else:
            params[path] = leaf


@functools.cache
def _quantizer(form: Format, shardings: tuple[jax.sharding.Sharding, jax.sharding.Sharding]) -> Any:
    return jax.jit(lambda weight: quantize(weight, form), out_shardings=shardings)
