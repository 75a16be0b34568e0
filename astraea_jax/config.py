"""What the engine is told, and what follows from it for a model on this machine."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from astraea_jax.cache.host import LARGEST_BLOCK, has_pinned_host
from astraea_jax.cache.paged import page_bytes, pages_within
from astraea_jax.errors import StartupError
from astraea_jax.kernels import BACKENDS, Backend, choose
from astraea_jax.models.config import CheckpointError, ModelConfig
from astraea_jax.models.sharding import check_mesh, mesh_of
from astraea_jax.scheduler.strategies import STRATEGIES
from astraea_jax.scheduler.transfer import HostTier

log = logging.getLogger(__name__)

CPU_KV_BYTES = 512 * 2**20
STAGING_PAGES = 4 * LARGEST_BLOCK
"""Of device memory for KV on its way to the host, and as many for KV on its way back; half of a small pool."""
DEVICE_KV_SHARE = 0.85
"""Of the accelerator memory that is free once the weights are loaded; the rest is for activations."""
HOST_SHARE = 0.5
"""Of the host's memory, that an accelerator's host tier may take if nobody says how much."""
GPU_PINNED_BYTES = 60 * 2**30
"""XLA pins at most 64 GiB on a GPU's host unless XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB says otherwise."""
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class EngineConfig:
    """Sizes and policy of an engine.

    Raises:
        StartupError: a value makes no sense by itself.
    """

    max_seqs: int = 64
    """Segments that run at once."""
    max_step_tokens: int = 512
    """Tokens of one step, prefill and decode together."""
    page_size: int = 16
    """Tokens per KV page."""
    kv_bytes: int | None = None
    """Memory for KV pages on each device. None: most of what is free on an accelerator, 512 MiB on a CPU."""
    host_kv_bytes: int | None = None
    """Pinned host memory for KV of programs that wait, under memory pressure. 0: none. None: half of the host's memory
    (60 GiB at most) on an accelerator, none on a CPU, where it is the same memory."""
    residency: str | None = None
    """Strategy for the KV of programs that wait; None: the policy's own, or else adaptive."""
    max_context: int | None = None
    """Prompt and output tokens of one segment. None: the model's own limit, or less if the pages do not hold it."""
    dtype: str | None = None
    """Of weights and KV. None: float32 on a CPU, bfloat16 elsewhere."""
    tensor_parallel: int = 1
    """Devices that share one copy of the model and its KV."""
    data_parallel: int = 1
    """Copies of the model, each with devices, KV and running segments of its own. The other sizes are those of one
    copy, but host_kv_bytes, which all of them share."""
    attention: str | None = None
    """Backend of attention; None: the one for this kind of device."""
    policy: str = "astraea"
    max_queued: int = 1024
    """Requests that may wait; beyond that they are refused."""
    max_programs: int = 8192
    """Sessions remembered at once; the longest idle makes room."""
    session_ttl_s: float = 600.0
    """An idle session is forgotten after so many seconds."""

    def __post_init__(self) -> None:
        for name in (
            "max_seqs",
            "max_step_tokens",
            "page_size",
            "kv_bytes",
            "max_context",
            "max_queued",
            "max_programs",
            "tensor_parallel",
            "data_parallel",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise StartupError(f"{name} is {value}; it must be at least 1")
        if self.max_step_tokens < self.max_seqs:
            raise StartupError(
                f"max_step_tokens {self.max_step_tokens} is below max_seqs {self.max_seqs}: "
                "a step must hold one token of every running segment"
            )
        if self.host_kv_bytes is not None and self.host_kv_bytes < 0:
            raise StartupError(f"host_kv_bytes is {self.host_kv_bytes}; it must be 0, for no host tier, or more")
        if self.residency is not None and self.residency not in STRATEGIES:
            raise StartupError(f"residency {self.residency!r} is unknown; choose one of {', '.join(STRATEGIES)}")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise StartupError(f"dtype {self.dtype!r} is not served; choose one of {', '.join(DTYPES)}")
        if self.attention is not None and self.attention not in BACKENDS:
            raise StartupError(f"attention {self.attention!r} is unknown; choose one of {', '.join(BACKENDS)}")

    def weight_dtype(self) -> Any:
        default = "float32" if jax.default_backend() == "cpu" else "bfloat16"
        return jnp.dtype(self.dtype or default)

    def backend(self, model: ModelConfig, devices: Sequence[jax.Device]) -> Backend:
        """Of attention, for a model divided over ``devices``; see :func:`astraea_jax.kernels.choose`."""
        return choose(
            self.attention,
            devices[0].platform,
            heads=model.num_heads // len(devices),
            kv_heads=model.num_kv_heads // len(devices),
            head_dim=model.head_dim,
            page_size=self.page_size,
            dtype=self.weight_dtype(),
        )

    def meshes(self, model: ModelConfig) -> list[Mesh]:
        """The devices of each copy of the model.

        Raises:
            StartupError: there are too few, or they cannot divide the model.
        """
        devices, shared = jax.devices(), self.tensor_parallel
        wanted = shared * self.data_parallel
        if wanted > len(devices):
            raise StartupError(
                f"tensor_parallel {shared} times data_parallel {self.data_parallel} makes {wanted} devices, "
                f"and there are {len(devices)} ({devices[0].device_kind}); choose less"
            )
        meshes = [mesh_of(devices[first : first + shared]) for first in range(0, wanted, shared)]
        try:
            check_mesh(model, meshes[0])
        except CheckpointError as error:
            raise StartupError(str(error)) from None
        if model.vocab_size % shared:
            log.warning(
                "%d devices do not divide the %d tokens of the vocabulary: each holds the whole embedding",
                shared,
                model.vocab_size,
            )
        return meshes


@dataclass(frozen=True)
class Layout:
    """Sizes that follow from an :class:`EngineConfig` and a model."""

    dtype: Any
    backend: Backend
    """Of attention."""
    num_pages: int
    """Scrap page included."""
    page_bytes: int
    """On all devices that share it."""
    max_context: int
    pages_per_seq: int
    host: HostTier

    @classmethod
    def plan(cls, config: EngineConfig, model: ModelConfig, devices: Sequence[jax.Device]) -> Layout:
        """Fit the pages into the memory of ``devices``, once the weights are loaded.

        Raises:
            StartupError: ``max_context`` exceeds the model's limit or the pages, or attention or the host tier cannot
                be had; the message gives the numbers.
        """
        dtype = config.weight_dtype()
        budget = config.kv_bytes if config.kv_bytes is not None else min(map(_free_memory, devices))
        backend = config.backend(model, devices)
        one = page_bytes(model, backend, config.page_size, dtype, len(devices))
        num_pages = pages_within(budget, one // len(devices))
        held = (num_pages - 1) * config.page_size
        wanted = config.max_context or min(model.max_position, held)
        if wanted > model.max_position:
            raise StartupError(f"max_context {wanted} exceeds the model's {model.max_position} positions")
        if wanted > held:
            raise StartupError(f"max_context {wanted} exceeds the {held} tokens that the KV pages hold; raise kv_bytes")
        return cls(
            dtype=dtype,
            backend=backend,
            num_pages=num_pages,
            page_bytes=one,
            host=_host_tier(config.host_kv_bytes, one, num_pages - 1),
            max_context=wanted,
            pages_per_seq=-(-wanted // config.page_size),
        )


def _host_tier(budget: int | None, page: int, pool: int) -> HostTier:
    """The host tier that fits into ``budget`` bytes, for pages of ``page`` bytes and a pool of ``pool`` pages."""
    installed = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    pinned = has_pinned_host()
    if budget is None:
        if jax.default_backend() == "cpu":
            return HostTier()
        if not pinned:
            log.warning("this backend cannot pin host memory: KV under pressure is computed again, not moved")
            return HostTier()
        budget = min(int(HOST_SHARE * installed), GPU_PINNED_BYTES)
    if budget == 0:
        return HostTier()
    if budget > installed:
        raise StartupError(f"host_kv_bytes {budget} exceeds the {installed} bytes of this machine's memory")
    if not pinned:
        raise StartupError("this backend cannot pin host memory; start with host_kv_bytes 0, without a host tier")
    if budget < page:
        raise StartupError(
            f"host_kv_bytes {budget} holds no page of {page} bytes; raise it, or give 0 for no host tier"
        )
    return HostTier(budget // page, staging_pages(pool))


def staging_pages(pool: int) -> int:
    """Pages that may be on their way to the host at once, from a pool of so many."""
    return max(1, min(STAGING_PAGES, pool // 2))


def _free_memory(device: jax.Device) -> int:
    stats = device.memory_stats()
    if not stats or "bytes_limit" not in stats:
        return CPU_KV_BYTES
    return int(DEVICE_KV_SHARE * (stats["bytes_limit"] - stats["bytes_in_use"]))
