"""The paged KV arrays on the device: how many pages fit, and making them."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from astraea_jax.cache.host import block_sharding
from astraea_jax.errors import StartupError
from astraea_jax.kernels import Backend
from astraea_jax.models.config import ModelConfig
from astraea_jax.models.sharding import TP

PagedKV = tuple[jax.Array, ...]
"""One array ``[P, …]`` per layer, in the form of the backend's pages; the step donates and returns them."""


def page_shape(
    model: ModelConfig, backend: Backend, page_size: int, dtype: jnp.dtype, devices: int = 1
) -> tuple[int, ...]:
    """Of one page of one layer, over all ``devices`` that share the heads; each has the form the backend gives it."""
    shape = list(backend.page_shape(model.num_kv_heads // devices, page_size, model.head_dim, dtype))
    shape[backend.heads_axis - 1] *= devices
    return tuple(shape)


def page_bytes(model: ModelConfig, backend: Backend, page_size: int, dtype: jnp.dtype, devices: int = 1) -> int:
    """Bytes of one page: the keys and values of ``page_size`` tokens over all layers and all ``devices``."""
    shape = page_shape(model, backend, page_size, dtype, devices)
    return model.num_layers * math.prod(shape) * np.dtype(dtype).itemsize


def pages_within(budget: int, page: int) -> int:
    """Pages of ``page`` bytes (the scrap page included) that fit into ``budget`` bytes.

    Raises:
        StartupError: not even one usable page fits.
    """
    if budget < 2 * page:
        raise StartupError(f"a KV budget of {budget} bytes holds fewer than two pages of {page} bytes; raise kv_bytes")
    return budget // page


def abstract_pages(
    model: ModelConfig, backend: Backend, num_pages: int, page_size: int, dtype: jnp.dtype, mesh: Mesh
) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Shapes of the pages of every layer, and how they lie on the devices: divided by heads."""
    shape = (num_pages, *page_shape(model, backend, page_size, dtype, mesh.size))
    sharding = NamedSharding(mesh, heads_spec(backend.heads_axis))
    return (jax.ShapeDtypeStruct(shape, backend.page_dtype(dtype), sharding=sharding),) * model.num_layers


def heads_spec(axis: int) -> PartitionSpec:
    """Divides an array by heads, which are its axis ``axis``."""
    return PartitionSpec(*[None] * axis, TP)


def make_pages(abstract: tuple[jax.ShapeDtypeStruct, ...]) -> PagedKV:
    """Zeroed pages for every layer. Page 0 is scrap: padding writes land there."""
    return tuple(jnp.zeros(layer.shape, layer.dtype, device=layer.sharding) for layer in abstract)


def gather_pages(pages: PagedKV, ids: jax.Array) -> jax.Array:
    """A block ``[n, L, …]`` of the pages ``ids [n]`` int32, one contiguous piece each."""
    return jnp.stack([layer[ids] for layer in pages], axis=1)


def scatter_pages(pages: PagedKV, block: jax.Array, ids: jax.Array) -> PagedKV:
    """Write a block to the pages ``ids [n]`` int32, all different; ids beyond the pool are passed over."""
    return tuple(layer.at[ids].set(block[:, i], mode="drop", unique_indices=True) for i, layer in enumerate(pages))


def jitted_transfers(pages: tuple[jax.ShapeDtypeStruct, ...], ids: jax.sharding.Sharding) -> tuple[Any, Any]:
    """:func:`gather_pages` and :func:`scatter_pages` (which is donated the pages), to be lowered for every block size.

    Args:
        pages: shapes of the pages of every layer.
        ids: where page ids lie.
    """
    layers, block = tuple(layer.sharding for layer in pages), block_sharding(pages[0])
    gather = jax.jit(gather_pages, in_shardings=(layers, ids), out_shardings=block)
    scatter = jax.jit(scatter_pages, in_shardings=(layers, block, ids), out_shardings=layers, donate_argnums=0)
    return gather, scatter
