"""Dispatch of the steps: plans in, sampled tokens out, everything compiled before the first request."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from astraea_jax.engine.compilation import compile_all
from astraea_jax.engine.sampling import SamplingParams
from astraea_jax.engine.step import Sizes, Step, StepShape
from astraea_jax.kernels import Backend
from astraea_jax.kv_cache.arrays import PagedKV, make_pages
from astraea_jax.kv_cache.offload import NOWHERE, PINNED, block_sharding, block_sizes
from astraea_jax.models.decoder import Decoder
from astraea_jax.models.sharding import default_mesh
from astraea_jax.scheduler.plan import Plan

CHANGES = 2048
"""New entries of the page table that are sent at once, by themselves; a step takes along one for each of its rows."""

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


@dataclass
class StepTimes:
    """Where the loop's time has gone, in seconds, summed over ``steps``."""

    steps: int = 0
    tokens: int = 0
    """Computed by the model, prefill included."""
    plan_s: float = 0.0
    dispatch_s: float = 0.0
    wait_s: float = 0.0
    """Waiting for the device: the part that is not host work."""
    commit_s: float = 0.0
    cpu_s: float = 0.0
    """Processor time of the loop's thread; less than the three above where it shares the cores with the device."""
    starved: int = 0
    """Steps dispatched only after the one before had ended: the device waited for the host."""


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
        self._pages: PagedKV = make_pages(self._step.pages)
        self._last = jnp.zeros(sizes.max_seqs, jnp.int32, device=self._step.whole)
        self._table = jnp.zeros(self._step.table.shape, jnp.int32, device=self._step.whole)
        self.shapes = self._step.shapes
        """Of the steps."""
        self._compiled: dict[tuple[str, Any], Any] = {}
        self._blocks = block_sizes(staging)
        self.block_sharding = block_sharding(self._pages[0])
        """Of a block of pages on the device."""
        self._sampling = np.zeros((sizes.max_seqs, 5), np.int32)  # top_k, and bits: seed, temperature, top_p, min_p

    def compile(self, progress: Progress = lambda done, total: None) -> None:
        """Compile every step shape and size of transfer, and run each once on scrap: nothing is left to set up."""
        gather, scatter = self._step.transfers()
        lowerings: dict[tuple[str, Any], Callable[[], Any]] = {}
        for shape in self.shapes:
            lowerings["step", shape] = partial(self._step.jitted(shape).lower, *self._step.arguments(shape))
        for size in self._blocks:
            ids = np.zeros(size, np.int32)
            block = jax.eval_shape(gather, self._step.pages, ids)
            lowerings["gather", size] = partial(gather.lower, self._step.pages, ids)
            lowerings["scatter", size] = partial(scatter.lower, self._step.pages, block, ids)
        writing = self._step.table, jax.ShapeDtypeStruct((2 * CHANGES,), jnp.int32, sharding=self._step.whole)
        lowerings["table", CHANGES] = partial(self._step.writer().lower, *writing)
        self._compiled = compile_all(lowerings, progress)
        self._meet()
        self.write_table(np.full(2 * CHANGES, NOWHERE, np.int32))
        for shape in self.shapes:
            self.launch(shape, self._empty_batch(shape)).block_until_ready()
        for size in self._blocks:
            there = self.put(self.gather([0] * size), self.block_sharding.with_memory_kind(PINNED))
            block = self.put(there, self.block_sharding)  # over several processes copies are compiled, too
            self.scatter(block, np.full(size, NOWHERE, np.int32))

    def _meet(self) -> None:
        """All who share the arrays have compiled: what they run together does not wait long for any of them."""

    @property
    def executables(self) -> int:
        """How many programs of the device have been compiled."""
        return len(self._compiled)

    def gather(self, pages: Sequence[int]) -> jax.Array:
        """Read pages into one block ``[n, L, …]``; they may be written again at once. n is a block size."""
        block: jax.Array = self._compiled["gather", len(pages)](self._pages, np.asarray(pages, np.int32))
        return block

    def scatter(self, block: jax.Array, pages: np.ndarray) -> None:
        """Write a block to ``pages [n]`` int32; ids beyond the pool are passed over."""
        self._pages = self._compiled["scatter", len(pages)](self._pages, block, pages)

    def put(self, block: jax.Array, sharding: jax.sharding.Sharding) -> jax.Array:
        """Copy a block to the host or back, and return at once."""
        return jax.device_put(block, sharding)

    def close(self) -> None:
        """Nothing will be dispatched any more."""

    def _empty_batch(self, shape: StepShape) -> np.ndarray:
        batch = np.zeros(shape.numbers, np.int32)
        _, _, changes = shape.parts(batch)
        changes[:] = NOWHERE
        return batch

    def set_sampling(self, slot: int, params: SamplingParams) -> None:
        """Choose how the rows of ``slot`` sample from the next dispatch on."""
        self._sampling[slot, :2] = min(params.top_k, 2**31 - 1), np.uint32(params.seed).astype(np.int32)
        self._sampling[slot, 2:].view(np.float32)[:] = params.temperature, params.top_p, params.min_p

    def dispatch(self, plan: Plan) -> InFlight:
        """Start a step and return at once."""
        rows = len(plan.requests)
        shape = self._fitting(rows, plan.tokens)
        # A fresh array for every step: on a CPU the device may read it in place while the host goes on.
        batch = self._empty_batch(shape)
        tokens, head, changes = shape.parts(batch)
        head = head[:rows]
        head[:, 0], head[:, 1], head[:, 2] = plan.slots, plan.starts, plan.counts
        head[: plan.samples, 3] = 1
        head[:, 4:] = self._sampling[plan.slots]
        if plan.changes:
            self._change(changes, plan.changes)
        _fill_tokens(tokens[: plan.tokens], plan)
        sampled = self.launch(shape, batch)
        sampled.copy_to_host_async()
        return InFlight(plan, sampled, time.perf_counter())

    def _change(self, taken: np.ndarray, changes: list[tuple[int, int, list[int]]]) -> None:
        """Write what is new in the page table into what the step takes along, ``[2, R]``; what is more than that, at
        once."""
        width = self._step.table.shape[1]
        places: list[int] = []
        for slot, first, pages in changes:
            at = slot * width + first
            places += range(at, at + len(pages))
        new = np.array([places, [page for *_, pages in changes for page in pages]], np.int32)
        ahead = max(0, new.shape[1] - taken.shape[1])
        for at in range(0, ahead, CHANGES):
            some = new[:, at : min(at + CHANGES, ahead)]
            message = np.full((2, CHANGES), NOWHERE, np.int32)
            message[:, : some.shape[1]] = some
            self.write_table(message.reshape(-1))
        taken[:, : new.shape[1] - ahead] = new[:, ahead:]

    def _fitting(self, rows: int, tokens: int) -> StepShape:
        """The smallest shape that holds the step."""
        decode = rows == tokens
        return next(s for s in self.shapes if (s.q_tile == 1) == decode and s.tokens >= tokens)

    def launch(self, shape: StepShape, batch: np.ndarray) -> jax.Array:
        """Start the step of this shape with what the host says, and return ``[R]`` int32, its sampled tokens."""
        step = self._compiled["step", shape]
        self._pages, self._last, self._table, sampled = step(self._leaves, self._pages, self._last, self._table, batch)
        return sampled

    def write_table(self, changes: np.ndarray) -> None:
        """Put new entries into the page table, as :meth:`.step.Step.writer` takes them."""
        self._table = self._compiled["table", CHANGES](self._table, changes)

    def read(self, step: InFlight) -> list[int]:
        """Wait for a step's tokens, one per row that samples."""
        return np.asarray(step.tokens)[: step.plan.samples].tolist()


def _fill_tokens(tokens: np.ndarray, plan: Plan) -> None:
    tokens[:] = -1  # the usual decode: the device has its token
    at = plan.num_decodes
    for i in range(plan.num_decodes, len(plan.requests)):
        request, start, count = plan.requests[i], int(plan.starts[i]), int(plan.counts[i])
        if start < request.num_tokens:
            request.copy_tokens(start, tokens[at : at + count])
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
