"""Ragged paged attention on NVIDIA GPUs: the kernels of :mod:`.triton_kernels`, launched from a compiled step.

Keys and values are written in place and outputs replace the queries, so a step holds no second copy of a pool. The
launches are custom calls that XLA records into command buffers (CUDA graphs): jaxlib registers their handler,
``triton_kernel_call_ffi``, as compatible, and XLA's default ``--xla_gpu_enable_command_buffer`` includes custom calls.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp

from astraea_jax.errors import StartupError

from .backend import Batch, stored

Operand = jax.Array | jax.Ref | int | float
FP8 = jnp.dtype(jnp.float8_e4m3fn)
KV_DTYPES = (*map(jnp.dtype, (jnp.float32, jnp.bfloat16, jnp.float16)), FP8)
FP8_CAPABILITY = 89
"""Compute capability from which on GPUs convert float8; for others its bits are taken apart."""
HEAD_DIMS = (16, 32, 64, 128, 256)
MOST_SPLITS = 32
"""Programs that share the context of one query."""
WRITE_BLOCK = 1024
"""Numbers that one program writes."""


@dataclass(frozen=True)
class Blocks:
    """Sizes of a kernel's matrix products and how many threads compute them. Chosen by reasoning, not yet tuned."""

    m: int
    """Query rows: query heads of one key/value head, times queries."""
    n: int
    """Context tokens per turn."""
    warps: int
    stages: int
    """Turns whose loads are under way at once."""


def single_blocks(group: int, head_dim: int, dtype: Any) -> Blocks:
    """For rows with one query: 16 rows are the least a matrix product takes; the time goes into loading."""
    return Blocks(max(16, _power(group)), 32 if head_dim > 128 or jnp.dtype(dtype).itemsize > 2 else 64, 4, 3)


def tile_blocks(group: int, head_dim: int, dtype: Any) -> Blocks:
    """For rows with more queries; float32 is multiplied without tensor cores, so its tiles must fit into registers."""
    if jnp.dtype(dtype).itemsize > 2:
        return Blocks(max(16, _power(group)), 32, 4, 2)
    if head_dim > 128:
        return Blocks(max(64, _power(group)), 32, 4, 2)
    return Blocks(max(128, _power(group)), 64, 8, 3)


