"""The jitted step and its dispatch: plans in, sampled tokens out, everything compiled before the first request.

One step runs a ragged batch: ``R`` rows (one per running segment), ``T`` tokens laid end to end. A row whose last
token the host has not read yet carries -1 there, and the device substitutes the token it sampled for that slot in the
step before; so the host never has to wait for a step to dispatch the next.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from astraea_jax.cache.host import NOWHERE, block_sharding, block_sizes
from astraea_jax.cache.paged import PagedKV, gather_pages, make_pages, scatter_pages
from astraea_jax.kernels import Backend, Batch
from astraea_jax.models.decoder import Decoder
from astraea_jax.sampling import SamplingParams, sample
from astraea_jax.scheduler.plan import Plan

PREFILL_TILE = 16
"""Query tokens of one row that attend together in a step with prefill."""

COLUMNS = 9
"""Numbers of a row before its pages: slot, start, count, samples, top_k; bits of seed, temperature, top_p, min_p."""

Progress = Callable[[int, int], None]
"""Called with (done, total)."""


@dataclass(frozen=True)
class StepShape:
    """Static shape of one compiled step: ``tokens`` T, ``rows`` R, and the query tile of its attention."""

    tokens: int
    rows: int
    q_tile: int
    """1: every row has one token at most, and token t is row t's."""


def step_shapes(max_seqs: int, max_step_tokens: int) -> tuple[StepShape, ...]:
    """The few shapes that are compiled: powers of two of rows for decode, of tokens for steps with prefill."""
    decode = [StepShape(n, n, 1) for n in _doubling(min(8, max_seqs), max_seqs)]
    lowest = min(max(64, 2 * max_seqs), max_step_tokens)
    return (*decode, *(StepShape(n, max_seqs, PREFILL_TILE) for n in _doubling(lowest, max_step_tokens)))


def _doubling(low: int, high: int) -> list[int]:
    sizes = [low]
    while sizes[-1] < high:
        sizes.append(min(2 * sizes[-1], high))
    return sizes


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
        num_pages: pages per layer, scrap page included.
        page_size: tokens per page.
        max_seqs: rows of the largest step.
        max_step_tokens: tokens of the largest step.
        max_pages_per_seq: width of the page table.
        kv_dtype: of the pages.
        staging: pages of the largest transfer to or from the host; 0: there are none.
    """

    def __init__(
        self,
        decoder: Decoder,
        backend: Backend,
        *,
        num_pages: int,
        page_size: int,
        max_seqs: int,
        max_step_tokens: int,
        max_pages_per_seq: int,
        kv_dtype: Any,
        staging: int = 0,
    ):
        graph, state = nnx.split(decoder)
        leaves, tree = jax.tree.flatten(state)
        self._leaves = _pack(leaves)
        model = partial(_model, graph, tree, [leaf.shape for leaf in leaves])
        self._step = partial(_step, model, backend, page_size)
        self._pages: PagedKV = make_pages(decoder.config, backend, num_pages, page_size, kv_dtype)
        self._last = jnp.zeros(max_seqs, jnp.int32)
        self._table_width = max_pages_per_seq
        self._shapes = step_shapes(max_seqs, max_step_tokens)
        self._compiled: dict[StepShape, Any] = {}
        self._blocks = block_sizes(staging)
        self.block_sharding = block_sharding(self._pages[0])
        """Of a block of pages on the device."""
        self._gathers: dict[int, Any] = {}
        self._scatters: dict[int, Any] = {}
        self._sampling = np.zeros((max_seqs, 5), np.int32)  # top_k, and bits: seed, temperature, top_p, min_p

    def compile(self, progress: Progress = lambda done, total: None) -> None:
        """Compile every step shape, several at a time, and run each once on scrap so that nothing is left to set up."""
        self._compile_transfers()
        shapes = self._shapes
        jitted = jax.jit(self._step, donate_argnums=(1, 2), static_argnames="shape")

        def build(shape: StepShape) -> Any:
            return jitted.lower(self._leaves, self._pages, self._last, self._empty_batch(shape), shape=shape).compile()

        lowered = 0
        with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
            for shape, compiled in zip(shapes, pool.map(build, shapes), strict=True):
                self._compiled[shape] = compiled
                lowered += 1
                progress(lowered, len(shapes))
        for shape in shapes:
            self._launch(shape, self._empty_batch(shape)).block_until_ready()

    def _compile_transfers(self) -> None:
        gather = jax.jit(gather_pages, out_shardings=self.block_sharding)
        scatter = jax.jit(scatter_pages, donate_argnums=0)
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
        return np.zeros(shape.tokens + shape.rows * (COLUMNS + self._table_width), np.int32)

    def set_sampling(self, slot: int, params: SamplingParams) -> None:
        """Choose how the rows of ``slot`` sample from the next dispatch on."""
        self._sampling[slot, :2] = min(params.top_k, 2**31 - 1), np.uint32(params.seed).astype(np.int32)
        self._sampling[slot, 2:].view(np.float32)[:] = params.temperature, params.top_p, params.min_p

    def dispatch(self, plan: Plan, page_table: np.ndarray) -> InFlight:
        """Start a step and return at once. ``page_table`` is the scheduler's, ``[max_seqs, M]`` by slot."""
        rows = len(plan.segments)
        shape = self._fitting(rows, plan.tokens)
        # A fresh array for every step: on a CPU the device may read it in place while the host goes on.
        batch = self._empty_batch(shape)
        head = batch[shape.tokens :].reshape(shape.rows, -1)[:rows]
        head[:, 0], head[:, 1], head[:, 2] = plan.slots, plan.starts, plan.counts
        head[: plan.samples, 3] = 1
        head[:, 4:COLUMNS] = self._sampling[plan.slots]
        head[:, COLUMNS:] = page_table[plan.slots]
        _fill_tokens(batch[: plan.tokens], plan)
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
        """Wait for a step's tokens, one per row that samples."""
        return np.asarray(step.tokens)[: step.plan.samples].tolist()


