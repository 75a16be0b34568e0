"""The state of a server at one moment as plain data, for its status page."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from importlib.metadata import version
from typing import Any

from astraea_jax.engine.engine import Engine
from astraea_jax.engine.interface import Serving
from astraea_jax.errors import EngineDead, Overloaded
from astraea_jax.scheduler.view import ProgramView

SHOWN = 100
"""Programs shown at most, of each replica."""
FRESH_S = 0.5
"""Seconds for which a picture of the programs is shown again: whoever asks more often costs the loop nothing."""
ANSWER_S = 2.0
"""Seconds that the loop has to answer. One whose device hangs never does, and the page says so."""
OWNERS = 64
"""Owners whose last picture is kept."""

Programs = list[tuple[int, ProgramView]]
"""Programs, each with the number of its replica."""


class Status:
    """Makes pictures of an engine, in the event loop of the server.

    Args:
        engine: whose state is shown.
        model: the model's name.
    """

    def __init__(self, engine: Serving, model: str):
        self._engine, self._model = engine, model
        self._began = time.monotonic()
        self._looking = asyncio.Lock()
        self._seen: OrderedDict[str | None, tuple[float, Programs | None]] = OrderedDict()

    async def picture(self, owner: str, *, everybody: bool, names: bool) -> dict[str, Any]:
        """Say how the server is doing.

        Args:
            owner: who asks.
            everybody: show the programs of all owners, instead of only theirs.
            names: show the names of all sessions, instead of only theirs.
        """
        programs = await self._programs(None if everybody else owner)
        stats = self._engine.stats()
        return {
            "model": self._model,
            "version": version("astraea-jax"),
            "state": self._engine.state.value,
            "uptime_s": round(time.monotonic() - self._began, 3),
            "replicas": [_numbers(replica) for replica in self._engine.replicas],
            "live_programs": stats.programs,
            "everybody": everybody,
            "programs": programs and [_shown(number, view, owner, names) for number, view in programs],
        }

    async def _programs(self, owner: str | None) -> Programs | None:
        """Programs of an owner, or (None) of all, as of half a second ago at most; None: a loop does not answer."""
        async with self._looking:
            at, programs = self._seen.get(owner, (-FRESH_S, None))
            if time.monotonic() - at >= FRESH_S:
                programs = await self._look(owner)
                self._seen[owner] = time.monotonic(), programs
                self._seen.move_to_end(owner)
                if len(self._seen) > OWNERS:
                    self._seen.popitem(last=False)
            return programs

    async def _look(self, owner: str | None) -> Programs | None:
        try:
            asked = [(n, asyncio.wrap_future(one.look(SHOWN, owner))) for n, one in self._serving()]
            async with asyncio.timeout(ANSWER_S):
                return [(number, view) for number, answer in asked for view in await answer]
        except (EngineDead, Overloaded, TimeoutError):
            return None

    def _serving(self) -> list[tuple[int, Engine]]:
        return [(number, one) for number, one in enumerate(self._engine.replicas) if one.live]


def _numbers(engine: Engine) -> dict[str, Any]:
    stats, layout, total = engine.stats(), engine.layout, engine.layout.num_pages - 1
    return {
        "state": engine.state.value,
        "running": stats.running,
        "waiting": stats.waiting,
        "tool_wait": stats.in_tool_wait,
        "human_wait": stats.in_human_wait,
        "slots": engine.slots,
        "page_bytes": layout.page_bytes,
        "page_tokens": engine.config.page_size,
        "device_pages": {
            "running": total - stats.free_pages - stats.retained_pages,
            "retained": stats.retained_pages,
            "cached": stats.cached_pages,
            "free": stats.free_pages - stats.cached_pages,
        },
        "host_pages": {"used": stats.host_pages, "free": layout.host.pages - stats.host_pages},
        "steps": engine.times.steps,
        "prompt_tokens": engine.work.prompt_tokens,
        "cached_tokens": engine.work.cached_tokens,
        "output_tokens": engine.work.output_tokens,
        "preemptions": stats.preemptions,
        "refused": engine.refused,
    }


def _shown(replica: int, view: ProgramView, owner: str, names: bool) -> dict[str, Any]:
    whose, name = view.key if isinstance(view.key, tuple) else (None, None)
    return {
        "id": f"{replica}.{view.number}",
        "name": name if names or whose == owner else None,
        "state": view.state,
        "state_s": round(view.state_s, 3),
        "age_s": round(view.age_s, 3),
        "turns": view.turns,
        "tool": view.tool if names or whose == owner else None,
        "tokens": view.tokens,
        "device_pages": view.device_pages,
        "host_pages": view.host_pages,
        "residency": view.residency,
    }
