"""Dispatch of the steps: plans in, sampled tokens out, everything compiled before the first request."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from astraea_jax.cache.host import NOWHERE, block_sharding, block_sizes
from astraea_jax.cache.paged import PagedKV, jitted_transfers, make_pages
from astraea_jax.kernels import Backend
from astraea_jax.models.decoder import Decoder
from astraea_jax.models.sharding import default_mesh
from astraea_jax.sampling import SamplingParams
from astraea_jax.scheduler.plan import Plan, Row
from astraea_jax.step import COLUMNS, Sizes, Step, StepShape

Progress = Callable[[int, int], None]
"""Called with (done, total)."""


@dataclass(frozen=True)
class InFlight:
    """A dispatched step; its tokens are read when the next one has been dispatched."""

    plan: Plan
    tokens: jax.Array
    """``[R]`` int32: what each row sampled; -1 where the logits were not finite."""
    dispatched: float
    """By ``time.perf_counter``."""

    @property
    def done(self) -> bool:
        """Whether the device has finished it."""
        return bool(self.tokens.is_ready())  # type: ignore[attr-defined]


class Runner:
    """Owns the device: weights, pages, and the compiled steps. Used by one thread only, since steps donate the pages.

    Args:
        decoder: the model; its arrays are flattened once, here.
        backend: of attention.
        sizes: of the arrays.
        mesh: the devices that share the model; None: the first one has it.
        staging: pages of the largest transfer to or from the host; 0: there are none.
    """

    def __init__(
        self,
        decoder: Decoder,
        backend: Backend,
        sizes: Sizes,
        *,
        mesh: Mesh | None = None,
        staging: int = 0,
    ):
        self._step = Step(decoder, backend, sizes, mesh or default_mesh())
        self._leaves = self._step.pack(decoder)
        self._batch_sizes = {shape: self._step.batch(shape).shape for shape in self._step.shapes}
        self._pages: PagedKV = make_pages(self._step.pages)
        self._last = jnp.zeros(sizes.max_seqs, jnp.int32, device=self._step.whole)
        self._shapes = self._step.shapes
        self._compiled: dict[StepShape, Any] = {}
        self._blocks = block_sizes(staging)
        self.block_sharding = block_sharding(self._pages[0])
        """Of a block of pages on the device."""
        self._gathers: dict[int, Any] = {}
        self._scatters: dict[int, Any] = {}
        self._sampling = np.zeros((sizes.max_seqs, 5), np.int32)  # top_k, and bits: seed, temperature, top_p, min_p

    def compile(self, progress: Progress = lambda done, total: None) -> None:
        """Compile every step shape, several at a time, and run each once on scrap so that nothing is left to set up."""
        self._compile_transfers()
        shapes = self._shapes

        def build(shape: StepShape) -> Any:
            return self._step.jitted(shape).lower(*self._step.arguments(shape)).compile()

        lowered = 0
        with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
            for shape, compiled in zip(shapes, pool.map(build, shapes), strict=True):
                self._compiled[shape] = compiled
                lowered += 1
                progress(lowered, len(shapes))
        for shape in shapes:
            self._launch(shape, self._empty_batch(shape)).block_until_ready()

    def _compile_transfers(self) -> None:
        gather, scatter = jitted_transfers(self._step.pages, self._step.whole)
        for size in self._blocks:
            ids = np.zeros(size, np.int32)
            self._gathers[size] = gather.lower(self._pages, ids).compile()
            block = self.gather([0] * size)
            self._scatters[size] = scatter.lower(self._pages, block, ids).compile()
            self.scatter(block, np.full(size, NOWHERE, np.int32))

    def gather(self, pages: Sequence[int]) -> jax.Array:
        """Read pages into one block ``[n, L, …]``; they may be written again at once. n is a block size."""
        block: jax.Array = self._gathers[len(pages)](self._pages, np.asarray(pages, np.int32))
        return block

    def scatter(self, block: jax.Array, pages: np.ndarray) -> None:
        """Write a block to ``pages [n]`` int32; ids beyond the pool are passed over."""
        self._pages = self._scatters[len(pages)](self._pages, block, pages)

    def _empty_batch(self, shape: StepShape) -> np.ndarray:
        return np.zeros(self._batch_sizes[shape], np.int32)

    def set_sampling(self, slot: int, params: SamplingParams) -> None:
        """Choose how the rows of ``slot`` sample from the next dispatch on."""
        self._sampling[slot, :2] = min(params.top_k, 2**31 - 1), np.uint32(params.seed).astype(np.int32)
        self._sampling[slot, 2:].view(np.float32)[:] = params.temperature, params.top_p, params.min_p

    def dispatch(self, plan: Plan, page_table: np.ndarray) -> InFlight:
        """Start a step and return at once. ``page_table`` is the scheduler's, ``[max_seqs, M]`` by slot."""
        rows = plan.rows
        shape = self._fitting(len(rows), plan.tokens)
        # A fresh array for every step: on a CPU the device may read it in place while the host goes on.
        batch = self._empty_batch(shape)
        head = batch[shape.tokens :].reshape(shape.rows, -1)[: len(rows)]
        numbers: list[int] = []
        for segment, start, count, samples in rows:
            numbers += segment.slot, start, count, samples
        head[:, :4] = np.array(numbers, np.int32).reshape(-1, 4)
        slots = head[:, 0]
        head[:, 4:COLUMNS] = self._sampling[slots]
        head[:, COLUMNS:] = page_table[slots]
        _fill_tokens(batch[: plan.tokens], rows)
        sampled = self._launch(shape, batch)
        sampled.copy_to_host_async()
        return InFlight(plan, sampled, time.perf_counter())

    def _fitting(self, rows: int, tokens: int) -> StepShape:
        """The smallest shape that holds the step."""
        decode = rows == tokens
        return next(s for s in self._shapes if (s.q_tile == 1) == decode and s.tokens >= tokens)

    def _launch(self, shape: StepShape, batch: np.ndarray) -> jax.Array:
        self._pages, self._last, sampled = self._compiled[shape](self._leaves, self._pages, self._last, batch)
        return sampled

    def read(self, step: InFlight) -> list[int]:
        """Wait for a step's tokens, one per row of its plan."""
        return np.asarray(step.tokens)[: len(step.plan.rows)].tolist()