def _fill_tokens(tokens: np.ndarray, plan: Plan) -> None:
    tokens[:] = -1  # the usual decode: the device has its token
    at = plan.steady
    for i in range(plan.steady, len(plan.segments)):
        segment, start, count = plan.segments[i], int(plan.starts[i]), int(plan.counts[i])
        if start < segment.known:
            segment.copy_tokens(start, tokens[at : at + count])
        at += count


def _pack(leaves: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
    """The arrays of a model, its many vectors (of norms) as one: every argument of a call costs the host its time."""
    return (*(x for x in leaves if x.ndim > 1), jnp.concatenate([x for x in leaves if x.ndim == 1]))


def _model(graph: Any, tree: Any, shapes: Sequence[tuple[int, ...]], packed: tuple[jax.Array, ...]) -> Decoder:
    """The decoder, from what :func:`_pack` made of leaves of these ``shapes``."""
    ends = np.cumsum([shape[0] for shape in shapes if len(shape) == 1])
    vectors, others = iter(jnp.split(packed[-1], ends[:-1])), iter(packed[:-1])
    return nnx.merge(graph, jax.tree.unflatten(tree, [next(vectors if len(s) == 1 else others) for s in shapes]))


def _step(
    model: Callable[[tuple[jax.Array, ...]], Decoder],
    backend: Backend,
    page_size: int,
    leaves: tuple[jax.Array, ...],
    pages: PagedKV,
    last: jax.Array,
    batch: jax.Array,
    *,
    shape: StepShape,
) -> tuple[PagedKV, jax.Array, jax.Array]:
    """One forward over a ragged batch, and one sampled token per row.

    Args:
        model: rebuilds the decoder from its packed ``leaves``.
        backend: of attention.
        page_size: S, tokens per page.
        pages: of every layer, as the backend forms them; donated.
        last: ``[max_seqs]`` int32, the token each slot sampled last; donated.
        batch: int32, what the host says, in one piece: ``[T]`` tokens, where -1 stands for the slot's last sampled one;
            then of each of R rows ``COLUMNS`` numbers and its M pages. Rows of padding have count 0.
        shape: T, R and the query tile of attention; static.

    Returns:
        The pages, ``last``, and ``[R]`` int32 sampled tokens (-1 where the logits were not finite).
    """
    tokens, rows = batch[: shape.tokens], batch[shape.tokens :].reshape(shape.rows, -1)
    slot, start, count, samples, top_k = rows[:, :5].T
    seed = jax.lax.bitcast_convert_type(rows[:, 5], jnp.uint32)
    temperature, top_p, min_p = jax.lax.bitcast_convert_type(rows[:, 6:COLUMNS], jnp.float32).T
    table = rows[:, COLUMNS:]
    ends = jnp.cumsum(count)
    cu_q_lens = jnp.concatenate([jnp.zeros(1, jnp.int32), ends])
    index = jnp.arange(tokens.shape[0])
    row = jnp.minimum(jnp.searchsorted(ends, index, side="right"), shape.rows - 1)
    position = jnp.where(index < ends[-1], start[row] + index - cu_q_lens[row], 0)
    write_to = jnp.where(index < ends[-1], table[row, position // page_size] * page_size + position % page_size, 0)
    where = Batch(table, jnp.where(count > 0, start + count, 0), cu_q_lens, write_to)

    def attend(_: int, q: jax.Array, k: jax.Array, v: jax.Array, layer: jax.Array) -> tuple[jax.Array, jax.Array]:
        return backend.attend(q, k, v, layer, where, q_tile=shape.q_tile)

    decoder = model(leaves)
    hidden, pages = decoder(jnp.where(tokens < 0, last[slot[row]], tokens), position, pages, attend)
    logits = decoder.logits(hidden[jnp.maximum(ends - 1, 0)])
    sampled = sample(logits, temperature, top_k, top_p, min_p, seed, start + count)
    sampled = jnp.where(jnp.isfinite(logits.max(-1)), sampled, -1)
    last = last.at[jnp.where(samples > 0, slot, last.shape[0])].set(sampled, mode="drop")
    return pages, last, sampled


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
