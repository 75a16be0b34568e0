"""The paged KV arrays on the device: their shapes, how many pages fit, and copying pages out and in."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from astraea_jax.kernels import Backend
from astraea_jax.kv_cache.offload import block_sharding
from astraea_jax.models.config import ModelConfig
from astraea_jax.models.sharding import TP

PagedKV = tuple[jax.Array, ...]
"""One array ``[P, …]`` per layer in the backend's form of a page, or for stacked layers a single ``[L * P, …]``, layer
after layer. Steps donate and return them."""

FULL, WINDOW = range(2)
"""Groups of layers, each with pages of its own: those whose queries see the whole context, and those with a window."""


@dataclass(frozen=True)
class LayerGroups:
    """Which layers share page ids, and how many pages these have."""

    of: tuple[int, ...]
    """The group of every layer."""
    num_pages: tuple[int, int]
    """Pages per layer in either group, the null page included."""
    stacked: bool
    """Whether all layers, which are alike then, have one array."""

    @classmethod
    def plan(cls, model: ModelConfig, num_pages: int, window_pages: int, stacked: bool) -> Self:
        """The groups of a model; without window pages all layers are in the first."""
        of = (WINDOW if kind.window and window_pages else FULL for kind in model.layer_kinds)
        return cls(tuple(of), (num_pages, window_pages), stacked)

    @property
    def present(self) -> tuple[int, ...]:
        """Groups that have layers."""
        return tuple(sorted(set(self.of)))

    @property
    def arrays(self) -> tuple[int, ...]:
        """The group of every array of pages."""
        return self.present if self.stacked else self.of

    def members(self, group: int) -> tuple[int, ...]:
        """Indices of a group's arrays."""
        return tuple(i for i, other in enumerate(self.arrays) if other == group)


