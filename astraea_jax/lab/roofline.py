"""The roofline of this machine: measured rates, and the least times that follow from them for a model.

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
"""Runs that are dispatched together, so that the time of dispatch does not count."""


@dataclass(frozen=True)
class Roofline:
    """Measured rates of this machine, in 1e9 bytes and 1e12 operations per second."""

    read_gb_s: float
    """Rate at which a large array is summed."""
    copy_gb_s: float
    """Rate at which a large array is copied; reads and writes both count."""
    matmul_tflop_s: float
    """Rate at which square matrices are multiplied."""

    @classmethod
    def measure(cls, dtype: Any) -> Roofline:
        """Measure for a second or two; needs 2 GiB on an accelerator, so do it before an engine takes the memory.

        Args:
            dtype: dtype of the matrices.
        """
        on_cpu = jax.default_backend() == "cpu"
        large = [jnp.ones(2**26 if on_cpu else 2**28, jnp.float32)]
        n = 2048 if on_cpu else 8192
        square = jnp.ones((n, n), dtype)
        total, product = jax.jit(jnp.sum), jax.jit(lambda x: x @ x)
        count = large[0].nbytes
        best = partial(best_seconds, queued=1 if on_cpu else QUEUED)  # on a CPU dispatch takes no time
        read_s = best(lambda: total(large[0]))
        matmul_s = best(lambda: product(square))
        bump = jax.jit(lambda x: x + 1, donate_argnums=0)  # in place: there may be no room for a second one

        def copy() -> jax.Array:
            large.append(bump(large.pop()))
            return large[0]

        return cls(count / read_s / 1e9, 2 * count / best(copy) / 1e9, 2 * n**3 / matmul_s / 1e12)

    def __str__(self) -> str:
        return (
            f"roofline: read {self.read_gb_s:,.1f} GB/s, copy {self.copy_gb_s:,.1f} GB/s (both ways), "
            f"matmul {self.matmul_tflop_s:,.3f} TFLOP/s"
        )

    def read_s(self, count: float) -> float:
        """Seconds to read ``count`` bytes."""
        return count / (self.read_gb_s * 1e9)

    def matmul_s(self, operations: float) -> float:
        """Seconds of ``operations`` floating-point operations."""
        return operations / (self.matmul_tflop_s * 1e12)


def best_seconds(run: Callable[[], jax.Array], repeats: int = 7, queued: int = QUEUED) -> float:
    """Shortest time per run of ``queued`` runs dispatched together, over ``repeats`` tries after a first one."""
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
    """Bytes and operations that a model requires of each of the devices that share it."""

    model: ModelConfig
    weights: int
    """Bytes of the weights that a decode step reads: all but the embedding rows of other tokens."""
    kv_token: float
    """Bytes of one token's keys and values."""
    devices: int = 1

    @classmethod
    def of(cls, model: ModelConfig, config: EngineConfig, layout: Layout) -> Work:
        """The work of an engine; weights have the configured dtype, even if the checkpoint stores 8-bit ones."""
        itemsize, quantized = layout.dtype.itemsize, config.quantized()
        layers = model.layer_weights * (quantized.bytes_per_weight if quantized else itemsize)
        weights = layers + model.vocab_size * model.hidden_size * itemsize
        return cls(model, weights, layout.page_bytes / config.page_size, config.tensor_parallel)

    def decode_bytes(self, steps: int, read_tokens: float) -> float:
        """Bytes that ``steps`` decode steps read if the contexts of the decoded tokens add up to ``read_tokens``."""
        return (steps * self.weights + read_tokens * self.kv_token) / self.devices

    def prefill_operations(self, prompts: Sequence[int]) -> float:
        """Floating-point operations to prefill prompts of these lengths and compute the logits of one token each."""
        c = self.model
        attention = 2 * c.num_layers * c.num_heads * c.head_dim  # two products, causal: half of each square
        head = 2 * c.vocab_size * c.hidden_size
        return sum(2 * c.active_weights * n + attention * n * n + head for n in prompts) / self.devices
