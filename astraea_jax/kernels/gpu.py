"""Ragged paged attention on NVIDIA GPUs: the kernels of :mod:`.triton_kernels`, launched from a compiled step.

Keys and values are written in place, so a step holds no second copy of a pool. The launches are custom calls that XLA
records into command buffers (CUDA graphs): jaxlib registers their handler, ``triton_kernel_call_ffi``, as compatible,
and XLA's default ``--xla_gpu_enable_command_buffer`` includes custom calls.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from astraea_jax.errors import StartupError
from astraea_jax.models.heads import Heads

from .backend import Batch

Operand = jax.Array | jax.Ref | int | float
FP8 = jnp.dtype(jnp.float8_e4m3fn)
KV_DTYPES = (*map(jnp.dtype, (jnp.float32, jnp.bfloat16, jnp.float16)), FP8)
FP8_CAPABILITY = 89
"""Least compute capability that converts float8; on older GPUs the kernels decode its bits."""
HEAD_DIMS = (16, 32, 64, 128, 256)
MOST_SPLITS = 32
"""Most Triton instances that share the context of one query."""


@dataclass(frozen=True)
class Blocks:
    """Block sizes of a kernel's matrix products and how many threads compute them."""

    m: int
    """Query rows: query heads of one key/value head, times queries."""
    n: int
    """Context tokens per iteration."""
    warps: int
    stages: int
    """Iterations whose loads are in flight at once."""


def single_blocks(group: int, head_dim: int, dtype: Any) -> Blocks:
    """Blocks for rows with one query: a matrix product takes at least 16 rows; loading dominates the time.

    Measured with Llama-3.1-8B's heads on an H200 (benchmarks/RESULTS.md), where two warps are a little faster than
    four; guessed for others.
    """
    m = max(16, power_of_two(group))
    return Blocks(m, 32 if head_dim > 128 or jnp.dtype(dtype).itemsize > 2 else 64, 2 if m == 16 else 4, 3)


def tile_blocks(group: int, head_dim: int, dtype: Any) -> Blocks:
    """Blocks for longer rows; float32 is multiplied without tensor cores, so its tiles must fit into registers."""
    if jnp.dtype(dtype).itemsize > 2:
        return Blocks(max(16, power_of_two(group)), 32, 4, 2)
    if head_dim > 128:
        return Blocks(max(64, power_of_two(group)), 32, 4, 2)
    return Blocks(max(128, power_of_two(group)), 64, 8, 3)


