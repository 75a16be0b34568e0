"""What the engine is told, and what follows from it for a model on this machine."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from astraea_jax.engine.devices import free_bytes
from astraea_jax.errors import StartupError
from astraea_jax.kernels import BACKENDS, Backend, choose
from astraea_jax.kv_cache.arrays import page_bytes, pages_within
from astraea_jax.kv_cache.offload import LARGEST_BLOCK, has_pinned_host
from astraea_jax.models.config import CheckpointError, ModelConfig
from astraea_jax.models.quantize import EIGHT_BITS
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
KV_DTYPES = ("fp8",)
"""Those narrower than the activations."""


@dataclass(frozen=True)
class EngineConfig:
    """Sizes and policy of an engine.

    Raises:
        StartupError: a value makes no sense by itself.
    """

    max_seqs: int = 64
    """Requests that run at once."""
    max_step_tokens: int = 512
    """Tokens of one step, prefill and decode together."""
    page_size: int = 16
    """Tokens per KV page."""
    kv_bytes: int | None = None
    """Memory for KV pages on each device. None: most of what is free on an accelerator, 512 MiB on a CPU."""
    host_kv_bytes: int | None = None
    """Pinned memory of each host for KV of programs that wait, under memory pressure. 0: none. None: half of it
    (60 GiB at most) on an accelerator, none on a CPU, where it is the same memory."""
    residency: str | None = None
    """Strategy for the KV of programs that wait; None: the policy's own, or else adaptive."""
    max_context: int | None = None
    """Prompt and output tokens of one request. None: the model's own limit, or less if the pages do not hold it."""
    dtype: str | None = None
    """Of activations, and of weights and KV unless told otherwise. None: float32 on a CPU, bfloat16 elsewhere."""
    quantize: str | None = None
    """The layers' weight matrices in eight bits, ``"int8"`` or ``"fp8"``, with a scale for every output channel. None:
    as they are stored if that is in eight bits, else in ``dtype``."""
    kv_dtype: str | None = None
    """``"fp8"`` (float8_e4m3fn, as it is, clipped at 448): twice the tokens of 16 bits in the same memory. None:
    ``dtype``."""
    tensor_parallel: int = 1
    """Devices that share one copy of the model and its KV."""
    data_parallel: int = 1
    """Copies of the model in this process, each with devices, KV and running requests of its own. The other sizes are
    those of one copy, but host_kv_bytes, which all of them share."""
    attention: str | None = None
    """Backend of attention; None: the one for this kind of device."""
    scan_layers: bool | None = None
    """The layers as one loop over stacked weights and pages, compiled once instead of once for each layer. None: on a
    TPU, where a layer is read out of the stack as it is used; a GPU would copy its weights first."""
    policy: str = "astraea"
    compile_cache: str | None = None
    """Folder where compiled steps are kept for later starts. None: as JAX is configured, by default nowhere."""
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
                "a step must hold one token of every running request"
            )
        if self.host_kv_bytes is not None and self.host_kv_bytes < 0:
            raise StartupError(f"host_kv_bytes is {self.host_kv_bytes}; it must be 0, for no host tier, or more")
        if self.residency is not None and self.residency not in STRATEGIES:
            raise StartupError(f"residency {self.residency!r} is unknown; choose one of {', '.join(STRATEGIES)}")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise StartupError(f"dtype {self.dtype!r} is not served; choose one of {', '.join(DTYPES)}")
        if self.quantize is not None and self.quantize not in EIGHT_BITS:
            raise StartupError(f"quantize {self.quantize!r} is not served; choose one of {', '.join(EIGHT_BITS)}")
        if self.kv_dtype is not None and self.kv_dtype not in KV_DTYPES:
            raise StartupError(f"kv_dtype {self.kv_dtype!r} is not served; choose one of {', '.join(KV_DTYPES)}")
        if self.attention is not None and self.attention not in BACKENDS:
            raise StartupError(f"attention {self.attention!r} is unknown; choose one of {', '.join(BACKENDS)}")

    def weight_dtype(self) -> Any:
        default = "float32" if jax.default_backend() == "cpu" else "bfloat16"
        return jnp.dtype(self.dtype or default)

    def narrow_dtype(self) -> Any:
        """The eight-bit dtype of the layers' matrices, or None.

        Raises:
            StartupError: this device cannot compute with it.
        """
        return None if self.quantize is None else _on_device(EIGHT_BITS[self.quantize], "quantize")

    def page_dtype(self) -> Any:
        """Of keys and values.

        Raises:
            StartupError: this device cannot compute with it.
        """
        return self.weight_dtype() if self.kv_dtype is None else _on_device(EIGHT_BITS[self.kv_dtype], "kv_dtype")

    def stacks(self) -> bool:
        """Whether the layers are one loop."""
        return jax.default_backend() == "tpu" if self.scan_layers is None else self.scan_layers

    def backend(self, model: ModelConfig) -> Backend:
        """Of attention, for this model.

        Raises:
            StartupError: what is named cannot be had, or serves no such model.
        """
        return choose(
            self.attention,
            jax.default_backend(),
            kv_heads=model.num_kv_heads // self.tensor_parallel,
            head_dim=model.head_dim,
            page_size=self.page_size,
            dtype=self.page_dtype(),
        )

    def meshes(self, model: ModelConfig) -> list[Mesh]:
        """The devices of each copy of the model.

        Raises:
            StartupError: there are too few, or they cannot divide the model.
        """
        devices, shared = jax.devices(), self.tensor_parallel
        wanted = shared * self.data_parallel
        if jax.process_count() > 1 and (self.data_parallel > 1 or wanted != len(devices)):
            raise StartupError(
                f"{jax.process_count()} processes serve one copy of the model on all their devices; "
                f"start each with tensor_parallel {len(devices)} and data_parallel 1"
            )
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
    """Of activations."""
    kv_dtype: Any
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
    def plan(cls, config: EngineConfig, model: ModelConfig, mesh: Mesh) -> Layout:
        """Fit the pages into the memory of the devices, once the weights are loaded; the same in every process.

        Raises:
            StartupError: ``max_context`` exceeds the model's limit or the pages, or attention or the host tier cannot
                be had; the message gives the numbers.
        """
        kv_dtype, backend = config.page_dtype(), config.backend(model)
        budget = config.kv_bytes if config.kv_bytes is not None else _free_memory(mesh)
        one = page_bytes(model, backend, config.page_size, kv_dtype, mesh.size)
        num_pages = pages_within(budget, one // mesh.size)
        held = (num_pages - 1) * config.page_size
        wanted = config.max_context or min(model.max_position, held)
        if wanted > model.max_position:
            raise StartupError(f"max_context {wanted} exceeds the model's {model.max_position} positions")
        if wanted > held:
            raise StartupError(f"max_context {wanted} exceeds the {held} tokens that the KV pages hold; raise kv_bytes")
        return cls(
            dtype=config.weight_dtype(),
            kv_dtype=kv_dtype,
            backend=backend,
            num_pages=num_pages,
            page_bytes=one,
            host=_host_tier(config.host_kv_bytes, one // jax.process_count(), num_pages - 1, config.data_parallel),
            max_context=wanted,
            pages_per_seq=-(-wanted // config.page_size),
        )


def _host_tier(budget: int | None, page: int, pool: int, copies: int) -> HostTier:
    """The host tier of one of so many ``copies`` of the model that share ``budget`` bytes of this machine, for pages of
    ``page`` bytes in its memory and a pool of ``pool`` pages."""
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
    if budget < copies * page:
        raise StartupError(
            f"host_kv_bytes {budget} holds no page of {page} bytes{f' for each of {copies} copies' * (copies > 1)}; "
            "raise it, or give 0 for no host tier"
        )
    return HostTier(budget // copies // page, staging_pages(pool))


def _on_device(dtype: Any, option: str) -> Any:
    """``dtype``, if this device turns wide numbers into it and back: asked of the device, not of a table."""
    numbers = np.array([-112, -1, 0, 3, 120], np.float32)  # exact in both
    try:
        narrow = jax.jit(lambda x: x.astype(dtype))(numbers)
        back = np.asarray(jax.jit(lambda x: x.astype(jnp.float32) + 0.0)(narrow))
    except Exception as error:  # the kinds of error differ between compilers
        back = np.array((str(error) or type(error).__name__).splitlines()[0])
    if not np.array_equal(back, numbers):
        kind = jax.local_devices()[0].device_kind
        raise StartupError(f"{option}: {kind} cannot compute with {dtype} ({back}); start without --{option}")
    return dtype


def staging_pages(pool: int) -> int:
    """Pages that may be on their way to the host at once, from a pool of so many."""
    return max(1, min(STAGING_PAGES, pool // 2))


def _free_memory(mesh: Mesh) -> int:
    """Bytes that every device of the mesh has for pages."""
    here = free_bytes(mesh)
    free = CPU_KV_BYTES if here is None else int(DEVICE_KV_SHARE * here)
    if jax.process_count() > 1:
        free = int(multihost_utils.process_allgather(np.int32(free // 2**20)).min()) * 2**20
    return free
