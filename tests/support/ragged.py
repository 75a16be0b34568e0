"""Random ragged batches over paged keys and values, and what attention must make of them, in a few lines of NumPy."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

from astraea_jax.kernels import Backend, Batch
from astraea_jax.models.heads import PLAIN, Heads, Switches

ROWS, TOKENS = 8, 64
EPS = 1e-3


@dataclass(frozen=True)
class Ragged:
    """Arguments of ``attend`` as NumPy arrays, float32, with NaN wherever a backend must not look."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    pages: np.ndarray
    batch: Batch
    q_tile: int
    angle: np.ndarray
    """``[T, H / 2]``, by which queries and keys are rotated."""
    norms: tuple[np.ndarray, np.ndarray] | None
    """Scales ``[H]`` of the norms of queries and keys."""
    switches: Switches = PLAIN
    sinks: np.ndarray | None = None
    """``[N]``."""
    float32_norms: bool = False
    """Whether the scales of norms are in float32, whatever the heads are in."""

    @classmethod
    def make(
        cls,
        size: int,
        kv_heads: int,
        group: int,
        head: int,
        q_lens: list[int],
        past: list[int],
        seed: int,
        longest: int = 0,
        *,
        rotated: bool = False,
        normed: bool = False,
    ) -> Ragged:
        """Rows of ``q_lens`` new tokens after ``past`` ones, on pages of ``size`` tokens in random order.

        The page table is wide enough for ``longest`` tokens, too. Queries and keys may need a rotation or a norm.
        """
        rng = np.random.default_rng(seed)
        rows = len(q_lens)
        lens = np.array(q_lens) + past
        width = -(-max(longest, *lens) // size) + 1
        table = rng.permutation(np.arange(1, rows * width + 1)).reshape(rows, width).astype(np.int32)
        pages = np.full((rows * width + 1, 2, kv_heads, size, head), np.nan, np.float32)
        decode = max(q_lens) <= 1
        tokens = rows if decode else max(TOKENS, sum(q_lens))
        slot_mapping, at = np.zeros(tokens, np.int32), 0
        for row in range(rows):
            pos = np.arange(lens[row])
            slot = table[row, pos // size] * size + pos % size
            old, new = np.split(slot, [past[row]])
            pages[old // size, :, :, old % size] = rng.normal(size=(past[row], 2, kv_heads, head))
            slot_mapping[at : at + len(new)] = new
            at += len(new)
        cu = np.concatenate([[0], np.cumsum(q_lens)]).astype(np.int32)
        q, k, v = (
            rng.normal(size=(tokens, n, head)).astype(np.float32) for n in (kv_heads * group, kv_heads, kv_heads)
        )
        batch = Batch(table, lens.astype(np.int32), cu, slot_mapping)
        angle = rng.uniform(0, 7 if rotated else 0, size=(tokens, head // 2)).astype(np.float32)
        norms = rng.uniform(0.5, 2, size=(2, head)).astype(np.float32)
        return cls(q, k, v, pages, batch, 1 if decode else 16, angle, tuple(norms) if normed else None)

    def behind(self, window: int | None) -> Ragged:
        """Return it without the context that no query sees: NaN instead, and the null page instead of whole pages."""
        if window is None:
            return self
        table, lens, cu, _ = self.batch
        size, gone = self.pages.shape[3], np.maximum(lens - np.diff(cu) - window + 1, 0)
        pages, seen = self.pages.copy(), np.arange(table.shape[1]) >= gone[:, None] // size
        for row, count in enumerate(gone):
            at = np.arange(count)
            pages[table[row, at // size], :, :, at % size] = np.nan
        return replace(self, pages=pages, batch=self.batch._replace(page_table=np.where(seen, table, 0)))

    def heads(self, dtype: Any) -> Heads:
        """The tokens as attention takes them."""
        plain = Heads.of(*(jnp.asarray(x, dtype) for x in (self.q, self.k, self.v)))
        of_norms = jnp.float32 if self.float32_norms else dtype
        q_norm, k_norm = (jnp.asarray(x, of_norms) for x in self.norms) if self.norms else (None, None)
        sinks = None if self.sinks is None else jnp.asarray(self.sinks)
        turns = jnp.cos(self.angle), jnp.sin(self.angle)
        return Heads(plain.qkv, *turns, q_norm, k_norm, sinks, eps=EPS, switches=self.switches)

    def switched(self, switches: Switches, sinks: bool) -> Ragged:
        """The same with other switches, and perhaps with sinks."""
        logits = np.random.default_rng(7).normal(size=self.q.shape[1]).astype(np.float32)
        return replace(self, switches=switches, sinks=logits if sinks else None)

    def turned(self, x: np.ndarray, norm: int) -> np.ndarray:
        """Queries (norm 0) or keys (norm 1) after their norm and rotation."""
        if self.norms:
            x = x / np.sqrt((x * x).mean(-1, keepdims=True) + EPS) * self.norms[norm]
        pairs = (x[..., : x.shape[-1] // 2] + 1j * x[..., x.shape[-1] // 2 :]) * np.exp(1j * self.angle)[:, None]
        return np.concatenate([pairs.real, pairs.imag], axis=-1).astype(np.float32)

    def attend(self, backend: Backend, dtype: Any = jnp.float32, kv_dtype: Any = None) -> tuple[np.ndarray, np.ndarray]:
        """Return what a backend makes of it: outputs and pages, as float32."""
        kv_dtype = kv_dtype or dtype
        pages = self.pages.astype(kv_dtype).view(backend.page_dtype(kv_dtype))
        out, pages = _attend(backend, self.heads(dtype), pages, self.batch, self.q_tile)
        assert out.dtype == dtype
        return np.asarray(out, np.float32), np.asarray(pages).view(kv_dtype).astype(np.float32)

    def expected(self) -> tuple[np.ndarray, np.ndarray]:
        """Return what it must be; outputs of padding are 0."""
        window, scale, soft_cap = self.switches.window, self.switches.scale, self.switches.soft_cap
        table, lens, cu, slot_mapping = self.batch
        pages, out = self.pages.copy(), np.zeros_like(self.q)
        q, k = self.turned(self.q, 0), self.turned(self.k, 1)
        kv_heads, size, head = pages.shape[2:]
        real = slot_mapping[: cu[-1]]
        pages[real // size, 0, :, real % size] = k[: cu[-1]]
        pages[real // size, 1, :, real % size] = self.v[: cu[-1]]
        for row, kv_len in enumerate(lens):
            used = table[row, : -(-kv_len // size)]
            context = pages[used].transpose(1, 2, 0, 3, 4).reshape(2, kv_heads, -1, head)
            for t in range(cu[row], cu[row + 1]):
                end = kv_len - (cu[row + 1] - t) + 1
                keys, values = context[:, :, max(0, end - window) if window else 0 : end]
                queries = q[t].reshape(kv_heads, -1, head)
                scores = np.einsum("KGH,KSH->KGS", queries, keys) * (scale or head**-0.5)
                if soft_cap:
                    scores = soft_cap * np.tanh(scores / soft_cap)
                sinks = np.full(len(q[t]), -np.inf) if self.sinks is None else self.sinks
                sinks = sinks.reshape(kv_heads, -1, 1)
                top = np.maximum(scores.max(-1, keepdims=True), sinks)
                weights = np.exp(scores - top)
                weights /= weights.sum(-1, keepdims=True) + np.exp(sinks - top)
                out[t] = np.einsum("KGS,KSH->KGH", weights, values).reshape(-1, head)
        return out, pages

    def check(
        self, got: tuple[np.ndarray, np.ndarray], expected: tuple[np.ndarray, np.ndarray], rtol: float, atol: float
    ) -> None:
        """Outputs are close, those of padding finite; pages hold what was written (the null page anything)."""
        real = self.batch.cu_q_lens[-1]
        np.testing.assert_allclose(got[0][:real], expected[0][:real], rtol=rtol, atol=atol)
        assert np.isfinite(got[0][real:]).all()
        np.testing.assert_allclose(got[1][1:], expected[1][1:], rtol=rtol, atol=atol)

    def check_alike(self, one: Backend, other: Backend, dtype: Any, kv_dtype: Any = None) -> None:
        """Two backends write the same numbers, but for a last digit here and there, and their outputs are close."""
        (got, pages), (expected, written) = (self.attend(backend, dtype, kv_dtype) for backend in (one, other))
        real = self.batch.cu_q_lens[-1]
        np.testing.assert_allclose(got[:real], expected[:real], rtol=3e-2, atol=3e-2)
        assert np.isfinite(got[real:]).all()
        pages, written = pages[1:], written[1:]
        assert ((pages == written) | np.isnan(written)).mean() > 0.995
        digit = float(jnp.finfo(kv_dtype or dtype).eps)
        np.testing.assert_allclose(pages, written, rtol=1.01 * digit, atol=2**-9)


def like_a_model(decode: bool, normed: bool, size: int, kv_heads: int, group: int, head: int, seed: int) -> Ragged:
    """Rows with contexts of a few pages, whose queries and keys need a rotation and perhaps a norm."""
    q_lens, past = ([1, 1, 1, 1, 0], [0, 5, 300, 77, 0]) if decode else ([1, 40, 1, 0, 3], [300, 5, 0, 0, 70])
    return Ragged.make(size, kv_heads, group, head, q_lens, past, seed, rotated=True, normed=normed)


@partial(jax.jit, static_argnums=(0, 4))
def _attend(backend: Backend, heads: Heads, pages: jax.Array, batch: Batch, q_tile: int) -> tuple[jax.Array, jax.Array]:
    return backend.attend(heads, pages, batch, q_tile=q_tile)


LAYOUTS = st.sampled_from([(1, 2, 2, False), (4, 1, 8, True), (16, 2, 3, True)])
"""Few, since each is compiled: tokens of a page, key/value heads, query heads to each, whether these have a norm."""
VARIANTS = st.sampled_from([(PLAIN, False), (Switches(window=5, scale=0.3, soft_cap=2.0), True)])
"""Switches, and whether there are sinks."""


@st.composite
def ragged(draw: st.DrawFn, head: int = 16, long: int = 40) -> Ragged:
    """Rows of 0, 1 or many queries on contexts around page edges, and up to ``long`` tokens before them."""
    size, kv_heads, group, normed = draw(LAYOUTS)
    decode = draw(st.booleans())
    edges = st.sampled_from([0, 1, size - 1, size, size + 1, long])
    q_lens = [draw(st.integers(0, 1)) if decode else draw(st.sampled_from([0, 1, 3, 16, 17])) for _ in range(ROWS)]
    while sum(q_lens) > TOKENS:
        q_lens[int(np.argmax(q_lens))] = 1
    if decode:  # rows without a query come last, as the runner lays them out
        q_lens.sort(reverse=True)
    past = [draw(edges) if n else 0 for n in q_lens]
    seed = draw(st.integers(0, 2**32 - 1))
    return Ragged.make(size, kv_heads, group, head, q_lens, past, seed, long + 17, rotated=True, normed=normed)
