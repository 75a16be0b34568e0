"""The paged KV arrays on the device: how many pages fit, and making them."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from astraea_jax.errors import StartupError
from astraea_jax.kernels import Backend
from astraea_jax.kv_cache.offload import block_sharding
from astraea_jax.models.config import ModelConfig
from astraea_jax.models.sharding import TP

PagedKV = tuple[jax.Array, ...]
"""One array ``[P, …]`` per layer, in the form of the backend's pages, or for stacked layers one ``[L * P, …]``, layer
after layer; the step donates and returns them."""


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
        raise StartupError(
            f"a KV budget of {budget} bytes holds fewer than two pages of {page} bytes; raise kv_bytes, or if there is "
            "no more, share the model by tensor_parallel or keep it in eight bits by quantize"
        )
    return budget // page


def abstract_pages(
    model: ModelConfig,
    backend: Backend,
    num_pages: int,
    page_size: int,
    dtype: jnp.dtype,
    mesh: Mesh,
    *,
    stacked: bool = False,
) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Shapes of the pages of every layer, or of all in one, and how they lie on the devices: divided by heads."""
    one = page_shape(model, backend, page_size, dtype, mesh.size)
    arrays, pages = (1, model.num_layers * num_pages) if stacked else (model.num_layers, num_pages)
    sharding = NamedSharding(mesh, heads_spec(backend.heads_axis))
    return (jax.ShapeDtypeStruct((pages, *one), backend.page_dtype(dtype), sharding=sharding),) * arrays


def heads_spec(axis: int) -> PartitionSpec:
    """Divides an array by heads, which are its axis ``axis``."""
    return PartitionSpec(*[None] * axis, TP)


def make_pages(abstract: tuple[jax.ShapeDtypeStruct, ...]) -> PagedKV:
    """Zeroed pages. Page 0 of every layer is scrap: padding writes land there."""
    return tuple(jnp.zeros(array.shape, array.dtype, device=array.sharding) for array in abstract)


def gather_pages(pages: PagedKV, ids: jax.Array, num_pages: int) -> jax.Array:
    """A block ``[n, L, …]`` of the pages ``ids [n]`` int32, one contiguous piece each; a layer has ``num_pages``."""
    return jnp.concatenate([array[_of_layers(array, ids, num_pages)] for array in pages], axis=1)


def scatter_pages(pages: PagedKV, block: jax.Array, ids: jax.Array, num_pages: int) -> PagedKV:
    """Write a block to the pages ``ids [n]`` int32, all different; ids beyond the ``num_pages`` of a layer are passed
    over."""
    parts = jnp.split(block, len(pages), axis=1)
    return tuple(
        array.at[_of_layers(array, ids, num_pages)].set(part, mode="drop", unique_indices=True)
        for array, part in zip(pages, parts, strict=True)
    )


def _of_layers(array: jax.Array, ids: jax.Array, num_pages: int) -> jax.Array:
    """Where the pages ``ids [n]`` of each layer lie in an array of one or more, ``[n, layers]``."""
    there = ids[:, None] + jnp.arange(0, array.shape[0], num_pages, dtype=jnp.int32)
    beyond = array.shape[0] + jnp.arange(there.size, dtype=jnp.int32).reshape(there.shape)
    return jnp.where(ids[:, None] < num_pages, there, beyond)


def jitted_transfers(
    pages: tuple[jax.ShapeDtypeStruct, ...], ids: jax.sharding.Sharding, num_pages: int
) -> tuple[Any, Any]:
    """:func:`gather_pages` and :func:`scatter_pages` (which is donated the pages), to be lowered for every block size.

    Args:
        pages: their shapes.
        ids: where page ids lie.
        num_pages: of each layer.
    """
    arrays, block = tuple(array.sharding for array in pages), block_sharding(pages[0])
    gather = jax.jit(partial(gather_pages, num_pages=num_pages), in_shardings=(arrays, ids), out_shardings=block)
    scatter = jax.jit(
        partial(scatter_pages, num_pages=num_pages),
        in_shardings=(arrays, block, ids),
        out_shardings=arrays,
        donate_argnums=0,
    )
    return gather, scatter