def split_context(rows: int, kv_heads: int, context: int, block: int) -> tuple[int, int]:
    """Programs that share one query's context of at most ``context`` tokens, and the blocks that make one worth while.

    Few rows are split finely, to fill the machine; many only so far that a long context among short ones is not
    waited for.
    """
    least = max(1, min(512, max(128, rows * kv_heads)) // block)
    return max(1, min(MOST_SPLITS, -(-context // (least * block)))), least


def _power(n: int) -> int:
    """The power of two at or above ``n``."""
    return 1 << (n - 1).bit_length()


def load_kernels() -> ModuleType:
    """:mod:`.triton_kernels`, which needs Triton.

    Raises:
        StartupError: it, or what launches it from JAX, is not installed.
    """
    try:
        import jax_triton  # noqa: F401

        from . import triton_kernels
    except ImportError as error:
        raise StartupError(
            f"attention 'triton' cannot be loaded ({error}): it needs Python 3.12 or newer and "
            "`pip install astraea-jax[cuda]`; or start with attention 'reference', which is slower"
        ) from error
    return triton_kernels


@dataclass(frozen=True)
class Triton:
    """The backend of these kernels.

    Raises:
        StartupError: there is no GPU, or Triton is not installed.
    """

    window: int | None = None
    """Tokens that a query sees, itself included; None: all."""
    soft_cap: float | None = None
    """Scores become ``cap * tanh(score / cap)``."""
    compute_capability: int | None = None
    """Of a GPU to compile for that is not in this machine, such as 90 for H100 and H200."""

    name = "triton"
    heads_axis = 2

    def __post_init__(self) -> None:
        if self.compute_capability is None and jax.default_backend() != "gpu":
            raise StartupError(
                f"attention 'triton' is for NVIDIA GPUs, but JAX runs on {jax.default_backend()}; start without it"
            )
        load_kernels()

    def page_shape(self, kv_heads: int, page_size: int, head_dim: int, dtype: Any) -> tuple[int, ...]:
        """``(2, K, S, H)``.

        Raises:
            StartupError: the kernels do not compute heads of this size, or ``dtype``.
        """
        if jnp.dtype(dtype) not in KV_DTYPES:
            raise StartupError(
                f"attention 'triton' has no kernel for KV in {jnp.dtype(dtype)}, only in "
                f"{', '.join(map(str, KV_DTYPES))}; start with attention 'reference'"
            )
        if head_dim not in HEAD_DIMS:
            raise StartupError(
                f"attention 'triton' has no kernel for heads of {head_dim} numbers, only of "
                f"{', '.join(map(str, HEAD_DIMS))}; start with attention 'reference'"
            )
        return (2, kv_heads, page_size, head_dim)

    def page_dtype(self, dtype: Any) -> Any:
        """The same."""
        return jnp.dtype(dtype)

    def attend(
        self, q: jax.Array, k: jax.Array, v: jax.Array, pages: jax.Array, batch: Batch, *, q_tile: int
    ) -> tuple[jax.Array, jax.Array]:
        """Write keys and values; then rows with one query; then, if ``q_tile`` says there may be any, the others."""
        dtype = pages.dtype
        k, v = stored(k, dtype), stored(v, dtype)
        if dtype == FP8 and self._capability() < FP8_CAPABILITY:
            k, v, pages = (jax.lax.bitcast_convert_type(x, jnp.uint8) for x in (k, v, pages))
        queries, pool = jax.new_ref(q), jax.new_ref(pages)
        self._write(k, v, batch.slots, pool)
        self._attend_single(queries, pool, batch)
        if q_tile > 1:
            self._attend_tiles(queries, pool, batch)
        return jax.freeze(queries), jax.lax.bitcast_convert_type(jax.freeze(pool), dtype)

    def _capability(self) -> int:
        return self.compute_capability or int(jax.devices()[0].compute_capability.replace(".", ""))

    def launch(
        self,
        kernel: str,
        grid: tuple[int, ...],
        operands: Mapping[str, Operand],
        constants: Mapping[str, int | float | str | bool],
        *,
        out: Mapping[str, jax.ShapeDtypeStruct] | None = None,
        warps: int = 4,
        stages: int = 1,
    ) -> tuple[jax.Array, ...]:
        """Put one kernel into the program that is being traced.

        Args:
            kernel: its name in :mod:`.triton_kernels`.
            grid: programs along up to three axes.
            operands: by parameter; a Ref is read and written in place, numbers are fixed when the step is compiled.
            constants: what it is specialised for.
            out: arrays it fills, by parameter.
            warps: of 32 threads, per program.
            stages: turns of its loop whose loads are under way at once.

        Returns:
            The arrays of ``out``.
        """
        import jax_triton

        filled: tuple[jax.Array, ...] = jax_triton.triton_call(
            kernel=getattr(load_kernels(), kernel),
            out_type=tuple((out or {}).values()),
            grid=grid,
            name=f"astraea_{kernel}",
            num_warps=warps,
            num_stages=stages,
            compute_capability=self.compute_capability,
            **operands,
            **constants,
        )
        return filled

    def _write(self, k: jax.Array, v: jax.Array, slots: jax.Array, pool: jax.Ref) -> None:
        t, heads, h = k.shape
        block = min(WRITE_BLOCK, _power(heads * h))
        self.launch(
            "write_kv",
            (t, -(-heads * h // block)),
            {"k": k, "v": v, "slots": slots, "pages": pool},
            {"K": heads, "S": pool.shape[3], "H": h, "BLOCK": block},
        )

    def _attend_single(self, queries: jax.Ref, pool: jax.Ref, batch: Batch) -> None:
        heads, size = pool.shape[2:4]
        _, n, h = queries.shape
        rows, width = batch.page_table.shape
        blocks = single_blocks(n // heads, h, queries.dtype)
        splits, least = split_context(rows, heads, width * size, blocks.n)
        share = {"H": h, "BLOCK_N": blocks.n, "WINDOW": self.window or 0}
        parts, heights = self.launch(
            "attend_single",
            (heads, rows, splits),
            {**self._operands(queries, pool, batch), "splits": splits, "least": least},
            {**self._constants(queries, pool, blocks), **share},
            out={
                "parts": jax.ShapeDtypeStruct((rows, n, splits, h), jnp.float32),
                "heights": jax.ShapeDtypeStruct((rows, n, splits), jnp.float32),
            },
            warps=blocks.warps,
            stages=blocks.stages,
        )
        lens = {"kv_lens": batch.kv_lens, "cu_q_lens": batch.cu_q_lens}
        self.launch(
            "combine",
            (n, rows),
            {"q": queries, **lens, "parts": parts, "heights": heights, "splits": splits, "least": least},
            {"N": n, "BLOCK_SPLITS": _power(splits), **share},
        )

    def _attend_tiles(self, queries: jax.Ref, pool: jax.Ref, batch: Batch) -> None:
        heads = pool.shape[2]
        t, n, h = queries.shape
        rows = batch.page_table.shape[0]
        blocks = tile_blocks(n // heads, h, queries.dtype)
        self.launch(
            "attend_tiles",
            (heads, t // (blocks.m // (n // heads)) + rows),
            {**self._operands(queries, pool, batch), "rows": rows},
            self._constants(queries, pool, blocks),
            warps=blocks.warps,
            stages=blocks.stages,
        )

    def _operands(self, queries: jax.Ref, pool: jax.Ref, batch: Batch) -> dict[str, Operand]:
        return {
            "q": queries,
            "pages": pool,
            "page_table": batch.page_table,
            "kv_lens": batch.kv_lens,
            "cu_q_lens": batch.cu_q_lens,
            "width": batch.page_table.shape[1],
            "scale": queries.shape[2] ** -0.5,
        }

    def _constants(self, queries: jax.Ref, pool: jax.Ref, blocks: Blocks) -> dict[str, int | float | str]:
        heads, size, h = pool.shape[2:]
        return {
            "K": heads,
            "G": queries.shape[1] // heads,
            "S": size,
            "H": h,
            "BLOCK_M": blocks.m,
            "BLOCK_N": blocks.n,
            "WINDOW": self.window or 0,
            "SOFT_CAP": self.soft_cap or 0.0,
            "PRECISION": "ieee" if queries.dtype == jnp.float32 else "tf32",
        }
