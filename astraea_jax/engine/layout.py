"""The sizes that follow from a configuration, a model and the memory of this machine."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from astraea_jax.engine.config import EngineConfig
from astraea_jax.engine.devices import free_bytes
from astraea_jax.engine.page_counts import PageCounts
from astraea_jax.errors import StartupError
from astraea_jax.kernels import Backend
from astraea_jax.kv_cache.arrays import page_bytes
from astraea_jax.kv_cache.offload import LARGEST_BLOCK, has_pinned_host
from astraea_jax.models.config import ModelConfig
from astraea_jax.scheduler.transfer import HostTier
from astraea_jax.scheduler.windows import Window

log = logging.getLogger(__name__)

CPU_KV_BYTES = 512 * 2**20
STAGING_TOKENS = 4096
"""Device memory for KV on its way to the host, and as much for KV on its way back; two of the largest
blocks or more, at most half of a small pool."""
DEVICE_KV_SHARE = 0.85
"""Share of the accelerator memory left after loading that KV pages take; the rest is for activations."""
HOST_SHARE = 0.5
"""Default share of the host's memory for an accelerator's host tier."""
GPU_PINNED_BYTES = 60 * 2**30
"""XLA pins at most 64 GiB on a GPU's host unless XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB says otherwise."""


@dataclass(frozen=True)
class Layout:
    """Sizes that follow from an :class:`EngineConfig` and a model."""

    dtype: Any
    """Dtype of activations."""
    kv_dtype: Any
    backend: Backend
    """Attention backend."""
    num_pages: int
    """Pages per replica, null page included."""
    window: Window | None
    """Of layers with a window, which have pages of their own; None: no layer has one."""
    layers: tuple[int, int]
    """Layers of a page, and of a window page."""
    page_bytes: int
    """Bytes of a page and its window page, summed over the devices that share it."""
    max_context: int
    pages_per_seq: int
    host: HostTier

    @classmethod
    def plan(cls, config: EngineConfig, model: ModelConfig, mesh: Mesh) -> Layout:
        """Fit the pages into the memory that loaded weights have left; every process gets the same result.

        Raises:
            StartupError: ``max_context`` exceeds the model's limit or the pages, or the attention backend or the host
                tier is not available; the message gives the numbers.
        """
        kv_dtype, backend = config.page_dtype(), config.backend(model)
        one = page_bytes(model, backend, config.page_size, kv_dtype, mesh.size)
        host = _host_bytes(config.host_kv_bytes)
        budget = config.kv_bytes
        if budget is None:
            budget = _free_memory(mesh)
            budget -= _staging_bytes(budget, one // mesh.size, config.page_size) if host else 0
        pages = PageCounts.within(budget, one // mesh.size, model, config)
        held = (pages.full - 1) * config.page_size
        wanted = config.max_context or min(model.max_position, held)
        if wanted > model.max_position:
            raise StartupError(f"max_context {wanted} exceeds the model's {model.max_position} positions")
        if wanted > held:
            raise StartupError(f"max_context {wanted} exceeds the {held} tokens that the KV pages hold; raise kv_bytes")
        return cls(
            dtype=config.weight_dtype(),
            kv_dtype=kv_dtype,
            backend=backend,
            num_pages=pages.full,
            window=pages.window,
            layers=pages.layers,
            page_bytes=one,
            host=replace(
                _host_tier(
                    host,
                    one // jax.process_count(),
                    config.page_size,
                    pages.full - 1,
                    config.data_parallel,
                ),
                layers=pages.layers,
            ),
            max_context=wanted,
            pages_per_seq=-(-wanted // config.page_size),
        )

    def bytes_of(self, pages: int, windows: int) -> int:
        """Bytes of so many pages and window pages, summed over the devices that share them."""
        full, window = self.layers
        return self.page_bytes // (full + window) * (pages * full + windows * window)


def _host_bytes(budget: int | None) -> int:
    """Bytes of this machine's memory for the host tiers of all replicas; 0: there are none.

    Raises:
        StartupError: ``budget`` (None: the default for this backend) cannot be had.
    """
    installed = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    pinned = has_pinned_host()
    if budget is None:
        if jax.default_backend() == "cpu":
            return 0
        if not pinned:
            log.warning("this backend cannot pin host memory: KV under pressure is computed again, not moved")
            return 0
        return min(int(HOST_SHARE * installed), GPU_PINNED_BYTES)
    if budget > installed:
        raise StartupError(f"host_kv_bytes {budget} exceeds the {installed} bytes of this machine's memory")
    if budget and not pinned:
        raise StartupError("this backend cannot pin host memory; start with host_kv_bytes 0, without a host tier")
    return budget


def _host_tier(budget: int, page: int, page_size: int, pool: int, replicas: int) -> HostTier:
    """Host tier of one of ``replicas`` replicas that split ``budget`` bytes.

    Args:
        budget: bytes of this machine's memory; 0: there is none.
        page: bytes of a page in this machine's memory.
        page_size: tokens of a page.
        pool: pages of a replica on the device.
        replicas: how many split the budget.
    """
    if budget == 0:
        return HostTier()
    if budget < replicas * page:
        each = f" for each of {replicas} replicas" if replicas > 1 else ""
        raise StartupError(
            f"host_kv_bytes {budget} holds no page of {page} bytes{each}; raise it, or give 0 for no host tier"
        )
    return HostTier(budget // replicas // page, staging_pages(pool, page_size))


def _staging_bytes(budget: int, page: int, page_size: int) -> int:
    """Bytes of ``budget`` that staging takes beside the pool: pages each way, and where blocks are put together."""
    staged = staging_pages(budget // page // 2, page_size)
    return page * (2 * staged + min(staged, LARGEST_BLOCK))


def staging_pages(pool: int, page_size: int) -> int:
    """Pages of so many tokens that may be on their way to the host at once, from a pool of ``pool`` pages."""
    return max(1, min(max(2 * LARGEST_BLOCK, STAGING_TOKENS // page_size), pool // 2))


def _free_memory(mesh: Mesh) -> int:
    """Bytes for pages on the device of the mesh that has the least."""
    here = free_bytes(mesh)
    free = CPU_KV_BYTES if here is None else int(DEVICE_KV_SHARE * here)
    if jax.process_count() > 1:
        free = int(multihost_utils.process_allgather(np.int32(free // 2**20)).min()) * 2**20
    return free