def page_shape(
    model: ModelConfig, backend: Backend, page_size: int, dtype: jnp.dtype, devices: int = 1
) -> tuple[int, ...]:
    """Shape of one page of one layer over all ``devices``, each of which has the backend's form for its heads."""
    shape = list(backend.page_shape(model.num_kv_heads // devices, page_size, model.head_dim, dtype))
    shape[backend.heads_axis - 1] *= devices
    return tuple(shape)


def page_bytes(model: ModelConfig, backend: Backend, page_size: int, dtype: jnp.dtype, devices: int = 1) -> int:
    """Bytes of one page: the keys and values of ``page_size`` tokens over all layers and all ``devices``."""
    shape = page_shape(model, backend, page_size, dtype, devices)
    return model.num_layers * math.prod(shape) * np.dtype(dtype).itemsize


def abstract_pages(
    model: ModelConfig, backend: Backend, groups: LayerGroups, page_size: int, dtype: jnp.dtype, mesh: Mesh
) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Shapes of the pages of every layer, or of stacked layers, sharded by heads."""
    one = page_shape(model, backend, page_size, dtype, mesh.size)
    sharding = NamedSharding(mesh, heads_spec(backend.heads_axis))
    layers = [groups.of.count(group) if groups.stacked else 1 for group in groups.arrays]
    return tuple(
        jax.ShapeDtypeStruct((count * groups.num_pages[group], *one), backend.page_dtype(dtype), sharding=sharding)
        for count, group in zip(layers, groups.arrays, strict=True)
    )


def heads_spec(axis: int) -> PartitionSpec:
    """Shards an array by heads, which are its axis ``axis``."""
    return PartitionSpec(*[None] * axis, TP)


def make_pages(abstract: tuple[jax.ShapeDtypeStruct, ...]) -> PagedKV:
    """Make zeroed pages. Page 0 of every layer is the null page, to which padding is written."""
    return tuple(jnp.zeros(array.shape, array.dtype, device=array.sharding) for array in abstract)


def gather_pages(pages: PagedKV, ids: jax.Array, num_pages: int) -> jax.Array:
    """Copy the pages ``ids [n]`` int32 into a block ``[n, L, …]``, a contiguous piece per page; P is ``num_pages``."""
    return jnp.concatenate([array[_of_layers(array, ids, num_pages)] for array in pages], axis=1)


def stage_block(staging: jax.Array, block: jax.Array, at: jax.Array) -> jax.Array:
    """Write a block into the rows of ``staging [m, L, …]`` from ``at`` on."""
    return jax.lax.dynamic_update_slice_in_dim(staging, block, at, 0)


def scatter_pages(pages: PagedKV, block: jax.Array, ids: jax.Array, num_pages: int) -> PagedKV:
    """Write the first n pages of a block to the pages ``ids [n]`` int32, all different; those beyond P are ignored."""
    parts = jnp.split(block[: len(ids)], len(pages), axis=1)
    return tuple(
        array.at[_of_layers(array, ids, num_pages)].set(part, mode="drop", unique_indices=True)
        for array, part in zip(pages, parts, strict=True)
    )


def write_pages(pages: PagedKV, block: jax.Array, ids: jax.Array, num_pages: int) -> PagedKV:
    """Do what :func:`scatter_pages` does, one page after the other: a CPU then needs no scratch memory."""
    layers, rest = block.shape[1], block.shape[2:]

    def write(row: jax.Array, pages: PagedKV) -> PagedKV:
        written = list(pages)
        for layer in range(layers):
            of, within = divmod(layer, layers // len(pages))
            page = jax.lax.dynamic_slice(block, (row, layer, *[0] * len(rest)), (1, 1, *rest))[0]
            at = ids[row] + within * num_pages
            written[of] = jax.lax.dynamic_update_slice_in_dim(written[of], page, at, 0)
        return tuple(written)

    def step(row: jax.Array, pages: PagedKV) -> PagedKV:
        return jax.lax.cond(ids[row] < num_pages, partial(write, row), lambda pages: pages, pages)

    return jax.lax.fori_loop(0, len(ids), step, pages)


def _of_layers(array: jax.Array, ids: jax.Array, num_pages: int) -> jax.Array:
    """Indices ``[n, layers]`` of the pages ``ids [n]`` in an array of one or several layers."""
    there = ids[:, None] + jnp.arange(0, array.shape[0], num_pages, dtype=jnp.int32)
    beyond = array.shape[0] + jnp.arange(there.size, dtype=jnp.int32).reshape(there.shape)
    return jnp.where(ids[:, None] < num_pages, there, beyond)


class Transfers(NamedTuple):
    """The jitted functions that move pages, to be lowered per size of a block; what they write to is donated."""

    gather: Any
    """:func:`gather_pages`, one launch on a GPU."""
    stage: Any
    """:func:`stage_block`, one launch."""
    scatter: Any
    """:func:`scatter_pages`, one launch per layer; on a CPU :func:`write_pages`."""


def jitted_transfers(pages: tuple[jax.ShapeDtypeStruct, ...], ids: jax.sharding.Sharding, num_pages: int) -> Transfers:
    """Jit the functions that move pages.

    Args:
        pages: shapes of the paged arrays.
        ids: sharding of page ids.
        num_pages: pages of each layer.
    """
    arrays, block = tuple(array.sharding for array in pages), block_sharding(pages[0])
    gather = jax.jit(partial(gather_pages, num_pages=num_pages), in_shardings=(arrays, ids), out_shardings=block)
    stage = jax.jit(stage_block, in_shardings=(block, block, ids), out_shardings=block, donate_argnums=0)
    on_cpu = all(getattr(device, "platform", "") == "cpu" for device in ids.device_set)
    scatter = jax.jit(
        partial(write_pages if on_cpu else scatter_pages, num_pages=num_pages),
        in_shardings=(arrays, block, ids),
        out_shardings=arrays,
        donate_argnums=0,
    )
    return Transfers(gather, stage, scatter)