def _fill_tokens(tokens: np.ndarray, rows: Sequence[Row]) -> None:
    tokens[:] = -1  # the usual decode: only the device knows its token yet
    at = 0
    for segment, start, count, _ in rows:
        if start < segment.known:
            segment.copy_tokens(start, tokens[at : at + count])
        at += count


class CompileGuard:
    """Notices a compilation on the thread that armed it: after start-up every shape must be ready.

    JAX keeps event listeners for ever, so one listener serves every guard of the process.
    """

    _armed: dict[int, CompileGuard] = {}  # noqa: RUF012
    _listening = False

    def __init__(self) -> None:
        self.compiled: list[str] = []

    def arm(self) -> None:
        if not CompileGuard._listening:
            jax.monitoring.register_event_duration_secs_listener(CompileGuard._on_event)
            CompileGuard._listening = True
        CompileGuard._armed[threading.get_ident()] = self

    def disarm(self) -> None:
        CompileGuard._armed.pop(threading.get_ident(), None)

    def check(self) -> None:
        """Raise RuntimeError if anything was compiled since the guard was armed."""
        if self.compiled:
            raise RuntimeError(f"compiled after start-up: {self.compiled[0]}; a step shape was not compiled ahead")

    @staticmethod
    def _on_event(event: str, duration_secs: float, **_: str | int) -> None:
        guard = CompileGuard._armed.get(threading.get_ident())
        if guard is not None and "backend_compile" in event:
            guard.compiled.append(f"{event} ({duration_secs:.2f} s)")
