"""The paged KV arrays on the device: how many pages fit, and making them."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from astraea_jax.errors import StartupError
from astraea_jax.kernels import Backend
from astraea_jax.models.config import ModelConfig

PagedKV = tuple[jax.Array, ...]
"""One array ``[P, …]`` per layer, in the form of the backend's pages; the step donates and returns them."""


def page_bytes(model: ModelConfig, backend: Backend, page_size: int, dtype: jnp.dtype) -> int:
    """Bytes of one page: the keys and values of ``page_size`` tokens over all layers."""
    shape = backend.page_shape(model.num_kv_heads, page_size, model.head_dim, dtype)
    return model.num_layers * math.prod(shape) * np.dtype(dtype).itemsize


def pages_within(budget: int, page: int) -> int:
    """Pages of ``page`` bytes (the scrap page included) that fit into ``budget`` bytes.

    Raises:
        StartupError: not even one usable page fits.
    """
    if budget < 2 * page:
        raise StartupError(f"a KV budget of {budget} bytes holds fewer than two pages of {page} bytes; raise kv_bytes")
    return budget // page


def make_pages(model: ModelConfig, backend: Backend, num_pages: int, page_size: int, dtype: jnp.dtype) -> PagedKV:
    """Zeroed pages for every layer. Page 0 is scrap: padding writes land there."""
    shape = (num_pages, *backend.page_shape(model.num_kv_heads, page_size, model.head_dim, dtype))
    return tuple(jnp.zeros(shape, dtype) for _ in range(model.num_layers))


def gather_pages(pages: PagedKV, ids: jax.Array) -> jax.Array:
    """A block ``[n, L, …]`` of the pages ``ids [n]`` int32, one contiguous piece each."""
    return jnp.stack([layer[ids] for layer in pages], axis=1)


def scatter_pages(pages: PagedKV, block: jax.Array, ids: jax.Array) -> PagedKV:
    """Write a block to the pages ``ids [n]`` int32, all different; ids beyond the pool are passed over."""
    return tuple(layer.at[ids].set(block[:, i], mode="drop", unique_indices=True) for i, layer in enumerate(pages))
