"""Batches without what no query sees."""

from __future__ import annotations

import jax.numpy as jnp
from hypothesis import given, settings
from hypothesis import strategies as st
from support.ragged import Ragged, ragged

from astraea_jax.kernels import Batch, Reference
from astraea_jax.models.heads import Switches


class FromFirstPage(Reference):
    """Reads every context from its first page on, as published kernels do, and knows nothing of what lies before."""

    def attend(self, heads, pages, batch, *, q_tile):
        batch = batch.within(heads.switches.window, pages.shape[3], decode=q_tile == 1)
        return super().attend(heads, pages, batch, q_tile=q_tile)


@settings(deadline=None, max_examples=20)
@given(case=ragged(), window=st.sampled_from([1, 2, 4, 5, 16, 19]))
def test_without_pages_before_the_window_the_same_comes_out(case: Ragged, window: int):
    case = case.switched(Switches(window=window), False).behind(window)
    case.check(case.attend(FromFirstPage()), case.expected(), rtol=1e-4, atol=1e-5)


@given(past=st.integers(0, 100), window=st.integers(1, 40), size=st.sampled_from([1, 4, 16]))
def test_a_decoding_row_has_as_many_pages_as_a_window_can_touch(past, window, size):
    pages = jnp.arange(1, 130)[None]
    batch = Batch(pages, jnp.array([past + 1]), jnp.array([0, 1]), jnp.zeros(1, jnp.int32))
    short = batch.within(window, size, decode=True)
    oldest = max(0, past - window + 1)
    assert short.page_table[0, : -(-short.kv_lens[0] // size)].tolist() == list(
        range(oldest // size + 1, past // size + 2)
    )
