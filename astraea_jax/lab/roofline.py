"""What this machine could do at best: rates that are measured, and the floors that follow from them for a model.

A decode step cannot be faster than reading the weights and the KV of its contexts at the measured read bandwidth, nor
a prefill faster than its multiplications at the measured matmul rate.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from astraea_jax.engine.config import EngineConfig
from astraea_jax.engine.layout import Layout
from astraea_jax.models.config import ModelConfig

QUEUED = 4
"""Runs that are dispatched together, so that the time to dispatch one does not count."""


@dataclass(frozen=True)
class Floors:
    """Rates of this machine, measured now; bytes and operations in 1e9 and 1e12."""

    read_gb_s: float
    """A large array is summed."""
    copy_gb_s: float
    """One is read and written; both count."""
    matmul_tflop_s: float
    """Square matrices are multiplied."""

    @classmethod
    def measure(cls, dtype: Any) -> Floors:
        """Takes a second or two, and 2 GiB on an accelerator: measure before an engine takes the memory.

        Args:
            dtype: of the matrices.
        """
        on_cpu = jax.default_backend() == "cpu"
        large = [jnp.ones(2**26 if on_cpu else 2**28, jnp.float32)]
        n = 2048 if on_cpu else 8192
        square = jnp.ones((n, n), dtype)
        total, product = jax.jit(jnp.sum), jax.jit(lambda x: x @ x)
        count = large[0].nbytes
        best = partial(best_seconds, queued=1 if on_cpu else QUEUED)  # there, dispatch is nothing beside these runs
        read_s = best(lambda: total(large[0]))
        matmul_s = best(lambda: product(square))
        bump = jax.jit(lambda x: x + 1, donate_argnums=0)  # in place: there may be no room for a second one

        def copy() -> jax.Array:
            large.append(bump(large.pop()))
            return large[0]

        return cls(count / read_s / 1e9, 2 * count / best(copy) / 1e9, 2 * n**3 / matmul_s / 1e12)

    def __str__(self) -> str:
        return (
            f"floors: read {self.read_gb_s:,.1f} GB/s, copy {self.copy_gb_s:,.1f} GB/s (both ways), "
            f"matmul {self.matmul_tflop_s:,.3f} TFLOP/s"
        )

    def read_s(self, count: float) -> float:
        """Seconds to read so many bytes."""
        return count / (self.read_gb_s * 1e9)

    def matmul_s(self, operations: float) -> float:
        """Seconds of so many floating-point operations."""
        return operations / (self.matmul_tflop_s * 1e12)


def best_seconds(run: Callable[[], jax.Array], repeats: int = 7, queued: int = QUEUED) -> float:
    """Shortest time of one of ``queued`` runs dispatched together, of several tries after one to warm up."""
    run().block_until_ready()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        for _ in range(queued):
            last = run()
        last.block_until_ready()
        times.append((time.perf_counter() - began) / queued)
    return min(times)


@dataclass(frozen=True)
class Work:
    """What a model asks of each of the devices that share it."""

    model: ModelConfig
    weights: int
    """Bytes of all weights that a decode step reads: every one but the embedding rows of other tokens."""
    kv_token: float
    """Bytes of one token's keys and values."""
    devices: int = 1

    @classmethod
    def of(cls, model: ModelConfig, config: EngineConfig, layout: Layout) -> Work:
        """Of an engine; weights count as the configuration has them, even if the checkpoint's were in eight bits."""
        wide, narrow = layout.dtype.itemsize, config.narrow_dtype()
        layers = model.layer_weights * (narrow.itemsize if narrow else wide)
        weights = layers + model.vocab_size * model.hidden_size * wide
        return cls(model, weights, layout.page_bytes / config.page_size, config.tensor_parallel)

    def decode_bytes(self, steps: int, read_tokens: float) -> float:
        """What so many decode steps read, whose decoded tokens have contexts of ``read_tokens`` in all."""
        return (steps * self.weights + read_tokens * self.kv_token) / self.devices

    def prefill_operations(self, prompts: Sequence[int]) -> float:
        """Floating-point operations of computing prompts of these lengths, and one token's scores of each."""
        c = self.model
        attention = 2 * c.num_layers * c.num_heads * c.head_dim  # two products, causal: half of each square
        head = 2 * c.vocab_size * c.hidden_size
        return sum(2 * c.layer_weights * n + attention * n * n + head for n in prompts) / self.devices