def split_context(rows: int, kv_heads: int, context: int, block: int) -> tuple[int, int]:
    """Count the instances that share one query's context of at most ``context`` tokens, and the least blocks of each.

    Few rows are split finely to fill the GPU; many rows only so far that a long context does not outlast short ones.
    """
    least = max(1, min(512, max(128, rows * kv_heads)) // block)
    return max(1, min(MOST_SPLITS, -(-context // (least * block)))), least


def power_of_two(n: int) -> int:
    """The least power of two that is at least ``n``."""
    return 1 << (n - 1).bit_length()


def load_kernels() -> dict[str, Any]:
    """The kernels of :mod:`.triton_kernels` and :mod:`.triton_products` by name.

    Raises:
        StartupError: Triton or jax-triton is not installed.
    """
    try:
        _complete_triton()
        import jax_triton  # noqa: F401

        from . import triton_kernels, triton_products
    except ImportError as error:
        raise StartupError(
            f"attention 'triton' cannot be loaded ({error}): it needs Python 3.12 or newer and "
            "`pip install astraea-jax[cuda]`; or start with attention 'reference', which is slower"
        ) from error
    return {**vars(triton_kernels), **vars(triton_products)}


def _complete_triton() -> None:
    """Give Triton 3.6, which PyTorch 2.11 brings, the constant of 3.7 without which jax-triton sees no NVIDIA backend.

    Only tensor descriptors use it (CUDA's number of the tf32 data type), and our kernels have none.
    """
    from triton.backends.nvidia import driver

    if not hasattr(driver, "TMA_TF32"):
        driver.TMA_TF32 = 11


@dataclass(frozen=True)
class Triton:
    """The backend of the Triton kernels.

    Raises:
        StartupError: there is no GPU, or Triton is not installed.
    """

    compute_capability: int | None = None
    """Compute capability of an absent GPU to compile for, such as 90 for H100 and H200."""

    single: Blocks | None = None
    """Blocks for rows with one query. None: :func:`single_blocks`."""
    tiles: Blocks | None = None
    """Blocks for longer rows. None: :func:`tile_blocks`."""

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
            StartupError: the kernels do not support heads of this size, or ``dtype``.
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
        """Return ``dtype``: pages hold the numbers themselves."""
        return jnp.dtype(dtype)

    def attend(self, heads: Heads, pages: jax.Array, batch: Batch, *, q_tile: int) -> tuple[jax.Array, jax.Array]:
        """Attend rows with one query, which writes them; if ``q_tile`` allows longer rows, write all, and attend these.

        In a step with longer rows, those with one query are written twice, with the same numbers.
        """
        dtype = pages.dtype
        if dtype == FP8 and self.capability() < FP8_CAPABILITY:
            pages = jax.lax.bitcast_convert_type(pages, jnp.uint8)
        pool = jax.new_ref(pages)
        if q_tile == 1:
            (out,) = self._attend_single(heads, pool, batch, None)
        else:
            queries = jax.new_ref(self._turn_and_write(heads, pool, batch))
            self._attend_single(heads, pool, batch, queries)
            self._attend_tiles(heads, queries, pool, batch)
            out = jax.freeze(queries)
        return out, jax.lax.bitcast_convert_type(jax.freeze(pool), dtype)

    def capability(self) -> int:
        """Compute capability of the GPU that is here, or that is compiled for."""
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
        """Add a kernel launch to the program that is being traced.

        Args:
            kernel: its name, of :func:`load_kernels`.
            grid: Triton instances along up to three axes.
            operands: by parameter; a Ref is read and written in place, numbers are fixed when the step is compiled.
            constants: compile-time parameters.
            out: shapes of the arrays that the kernel fills, by parameter.
            warps: warps per instance.
            stages: iterations of its loop whose loads are in flight at once.

        Returns:
            The arrays of ``out``.
        """
        import jax_triton

        filled: tuple[jax.Array, ...] = jax_triton.triton_call(
            kernel=load_kernels()[kernel],
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

    def _turn_and_write(self, heads: Heads, pool: jax.Ref, batch: Batch) -> jax.Array:
        t, k, _, h = heads.qkv.shape
        group = heads.group
        (queries,) = self.launch(
            "turn_and_write",
            (t, k),
            {**_unturned(heads), "slot_mapping": batch.slot_mapping, "pages": pool},
            {**_sizes(pool, group), "BLOCK_G": power_of_two(group), "NORM": heads.q_norm is not None},
            out={"q": jax.ShapeDtypeStruct((t, k * group, h), heads.qkv.dtype)},
        )
        return queries

    def _attend_single(
        self, heads: Heads, pool: jax.Ref, batch: Batch, queries: jax.Ref | None
    ) -> tuple[jax.Array, ...]:
        """Put the outputs of rows with one query into ``queries``; without it, return those of a decode step."""
        t, k, _, h = heads.qkv.shape
        n = k * heads.group
        rows, width = batch.page_table.shape
        blocks = self.single or single_blocks(heads.group, h, heads.qkv.dtype)
        context = width * pool.shape[3]
        if heads.switches.window is not None:
            context = min(context, heads.switches.window + blocks.n)  # a window may begin inside of a block
        splits, least = split_context(rows, k, context, blocks.n)
        parts, heights = self.launch(
            "attend_single",
            (k, rows, splits),
            {**_unturned(heads), **_context(heads, pool, batch), "splits": splits, "least": least},
            {**self._constants(heads, pool, blocks), "NORM": heads.q_norm is not None},
            out={
                "parts": jax.ShapeDtypeStruct((rows, n, splits, h), jnp.float32),
                "heights": jax.ShapeDtypeStruct((rows, n, splits), jnp.float32),
            },
            warps=blocks.warps,
            stages=blocks.stages,
        )
        operands = {"kv_lens": batch.kv_lens, "cu_q_lens": batch.cu_q_lens, "parts": parts, "heights": heights}
        share = {
            "H": h,
            "BLOCK_N": blocks.n,
            "WINDOW": heads.switches.window or 0,
            "BLOCK_SPLITS": power_of_two(splits),
        }
        return self.launch(
            "combine",
            (n, rows),
            {**operands, "splits": splits, "least": least, **({} if queries is None else {"q": queries})},
            {"N": n, "DECODE": queries is None, **share},
            out={"q": jax.ShapeDtypeStruct((t, n, h), heads.qkv.dtype)} if queries is None else None,
        )

    def _attend_tiles(self, heads: Heads, queries: jax.Ref, pool: jax.Ref, batch: Batch) -> None:
        k = pool.shape[2]
        t, n, h = queries.shape
        group, rows = n // k, batch.page_table.shape[0]
        blocks = self.tiles or tile_blocks(group, h, queries.dtype)
        self.launch(
            "attend_tiles",
            (k, t // (blocks.m // group) + rows),
            {"q": queries, **_context(heads, pool, batch), "rows": rows},
            self._constants(heads, pool, blocks),
            warps=blocks.warps,
            stages=blocks.stages,
        )

    def _constants(self, heads: Heads, pool: jax.Ref, blocks: Blocks) -> dict[str, int | float | str]:
        return {
            **_sizes(pool, heads.group),
            "BLOCK_M": blocks.m,
            "BLOCK_N": blocks.n,
            "WINDOW": heads.switches.window or 0,
            "SOFT_CAP": heads.switches.soft_cap or 0.0,
            "PRECISION": "ieee" if heads.qkv.dtype == jnp.float32 else "tf32",
            "SINKS": heads.sinks is not None,
        }


def _unturned(heads: Heads) -> dict[str, Operand]:
    """The heads as kernels take them; without a norm its scales are not looked at."""
    q_norm, k_norm = (heads.cos if norm is None else norm for norm in (heads.q_norm, heads.k_norm))
    return {
        "qkv": heads.qkv,
        "cos": heads.cos,
        "sin": heads.sin,
        "q_norm": q_norm,
        "k_norm": k_norm,
        "eps": heads.eps,
    }


def _context(heads: Heads, pool: jax.Ref, batch: Batch) -> dict[str, Operand]:
    return {
        "sinks": heads.cos if heads.sinks is None else heads.sinks,  # not looked at if there are none
        "pages": pool,
        "page_table": batch.page_table,
        "kv_lens": batch.kv_lens,
        "cu_q_lens": batch.cu_q_lens,
        "width": batch.page_table.shape[1],
        "scale": heads.scale,
    }


def _sizes(pool: jax.Ref, group: int) -> dict[str, int]:
    _, _, heads, size, h = pool.shape
    return {"K": heads, "G": group, "S": size, "H": h}
