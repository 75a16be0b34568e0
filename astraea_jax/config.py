"""What the engine is told, and what follows from it for a model on this machine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from astraea_jax.cache.paged import page_bytes, pages_within
from astraea_jax.errors import StartupError
from astraea_jax.models.config import ModelConfig

CPU_KV_BYTES = 512 * 2**20
DEVICE_KV_SHARE = 0.85
"""Of the accelerator memory that is free once the weights are loaded; the rest is for activations."""
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
    """Device memory for KV pages. None: most of what is free on an accelerator, 512 MiB on a CPU."""
    max_context: int | None = None
    """Prompt and output tokens of one segment. None: the model's own limit, or less if the pages do not hold it."""
    dtype: str | None = None
    """Of weights and KV. None: float32 on a CPU, bfloat16 elsewhere."""
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
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise StartupError(f"{name} is {value}; it must be at least 1")
        if self.max_step_tokens < self.max_seqs:
            raise StartupError(
                f"max_step_tokens {self.max_step_tokens} is below max_seqs {self.max_seqs}: "
                "a step must hold one token of every running segment"
            )
        if self.dtype is not None and self.dtype not in DTYPES:
            raise StartupError(f"dtype {self.dtype!r} is not served; choose one of {', '.join(DTYPES)}")

    def weight_dtype(self) -> Any:
        default = "float32" if jax.default_backend() == "cpu" else "bfloat16"
        return jnp.dtype(self.dtype or default)


@dataclass(frozen=True)
class Layout:
    """Sizes that follow from an :class:`EngineConfig` and a model."""

    dtype: Any
    num_pages: int
    """Scrap page included."""
    page_bytes: int
    max_context: int
    pages_per_seq: int

    @classmethod
    def plan(cls, config: EngineConfig, model: ModelConfig) -> Layout:
        """Fit the pages into memory, once the weights are loaded.

        Raises:
            StartupError: ``max_context`` exceeds the model's limit or the pages; the message gives the numbers.
        """
        dtype = config.weight_dtype()
        budget = config.kv_bytes if config.kv_bytes is not None else _free_memory()
        num_pages = pages_within(budget, model, config.page_size, dtype)
        held = (num_pages - 1) * config.page_size
        wanted = config.max_context or min(model.max_position, held)
        if wanted > model.max_position:
            raise StartupError(f"max_context {wanted} exceeds the model's {model.max_position} positions")
        if wanted > held:
            raise StartupError(f"max_context {wanted} exceeds the {held} tokens that the KV pages hold; raise kv_bytes")
        return cls(
            dtype=dtype,
            num_pages=num_pages,
            page_bytes=page_bytes(model, config.page_size, dtype),
            max_context=wanted,
            pages_per_seq=-(-wanted // config.page_size),
        )


def _free_memory() -> int:
    stats = jax.local_devices()[0].memory_stats()
    if not stats or "bytes_limit" not in stats:
        return CPU_KV_BYTES
    return int(DEVICE_KV_SHARE * (stats["bytes_limit"] - stats["bytes_in_use"]))
