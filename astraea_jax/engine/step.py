"""The jitted step: one forward over a ragged batch, spread over a mesh, and the most probable token of each row.

A step runs ``R`` rows (one per running request) and ``T`` tokens laid end to end. Per batch slot the device keeps the
last sampled token, used where the host sends -1 because it has not read the token yet, and a row of the page table, of
which the host sends only updates. So the input of a step does not grow with the longest possible context.

Over several devices the compiler partitions the matrix products as the weights are sharded, and attention runs on each
device for its own heads, so that a kernel sees the arrays of one device. :class:`Step` holds no array, so it can also
be compiled for devices that are absent.

On accelerators a step neither branches nor loops on the device, so that XLA can record it as one command buffer (a CUDA
graph). Rows with a temperature are drawn again from its logits, by an executable of their own (:mod:`.resampling`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental.layout import Format, Layout
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from astraea_jax.engine.compilation import accepted
from astraea_jax.engine.mixtures import operations
from astraea_jax.engine.packing import Packed, Packing, joined_shape
from astraea_jax.engine.sampling import likeliest, sample
from astraea_jax.kernels import Backend, Batch
from astraea_jax.kv_cache.arrays import (
    FULL,
    WINDOW,
    LayerGroups,
    PagedKV,
    Transfers,
    abstract_pages,
    heads_spec,
    jitted_transfers,
)
from astraea_jax.models.decoder import Decoder
from astraea_jax.models.heads import Heads
from astraea_jax.models.operations import Operations
from astraea_jax.models.sharding import TP, placed

PREFILL_TILE = 16
"""Query tokens of a row that one attention tile holds in a step with prefill."""

FEWEST_DRAWN = 8
"""Rows of the smallest logits that a step returns, so that few executables draw from them again."""

COLUMNS = 9
"""Values per row: slot, start, count, samples, top_k; bits of seed, temperature, top_p, min_p."""

FEWEST_ROWS = {"cpu": 1}
"""Platform -> rows of the smallest decode step; 8 on others. A CPU's time grows with every row, while an accelerator's
matrix units take eight rows in the time of one."""

FEWEST_TOKENS = 64
"""Tokens of the smallest step with prefill."""

FEW_SAMPLES = {"cpu": 8}
"""Platform -> rows that sample in a step with prefill, up to which the logits of only so many rows are computed. Other
devices compute all of them, which takes them no longer and needs no branch."""

ACTIVATIONS = {"cpu": jnp.float32}
"""Platform -> dtype of activations; on others it is that of the weights. XLA for CPUs computes narrower numbers as
float32, and would convert every activation there and back."""

COMPILER_OPTIONS: dict[str, dict[str, Any]] = {
    "TPU7x": {"xla_tpu_control_large_2nd_minor_layout_for_x16": "false"},
    "gpu": {"xla_gpu_enable_triton_gemm": False},
    "cpu": {
        "xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED",
        "xla_cpu_prefer_vector_width": "512",
    },
}
"""Kind of device, or platform -> options of XLA. For a loop over layers, TPU7x's compiler prefers larger tiles than the
weights have and would copy all weights into them at every step. On GPUs matrix products are cuBLAS's: with these a step
of Llama-3.1-8B reached 94 % of an H200's read floor and all its executables compiled in 25 s, since XLA need not try
kernels of its own for every product and shape. By default a CPU's computes first what waits for nothing: it widens
every narrow weight before the first product, and a step takes five to twenty times as long. It also keeps to vectors of
256 bits where the processor has 512, with which a step of one row takes 0.94 of the time, and others the same."""


@dataclass(frozen=True)
class StepShape:
    """Static shape of one compiled step: T ``tokens``, R ``rows``, and the query tile of its attention."""

    tokens: int
    rows: int
    q_tile: int
    """1: every row has at most one token, and token t belongs to row t."""

    @property
    def packed_size(self) -> int:
        """Length of the packed int32 input."""
        return self.tokens + self.rows * (COLUMNS + 2)

    def unpacked(self, packed: Any) -> tuple[Any, Any, Any]:
        """Views of the packed input, in NumPy or JAX.

        Returns:
            Tokens ``[T]``, rows ``[R, COLUMNS]``, and updates of the page table ``[2, R]`` (flat indices, then pages).
        """
        rows = self.tokens + self.rows * COLUMNS
        return packed[: self.tokens], packed[self.tokens : rows].reshape(-1, COLUMNS), packed[rows:].reshape(2, -1)


def step_shapes(max_seqs: int, max_step_tokens: int, fewest: int) -> tuple[StepShape, ...]:
    """The shapes to compile.

    They double: the rows of decode, from ``fewest`` up, and the tokens of steps with prefill. Of these, a CPU has none
    with fewer tokens than twice the rows, since each is another executable to compile, but one halfway between any two,
    since its time grows with every token of padding.
    """
    slow = fewest == 1
    decode = [StepShape(n, n, 1) for n in _doubling(min(fewest, max_seqs), max_seqs)]
    lowest = min(max(FEWEST_TOKENS, 2 * max_seqs) if slow else FEWEST_TOKENS, max_step_tokens)
    tokens = _doubling(lowest, max_step_tokens)
    between = [(a + b) // 2 for a, b in pairwise(tokens)] if slow else []
    return (*decode, *(StepShape(n, max_seqs, PREFILL_TILE) for n in sorted({*tokens, *between})))


def _doubling(low: int, high: int) -> list[int]:
    sizes = [low]
    while sizes[-1] < high:
        sizes.append(min(2 * sizes[-1], high))
    return sizes


@dataclass(frozen=True)
class StepSizes:
    """Sizes of the arrays that a step works on."""

    num_pages: int
    """Pages per layer, null page included, of layers whose queries see the whole context."""
    page_size: int
    """Tokens per page."""
    max_seqs: int
    """Rows of the largest step."""
    max_step_tokens: int
    """Tokens of the largest step."""
    max_pages_per_seq: int
    """Width of the page table."""
    kv_dtype: Any
    window_pages: int = 0
    """Pages per layer, null page included, of layers with a window. 0: they have such pages as the others."""


class Step:
    """The step of one model on one mesh.

    Args:
        decoder: the model, or one of shapes only (:func:`astraea_jax.models.sharding.abstract_decoder`).
        backend: attention backend.
        sizes: sizes of the arrays.
        mesh: a mesh of one axis, ``"tp"``; its devices may be absent.
    """

    def __init__(self, decoder: Decoder, backend: Backend, sizes: StepSizes, mesh: Mesh):
        self._graph = nnx.graphdef(decoder)
        leaves, self._tree = jax.tree.flatten(placed(decoder, mesh))
        self.backend, self._mesh, self._sizes = backend, mesh, sizes
        self._packing = Packing.of(leaves)
        self.replicated = NamedSharding(mesh, PartitionSpec())
        self.leaves: Packed = self._packing.pack(leaves, partial(joined_shape, self.replicated))
        self.num_layers, self.vocab_size = decoder.config.num_layers, decoder.config.vocab_size
        self.stacked = decoder.stacked
        """Whether the layers run as one loop and their pages are one array of each group."""
        self.period = decoder.period
        self.groups = LayerGroups.plan(decoder.config, sizes.num_pages, sizes.window_pages, self.stacked)
        self.pages = abstract_pages(decoder.config, backend, self.groups, sizes.page_size, sizes.kv_dtype, mesh)
        self.last = jax.ShapeDtypeStruct((sizes.max_seqs,), jnp.int32, sharding=self.replicated)
        width = sizes.max_pages_per_seq * (2 if sizes.window_pages else 1)
        self.table = jax.ShapeDtypeStruct((sizes.max_seqs, width), jnp.int32, sharding=self.replicated)
        """The pages of every batch slot, and if there are window pages, these after all others."""
        self._shardings = [leaf.sharding for leaf in leaves]
        self._orders = [self._in_order(leaf) for leaf in self.leaves]

    @property
    def shapes(self) -> tuple[StepShape, ...]:
        """The shapes that are compiled ahead, decode first."""
        return step_shapes(self._sizes.max_seqs, self._sizes.max_step_tokens, FEWEST_ROWS.get(self._platform, 8))

    @property
    def _platform(self) -> str:
        platform: str = self._mesh.devices.flat[0].platform
        return platform

    def drawn(self, shape: StepShape) -> int:
        """Rows of what a step returns, at least R; those beyond R say nothing."""
        return max(shape.rows, min(FEWEST_DRAWN, self._sizes.max_seqs))

    def packed(self, shape: StepShape) -> jax.ShapeDtypeStruct:
        """The packed input; see :meth:`StepShape.unpacked`."""
        return jax.ShapeDtypeStruct((shape.packed_size,), jnp.int32, sharding=self.replicated)

    def logits(self, rows: int) -> jax.ShapeDtypeStruct:
        """The logits ``[R, V]`` float32 of a step, each row on one device if the devices divide the rows."""
        size = (rows, self.vocab_size)
        axes = next((axes for axes in ((TP,), (None, TP)) if size[len(axes) - 1] % self._mesh.size == 0), ())
        return jax.ShapeDtypeStruct(size, jnp.float32, sharding=NamedSharding(self._mesh, PartitionSpec(*axes)))

    def arguments(self, shape: StepShape) -> tuple[Any, ...]:
        """Shapes and shardings of the arguments of :meth:`jitted`: leaves, pages, last, table, packed."""
        return self.leaves, self.pages, self.last, self.table, self.packed(shape)

    def pages_of(self, group: int) -> tuple[jax.ShapeDtypeStruct, ...]:
        """The pages of a group of layers."""
        return tuple(self.pages[i] for i in self.groups.members(group))

    def transfers(self, group: int) -> Transfers:
        """The functions that move a group's pages, see :func:`~astraea_jax.kv_cache.arrays.jitted_transfers`."""
        return jitted_transfers(self.pages_of(group), self.replicated, self.groups.num_pages[group])

    def writer(self) -> Any:
        """A jitted function that writes ``[2 * n]`` int32, n flat indices and n pages, into the donated page table."""
        return jax.jit(_updated, out_shardings=self.replicated, donate_argnums=0)

    def jitted(self, shape: StepShape) -> Any:
        """The step of this shape, to be lowered with :meth:`arguments`; pages, last and table are donated.

        It returns these three, the most probable token of each row, int32, -1 where its logits were not finite, and the
        logits (:meth:`logits`), both of :meth:`drawn` rows.
        """
        shardings = jax.tree.map(lambda leaf: leaf.sharding, self.arguments(shape))
        _, pages, replicated, _, _ = shardings
        shardings = (tuple(self._orders), *shardings[1:])
        return jax.jit(
            partial(self._run, shape),
            in_shardings=shardings,
            out_shardings=(pages, replicated, replicated, replicated, self.logits(self.drawn(shape)).sharding),
            donate_argnums=(1, 2, 3),
            compiler_options=self._compiler_options(),
        )

    def _compiler_options(self) -> dict[str, Any]:
        kind = self._mesh.devices.flat[0].device_kind
        options = COMPILER_OPTIONS.get(kind, COMPILER_OPTIONS.get(self._platform, {}))
        # Devices of other kinds may be absent, so what their compilers accept cannot be tried.
        return {k: v for k, v in options.items() if self._platform != "cpu" or accepted(k, v)}

    def pack(self, decoder: Decoder) -> Packed:
        """The decoder's arrays in the step's shardings; arrays that have them already are not copied."""
        leaves = jax.device_put(jax.tree.leaves(nnx.state(decoder)), self._shardings)
        join = jax.jit(lambda *small: jnp.concatenate([x.reshape(-1) for x in small]), out_shardings=self.replicated)
        packed: Packed = jax.device_put(self._packing.pack(leaves, join), tuple(self._orders))
        return packed

    def _in_order(self, leaf: jax.ShapeDtypeStruct) -> Any:
        """Where an argument lies, and on a TPU that its last axis is innermost.

        By default a TPU's arrays lie so that least is lost to padding. Where 2880 is the last axis, that is another
        order, and a step would copy the whole array into the one in which rows are looked up, or kernels read.
        """
        if self._platform != "tpu":
            return leaf.sharding
        return Format(Layout(tuple(range(len(leaf.shape)))), leaf.sharding)

    def _run(
        self, shape: StepShape, leaves: Packed, pages: PagedKV, last: jax.Array, table: jax.Array, packed: jax.Array
    ) -> tuple[PagedKV, jax.Array, jax.Array, jax.Array, jax.Array]:
        """One forward over a ragged batch, and the most probable token of each row.

        Args:
            shape: T, R and the query tile of attention.
            leaves: the model's arrays from :meth:`pack`.
            pages: the pages of every layer, in the backend's form.
            last: ``[max_seqs]`` int32, the last sampled token of each slot.
            table: int32, the pages of each slot, see :attr:`table`.
            packed: int32, the host's input (:meth:`StepShape.unpacked`). A token of -1 stands for the slot's last
                sampled one; padding rows have count 0; updates beyond the page table are ignored.
        """
        page_size = self._sizes.page_size
        tokens, rows, updates = shape.unpacked(packed)
        table = _updated(table, updates)
        slot, start, count = rows[:, :3].T
        ends = jnp.cumsum(count)
        cu_q_lens = jnp.concatenate([jnp.zeros(1, jnp.int32), ends])
        index = jnp.arange(tokens.shape[0])
        # Comparing all with all takes no loop.
        row = jnp.searchsorted(ends, index, side="right", method="compare_all") if shape.q_tile > 1 else index
        row = jnp.minimum(row, shape.rows - 1)
        position = jnp.where(index < ends[-1], start[row] + index - cu_q_lens[row], 0)
        kv_lens, batches = jnp.where(count > 0, start + count, 0), {}
        tables = jnp.split(table[slot], 2, axis=1) if self._sizes.window_pages else [table[slot]]
        for group, page_table in enumerate(tables):  # [R, M]
            page = page_table[row, position // page_size]
            slot_mapping = jnp.where(index < ends[-1], page * page_size + position % page_size, 0)
            batches[group] = Batch(page_table, kv_lens, cu_q_lens, slot_mapping)

        def attend(i: int | jax.Array, heads: Heads, cache: Any) -> tuple[jax.Array, Any]:
            group = WINDOW if heads.switches.window and self._sizes.window_pages else FULL
            here = batches[group]
            if not self.stacked:
                return self._attend(shape.q_tile, heads, cache, here)
            place = jnp.asarray(self.groups.places, jnp.int32)[i]
            nth = self.groups.arrays.index(group)
            here = here.shifted(place * self.groups.num_pages[group], page_size)
            out, written = self._attend(shape.q_tile, heads, cache[nth], here)
            return out, (*cache[:nth], written, *cache[nth + 1 :])

        decoder = self._decoder(leaves)
        tokens = jnp.where(tokens < 0, last[slot[row]], tokens)
        ops = operations(attend, self.backend, self._mesh, ends[-1], jnp.sum(rows[:, 3]))
        hidden, kept = decoder(tokens, position, pages, ops, dtype=ACTIVATIONS.get(self._platform))
        hidden = hidden[jnp.maximum(ends - 1, 0)]
        few = FEW_SAMPLES.get(self._platform, shape.rows)
        if shape.q_tile > 1 and few < shape.rows:
            sampled, logits = jax.lax.cond(
                jnp.sum(rows[:, 3]) <= few,  # they are the first
                lambda: _padded(self._predicted(decoder, ops, hidden[:few]), shape.rows),
                lambda: self._predicted(decoder, ops, hidden),
            )
        else:
            sampled, logits = self._predicted(decoder, ops, hidden)
        last = remembered(last, rows, sampled)
        return kept, last, table, *_padded((sampled, logits), self.drawn(shape))

    def _predicted(self, decoder: Decoder, ops: Operations, hidden: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The most probable token of each row, int32, -1 where its logits are not finite, and the logits ``[R, V]``."""
        # Resharded from vocabulary to rows, so no device ever holds all of them.
        logits = self._sharded(self._sharded(decoder.logits(hidden, ops.product), None, TP), TP)
        return self._checked(logits, likeliest(logits)), logits

    def _attend(self, q_tile: int, heads: Heads, layer: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """The backend's attention, on every device for its own heads."""
        by_head, pages = heads_spec(1), heads_spec(self.backend.heads_axis)
        shared = jax.tree.map(lambda _: PartitionSpec(), heads)
        if heads.sinks is not None:
            shared = replace(shared, sinks=heads_spec(0))
        attend: Any = jax.shard_map(
            partial(self.backend.attend, q_tile=q_tile),
            mesh=self._mesh,
            in_specs=(replace(shared, qkv=by_head), pages, PartitionSpec()),
            out_specs=(by_head, pages),
            check_vma=False,  # kernels do not say along which axes their arrays vary
        )
        out, layer = attend(heads, layer, batch)
        return out, layer

    def sampled(self, logits: jax.Array, rows: jax.Array) -> jax.Array:
        """Sample one token per row, each row on one device: ``[R]`` int32 from ``logits [R, V]``.

        How is said by ``rows [R, COLUMNS]``; -1 where no logit is finite, or one is not a number. Every intermediate
        has an explicit sharding; otherwise XLA would propagate that of the rows into the model.
        """
        start, count = rows[:, 1:3].T
        seed = jax.lax.bitcast_convert_type(rows[:, 5], jnp.uint32)
        temperature, top_p, min_p = jax.lax.bitcast_convert_type(rows[:, 6:COLUMNS], jnp.float32).T
        how = (temperature, rows[:, 4], top_p, min_p, seed, start + count)
        drawn = sample(logits, *(self._sharded(one) for one in how))
        return self._checked(logits, drawn)

    def _checked(self, logits: jax.Array, tokens: jax.Array) -> jax.Array:
        """``tokens [R]`` int32 on every device, -1 where no logit is finite, or one is not a number."""
        return self._sharded(self._sharded(jnp.where(jnp.isfinite(logits.max(-1)), tokens, -1), TP))

    def _sharded(self, array: jax.Array, *axes: str | None) -> jax.Array:
        return jax.lax.with_sharding_constraint(array, NamedSharding(self._mesh, PartitionSpec(*axes)))

    def _decoder(self, leaves: Packed) -> Decoder:
        decoder: Decoder = nnx.merge(self._graph, jax.tree.unflatten(self._tree, self._packing.unpack(leaves)))
        return decoder


def remembered(last: jax.Array, rows: jax.Array, sampled: jax.Array) -> jax.Array:
    """``last [max_seqs]`` with ``sampled [R]`` at the slots of those of ``rows [R, COLUMNS]`` that sample."""
    slot, samples = rows[:, 0], rows[:, 3]
    return last.at[jnp.where(samples > 0, slot, last.shape[0])].set(sampled, mode="drop")


def _padded(predicted: tuple[jax.Array, jax.Array], rows: int) -> tuple[jax.Array, jax.Array]:
    """Tokens ``[R]`` and logits ``[R, V]`` with zeros up to a number of rows."""
    tokens, logits = predicted
    more = rows - len(tokens)
    return jnp.pad(tokens, (0, more)), jnp.pad(logits, ((0, more), (0, 0)))


def _updated(table: jax.Array, updates: jax.Array) -> jax.Array:
    indices, pages = updates.reshape(2, -1)
    return table.reshape(-1).at[indices].set(pages, mode="drop").reshape(table.shape)
