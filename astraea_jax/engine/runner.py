"""Dispatch of steps: a plan in, sampled tokens out; everything is compiled before the first request."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from astraea_jax.engine.compilation import compile_all
from astraea_jax.engine.config import EngineConfig
from astraea_jax.engine.dispatch import InFlight
from astraea_jax.engine.extras import Extras
from astraea_jax.engine.layout import Layout
from astraea_jax.engine.resampling import ENTRIES, ENTRY, lowerings, mask_words
from astraea_jax.engine.sampling import MIN_TEMPERATURE, SamplingParams
from astraea_jax.engine.step import COLUMNS, Step, StepShape, StepSizes
from astraea_jax.kernels import Backend
from astraea_jax.kernels.native.attention import Native
from astraea_jax.kernels.native.products import put_in_panels
from astraea_jax.kv_cache.arrays import PagedKV, make_pages
from astraea_jax.kv_cache.offload import NOWHERE, PINNED, Block, batch_sizes, block_sharding, block_sizes
from astraea_jax.models.decoder import Decoder
from astraea_jax.models.sharding import default_mesh
from astraea_jax.scheduler.plan import Plan

TABLE_UPDATES = 2048
"""Entries of one standalone write to the page table; each step also carries up to one update per row."""

Progress = Callable[[int, int], None]
"""Called with (done, total)."""


class Runner:
    """Owns the device: weights, pages, and the compiled steps. Used by one thread only, since steps donate the pages.

    Args:
        decoder: the model; its arrays are flattened once, here.
        backend: attention backend.
        sizes: sizes of the arrays.
        mesh: the devices that share the model; None: the first device.
        staging: pages of the largest transfer to or from the host; 0: no transfers.
    """

    def __init__(
        self,
        decoder: Decoder,
        backend: Backend,
        sizes: StepSizes,
        *,
        mesh: Mesh | None = None,
        staging: int = 0,
    ):
        self._step = Step(decoder, backend, sizes, mesh or default_mesh())
        self._leaves = self._step.pack(decoder)
        self.shapes = self._step.shapes
        """Step shapes, decode first."""
        self._rows = sorted({self._step.drawn(shape) for shape in self.shapes})
        self.groups = self._step.groups.present
        """Groups of layers that have pages."""
        self._compiled: dict[tuple[str, Any], Any] = {}
        self._blocks, self._batches = block_sizes(staging), batch_sizes(staging)
        self.block_sharding = block_sharding(self._step.pages[0])
        """Sharding of a block of pages on the device."""
        self._make_arrays(sizes.max_seqs)
        self._sampling = np.zeros((sizes.max_seqs, 5), np.int32)  # top_k, and bits: seed, temperature, top_p, min_p
        self._draws = np.zeros(sizes.max_seqs, bool)  # whether a slot has a temperature

    def _make_arrays(self, slots: int) -> None:
        """Make what steps read and write: pages, the last token of each slot, the page table, and masks of all 1.

        Beside the pages each group has room for its largest block, where smaller ones are put together to be scattered.
        """
        self._pages: PagedKV = make_pages(self._step.pages)
        page, most = self._step.pages[0], max(self._blocks, default=0)
        self._staging = {
            group: jnp.zeros(
                (most, self._step.groups.of.count(group), *page.shape[1:]), page.dtype, device=self.block_sharding
            )
            for group in self.groups
        }
        self._last = jnp.zeros(slots, jnp.int32, device=self._step.replicated)
        self._table = jnp.zeros(self._step.table.shape, jnp.int32, device=self._step.replicated)
        nothing = jnp.zeros(0, jnp.int32, device=self._step.replicated)
        self._sampled = self._logits = self._adjusted = nothing  # of the last step: there is none yet
        words = mask_words(self._step.vocab_size)
        self._unmasked = {n: jnp.full((n, words), -1, jnp.int32, device=self._step.replicated) for n in self._rows}

    def reset(self) -> None:
        """Make the arrays anew after a step has raised, which may have used them up; all pages are empty then.

        Raises:
            Exception: the device cannot hold them any more.
        """
        # Dropped first, or else there would have to be room for both.
        del self._pages, self._staging, self._last, self._table, self._unmasked, self._logits, self._adjusted
        self._make_arrays(len(self._sampling))
        jax.block_until_ready((self._pages, self._last, self._table))

    @classmethod
    def of(cls, decoder: Decoder, config: EngineConfig, layout: Layout, mesh: Mesh) -> Self:
        """The runner of an engine; it brings the decoder's weights into the form in which the device reads them."""
        if config.stacks():
            decoder.stack()
        if mesh.devices.flat[0].platform == "cpu":
            decoder.keep_bits()
        if isinstance(layout.backend, Native) and mesh.size == 1 and not decoder.stacked:
            put_in_panels(decoder)
        sizes = StepSizes(
            num_pages=layout.num_pages,
            page_size=config.page_size,
            max_seqs=config.max_seqs,
            max_step_tokens=config.max_step_tokens,
            max_pages_per_seq=layout.pages_per_seq,
            kv_dtype=layout.kv_dtype,
            window_pages=layout.window.num_pages if layout.window else 0,
        )
        return cls(decoder, layout.backend, sizes, mesh=mesh, staging=layout.host.staging)

    def compile(self, progress: Progress = lambda done, total: None) -> None:
        """Compile every step shape and transfer size, and run each once on the null page to finish all set-up."""
        to_lower: dict[tuple[str, Any], Callable[[], Any]] = {}
        for shape in self.shapes:
            to_lower["step", shape] = partial(self._step.jitted(shape).lower, *self._step.arguments(shape))
        for group in self.groups:
            (gather, stage, scatter), pages = self._step.transfers(group), self._step.pages_of(group)
            for size in self._blocks:
                ids = np.zeros(size, np.int32)
                block = jax.eval_shape(gather, pages, ids)
                to_lower["gather", (group, size)] = partial(gather.lower, pages, ids)
                to_lower["stage", (group, size)] = partial(stage.lower, self._staging[group], block, np.int32(0))
            for size in self._batches:
                ids = np.zeros(size, np.int32)
                to_lower["scatter", (group, size)] = partial(scatter.lower, pages, self._staging[group], ids)
        writing = (
            self._step.table,
            jax.ShapeDtypeStruct((2 * TABLE_UPDATES,), jnp.int32, sharding=self._step.replicated),
        )
        to_lower["table", TABLE_UPDATES] = partial(self._step.writer().lower, *writing)
        for rows in self._rows:
            to_lower |= {(name, rows): lower for name, lower in lowerings(self._step, rows)}
        self._compiled = compile_all(to_lower, progress)
        self._meet()
        self.write_table(np.full(2 * TABLE_UPDATES, NOWHERE, np.int32))
        for shape in self.shapes:
            self.launch(shape, _empty_input(shape))
            self.adjust(np.full((ENTRIES, ENTRY), NOWHERE, np.int32))
            self.redraw(np.zeros((self._step.drawn(shape), COLUMNS), np.int32)).block_until_ready()
            self.logprobs().block_until_ready()
        for group in self.groups:
            for size in self._blocks:
                there = self.put(self.gather([0] * size, group), self.block_sharding.with_memory_kind(PINNED))
                block = self.put(there, self.block_sharding)  # multi-process copies are compiled, too
                self.scatter([block], np.full(size, NOWHERE, np.int32), group)

    def _meet(self) -> None:
        """Barrier: wait until every process that shares the arrays has compiled."""

    @property
    def executables(self) -> int:
        """Number of executables compiled."""
        return len(self._compiled)

    def gather(self, pages: Sequence[int], group: int) -> Block:
        """Read pages into one block ``[n, L, …]``, n being a block size; the pages may be written again at once."""
        arrays = tuple(self._pages[i] for i in self._step.groups.members(group))
        block: Block = self._compiled["gather", (group, len(pages))](arrays, np.asarray(pages, np.int32))
        return block

    def scatter(self, blocks: Sequence[Block], pages: np.ndarray, group: int) -> None:
        """Write blocks, together no larger than the largest, to a group's ``pages [n]`` int32, but to none beyond."""
        staging, at = self._staging[group], 0
        for block in blocks:
            staging = self._compiled["stage", (group, len(block))](staging, block, np.int32(at))
            at += len(block)
        self._staging[group] = staging
        ids = np.full(min(size for size in self._batches if size >= at), NOWHERE, np.int32)
        ids[:at] = pages
        members, arrays = self._step.groups.members(group), list(self._pages)
        written = self._compiled["scatter", (group, len(ids))](tuple(arrays[i] for i in members), staging, ids)
        for i, array in zip(members, written, strict=True):
            arrays[i] = array
        self._pages = tuple(arrays)

    def put(self, block: Block, sharding: jax.sharding.Sharding) -> Block:
        """Copy a block to the host or back, and return at once."""
        return jax.device_put(block, sharding)

    def close(self) -> None:
        """End: nothing is dispatched any more."""

    def set_sampling(self, slot: int, params: SamplingParams) -> None:
        """Set how the rows of a batch slot sample from the next dispatch on."""
        self._sampling[slot, :2] = min(params.top_k, 2**31 - 1), np.uint32(params.seed or 0).astype(np.int32)
        self._sampling[slot, 2:].view(np.float32)[:] = params.temperature, params.top_p, params.min_p
        self._draws[slot] = params.temperature >= MIN_TEMPERATURE

    def dispatch(self, plan: Plan) -> InFlight:
        """Start a step and return at once."""
        shape = self._fitting(len(plan.requests), plan.tokens)
        # A fresh array for every step: on a CPU the device may read it in place while the host goes on.
        packed = _empty_input(shape)
        tokens, head, updates = shape.unpacked(packed)
        self._describe(head, plan)
        if plan.changes:
            self._update_table(updates, plan.changes)
        _fill_tokens(tokens[: plan.tokens], plan)
        sampled = self.launch(shape, packed)
        if self._draws[plan.slots[: plan.samples]].any():
            sampled = self.redraw(self._described(plan))
        sampled.copy_to_host_async()
        return InFlight(plan, sampled, time.perf_counter())

    def _describe(self, rows: np.ndarray, plan: Plan) -> None:
        """Fill ``rows [R, COLUMNS]`` with what a step needs to know of its rows."""
        head = rows[: len(plan.requests)]
        head[:, 0], head[:, 1], head[:, 2] = plan.slots, plan.starts, plan.counts
        head[: plan.samples, 3] = 1
        head[:, 4:] = self._sampling[plan.slots]

    def resample(self, step: InFlight, extras: Extras) -> InFlight:
        """Draw rows of the last step again, from logits as ``extras`` have them, and return at once.

        To be called before the next dispatch, which feeds these tokens forward.
        """
        tokens = step.tokens
        if extras.rows:
            for at in range(0, len(extras.entries), ENTRIES):
                some = np.full((ENTRIES, ENTRY), NOWHERE, np.int32)
                part = extras.entries[at : at + ENTRIES]
                some[: len(part)] = part
                self.adjust(some)
            tokens = self.redraw(*self._redrawn(step.plan, extras))
            tokens.copy_to_host_async()
        reported = self.logprobs() if extras.logprobs else None
        if reported is not None:
            reported.copy_to_host_async()
        return replace(step, tokens=tokens, logprobs=reported)

    def _described(self, plan: Plan) -> np.ndarray:
        """The first argument of :meth:`redraw`, for all rows of the last step."""
        rows = np.zeros((len(self._sampled), COLUMNS), np.int32)
        self._describe(rows, plan)
        return rows

    def _redrawn(self, plan: Plan, extras: Extras) -> tuple[np.ndarray, np.ndarray | None]:
        """The arguments of :meth:`redraw`."""
        described = self._described(plan)
        rows = np.zeros_like(described)
        rows[extras.rows] = described[extras.rows]  # the others are greedy, which takes no time, and are not looked at
        if not extras.masked:
            return rows, None
        masks = np.full((len(rows), extras.masks.shape[1]), -1, np.int32)
        masks[extras.masked] = extras.masks
        return rows, masks

    def _update_table(self, carried: np.ndarray, changes: list[tuple[int, int, list[int]]]) -> None:
        """Put updates of the page table into ``carried [2, R]``, which goes with the step; write the excess at once."""
        width = self._step.table.shape[1]
        indices: list[int] = []
        for slot, first, pages in changes:
            at = slot * width + first
            indices += range(at, at + len(pages))
        new = np.array([indices, [page for *_, pages in changes for page in pages]], np.int32)
        ahead = max(0, new.shape[1] - carried.shape[1])
        for at in range(0, ahead, TABLE_UPDATES):
            some = new[:, at : min(at + TABLE_UPDATES, ahead)]
            padded = np.full((2, TABLE_UPDATES), NOWHERE, np.int32)
            padded[:, : some.shape[1]] = some
            self.write_table(padded.reshape(-1))
        carried[:, : new.shape[1] - ahead] = new[:, ahead:]

    def _fitting(self, rows: int, tokens: int) -> StepShape:
        """The smallest shape that holds the step."""
        decode = rows == tokens
        return next(s for s in self.shapes if (s.q_tile == 1) == decode and s.tokens >= tokens)

    def launch(self, shape: StepShape, packed: np.ndarray) -> jax.Array:
        """Start the step of this shape on a packed input, and return its sampled tokens, int32, of R rows or more."""
        step = self._compiled["step", shape]
        self._pages, self._last, self._table, self._sampled, self._logits = step(
            self._leaves, self._pages, self._last, self._table, packed
        )
        self._adjusted = self._logits
        return self._sampled

    def adjust(self, entries: np.ndarray) -> None:
        """Adjust logits of the last step by ``entries [ENTRIES, ENTRY]`` int32 before they are drawn from again."""
        self._adjusted = self._compiled["adjust", len(self._sampled)](self._adjusted, entries)

    def redraw(self, rows: np.ndarray, masks: np.ndarray | None = None) -> jax.Array:
        """Draw those of ``rows [R, COLUMNS]`` int32 that sample again; returns ``[R]`` int32, all tokens of the step.

        ``masks [R, mask_words(V)]`` int32 say which tokens they may draw; None: all of them.
        """
        size = len(self._sampled)
        self._last, self._sampled = self._compiled["redraw", size](
            self._adjusted, self._last, self._sampled, rows, self._unmasked[size] if masks is None else masks
        )
        return self._sampled

    def logprobs(self) -> jax.Array:
        """Log-probabilities at the last step, see :func:`.resampling.logprobs`."""
        reported: jax.Array = self._compiled["logprobs", len(self._sampled)](self._logits, self._sampled)
        return reported

    def write_table(self, updates: np.ndarray) -> None:
        """Update the page table, with the argument of :meth:`.step.Step.writer`."""
        self._table = self._compiled["table", TABLE_UPDATES](self._table, updates)

    def read(self, step: InFlight) -> list[int]:
        """Wait for a step's tokens, one per row that samples."""
        return np.asarray(step.tokens)[: step.plan.samples].tolist()


def _empty_input(shape: StepShape) -> np.ndarray:
    packed = np.zeros(shape.packed_size, np.int32)
    _, _, updates = shape.unpacked(packed)
    updates[:] = NOWHERE
    return packed


def _fill_tokens(tokens: np.ndarray, plan: Plan) -> None:
    tokens[:] = -1  # usual for decode: the device has the token
    at = plan.num_decodes
    for i in range(plan.num_decodes, len(plan.requests)):
        request, start, count = plan.requests[i], int(plan.starts[i]), int(plan.counts[i])
        if start < request.num_tokens:
            request.copy_tokens(start, tokens[at : at + count])
        at += count
