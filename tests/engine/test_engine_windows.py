"""Engines of models with windows: tokens are those of dense attention, and pages that a window has left are freed."""

from __future__ import annotations

import asyncio
import dataclasses
import random

import pytest
from support.disturbed import program
from support.engines import settled
from support.random_model import RANDOM
from support.sizes import SMALL
from support.windowed import greedy_of, windowed_decoder

from astraea_jax.engine.engine import Engine
from astraea_jax.models.config import Experts
from astraea_jax.models.tokenizer import Tokenizer

PAGE = 2 * 1024
"""Bytes of a page of four tokens and its window page, two layers."""
MIXTURE = dataclasses.replace(RANDOM, experts=Experts(6, 2, 32, shared_size=32))
CASES = [
    (RANDOM, 1, (0,), 48, {}),
    (MIXTURE, 3, (1,), 48, {"tensor_parallel": 2}),
    (RANDOM, 4, (0, 1), 24, {"scan_layers": True}),
    (RANDOM, 13, (0,), 48, {}),
    (MIXTURE, 5, (0, 2), 48, {"scan_layers": True}),
]
"""Models, windows around the four tokens of a page, layers of two or four that have them, pages of memory, and the
configuration. (Whether layers have experts matters to no page: their tokens must be right whatever is cancelled.)"""


@pytest.fixture(params=CASES, ids=lambda case: " ".join(map(str, case[1:])))
def case(request, random_folder):
    """An engine whose pools are too small, and what it must say."""
    model, window, sliding, pages, more = request.param
    layers = 4 if max(sliding) > 1 else 2
    decoder, page = windowed_decoder(model, window, sliding, layers), layers // 2 * PAGE
    greedy, memory = greedy_of(decoder), {"kv_bytes": pages * page, "host_kv_bytes": 60 * page}
    sizes = {"max_seqs": 4, "max_step_tokens": 16, "max_context": 96}
    config = dataclasses.replace(SMALL, **sizes, **memory, **more, residency="infercept")
    engine = Engine(decoder, Tokenizer.from_folder(random_folder), config)
    engine.start()
    yield engine, greedy
    engine.shutdown(grace_s=0)


async def test_greedy_tokens_do_not_depend_on_what_happens_to_pages(case):
    """Programs share a beginning, are preempted, offloaded, restored, cancelled, and replace earlier text."""
    engine, greedy = case
    fitting = engine.layout.window.runnable(engine.config.page_size, engine.config.max_step_tokens)
    assert engine.slots == min(engine.config.max_seqs, fitting)
    for cancels in (0.0, 0.3):
        cached = await asyncio.gather(
            *(program(engine, greedy, i, random.Random(i), cancels=cancels) for i in range(20))
        )
        assert sum(cached) > 0
        await settled(engine, programs=True)
        stats, layout = engine.stats(), engine.layout
        assert (stats.free_pages, stats.free_windows) == (layout.num_pages - 1, layout.window.num_pages - 1)
        assert not engine._store._copies
    assert engine.stats().offloaded_windows > 0
    assert engine.stats().failed_transfers == 0
