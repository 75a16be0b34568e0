"""How memory for KV is split between pages and window pages.

Programs need both in a proportion that depends on the length of their contexts, which nobody knows beforehand: one of
:data:`TYPICAL_TOKENS` is taken as typical. As many window pages are made as the typical programs have that fit into the
memory, and at least as many as ``max_seqs`` running requests need, if these take no more than half of it; all the rest
becomes pages. If windows of fewer requests fit, so many run at once. Where all layers have a window, a page takes no
memory and only counts, so there are as many as the programs whose windows fit can have.
"""

from __future__ import annotations

import logging
from typing import NamedTuple, Self

from astraea_jax.engine.config import EngineConfig
from astraea_jax.errors import StartupError
from astraea_jax.models.config import ModelConfig
from astraea_jax.scheduler.windows import Window

log = logging.getLogger(__name__)

TYPICAL_TOKENS = 8192
"""Tokens of a program: a guess."""
MOST_COUNTED = 2**18
"""Pages that hold no memory, at most, or what one context has."""


class PageCounts(NamedTuple):
    """Pages of one replica, null pages included."""

    full: int
    window: Window | None
    layers: tuple[int, int]
    """Layers of a page, and of a window page."""

    @classmethod
    def within(cls, budget: int, page: int, model: ModelConfig, config: EngineConfig) -> Self:
        """The pages that fit into ``budget`` bytes, of which a page and its window page together take ``page``.

        Layers whose window is no shorter than the longest context count as layers without one.

        Raises:
            StartupError: not even one usable page fits, or not one window.
        """
        longest = config.max_context or model.max_position
        tokens = max((kind.window for kind in model.layer_kinds if kind.window), default=longest)
        if tokens >= longest:
            return cls(_fitting(budget, page), None, (model.num_layers, 0))
        with_window = sum(kind.window is not None for kind in model.layer_kinds)
        layers = model.num_layers - with_window, with_window
        full, windowed = (page // model.num_layers * count for count in layers)
        each = Window(tokens, 0).span(config.page_size) + 2
        count = _windows(budget, full, windowed, each, min(TYPICAL_TOKENS, longest), config)
        window = Window(tokens, count)
        running = window.runnable(config.page_size, config.max_step_tokens)
        if running < 1:
            raise StartupError(
                f"a KV budget of {budget} bytes has no room for a window of {tokens} tokens beside a step's "
                f"{config.max_step_tokens}; raise kv_bytes, or lower max_step_tokens"
            )
        if running < config.max_seqs:
            log.warning(
                "windows of %d tokens fit into %d bytes for KV for %d requests: so many run at once, not max_seqs = %d",
                *(tokens, budget, running, config.max_seqs),
            )
        if not full:
            per_seq = -(-longest // config.page_size)
            return cls(1 + max(per_seq, min(MOST_COUNTED, count // (each - 1) * per_seq)), window, layers)
        return cls(_fitting(budget - count * windowed, full), window, layers)


def _windows(budget: int, full: int, windowed: int, each: int, typical: int, config: EngineConfig) -> int:
    """Number of window pages of ``windowed`` bytes beside pages of ``full`` bytes, if a request needs ``each``."""
    most = budget // windowed
    if not full:
        return most
    of_program = -(-typical // config.page_size) * full + each * windowed
    step = 1 + -(-config.max_step_tokens // config.page_size)
    return max(budget * each // of_program, min(step + each * config.max_seqs, most // 2))


def _fitting(budget: int, page: int) -> int:
    if budget < 2 * page:
        raise StartupError(
            f"a KV budget of {budget} bytes holds fewer than two pages of {page} bytes; raise kv_bytes, or if there is "
            "no more memory, shard the model by tensor_parallel or store 8-bit weights by quantize"
        )
    return budget // page
