"""How memory for KV is split between pages and window pages."""

from __future__ import annotations

import dataclasses
import logging

import pytest
from hypothesis import given, reject
from hypothesis import strategies as st
from support.stub import MODEL

from astraea_jax.engine.config import EngineConfig
from astraea_jax.engine.page_counts import PageCounts
from astraea_jax.errors import StartupError

LAYERS, LAYER = 6, 1000
PAGE = LAYERS * LAYER
CONFIG = EngineConfig(max_seqs=8, max_step_tokens=64, page_size=16)


def model(window=None, sliding=(), longest=32_768):
    return dataclasses.replace(MODEL, num_layers=LAYERS, window=window, sliding=sliding, max_position=longest)


@given(
    budget=st.integers(300, 10**5),
    window=st.integers(1, 5000),
    sliding=st.sets(st.integers(0, LAYERS - 1), min_size=1).map(tuple),
    seqs=st.integers(1, 64),
    size=st.sampled_from([1, 16, 64]),
)
def test_what_is_counted_fits_and_serves(budget, window, sliding, seqs, size):
    config = EngineConfig(max_seqs=seqs, max_step_tokens=max(seqs, 64), page_size=size)
    try:
        counts = PageCounts.within(budget * PAGE, PAGE, model(window, sliding), config)
    except StartupError:
        reject()
    assert counts.layers == (LAYERS - len(sliding), len(sliding))
    pages = counts.full * counts.layers[0] + counts.window.num_pages * counts.layers[1]
    assert pages * LAYER <= budget * PAGE
    assert counts.window.runnable(size, config.max_step_tokens) >= 1
    assert counts.full >= 2


def test_models_without_windows_get_what_fits():
    assert PageCounts.within(100 * PAGE, PAGE, model(), CONFIG) == (100, None, (LAYERS, 0))
    with pytest.raises(StartupError, match="fewer than two pages"):
        PageCounts.within(PAGE, PAGE, model(), CONFIG)


@pytest.mark.parametrize(("window", "longest"), [(64, 64), (4096, 64)])
def test_a_window_as_long_as_the_longest_context_is_none(window, longest):
    counts = PageCounts.within(100 * PAGE, PAGE, model(window, (1, 3), longest), CONFIG)
    assert counts == (100, None, (LAYERS, 0))
    short = dataclasses.replace(CONFIG, max_context=longest)
    assert PageCounts.within(100 * PAGE, PAGE, model(window, (1, 3)), short) == counts


def test_the_split_is_that_of_a_typical_program():
    """Of 8,192 tokens: 512 pages of three layers, and 10 window pages of three."""
    counts = PageCounts.within(100_000 * PAGE, PAGE, model(128, (0, 2, 4)), CONFIG)
    assert counts.full / counts.window.num_pages == pytest.approx(51.2, rel=0.01)


def test_fewer_requests_run_where_fewer_windows_fit(caplog):
    with caplog.at_level(logging.WARNING):
        counts = PageCounts.within(60 * PAGE, PAGE, model(128, (0, 1, 2, 3, 4)), CONFIG)
    assert counts.window.runnable(16, 64) == 3
    assert "for 3 requests: so many run at once, not max_seqs = 8" in caplog.text


def test_no_room_for_a_window_says_what_would_help():
    with pytest.raises(StartupError, match=r"no room for a window of 4096 tokens .* raise kv_bytes"):
        PageCounts.within(100 * PAGE, PAGE, model(4096, (0, 1, 2)), CONFIG)


def test_pages_without_layers_only_count():
    counts = PageCounts.within(200 * PAGE, PAGE, model(128, tuple(range(LAYERS))), CONFIG)
    assert counts.window.num_pages == 200
    assert counts.full == 1 + 200 // 9 * (32_768 // 16)
