"""One request as its caller sees it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from astraea_jax.scheduler.program import Request


class Delta(NamedTuple):
    """What a request has produced since the last one. ``finish_reason`` is set on the last only.

    A tuple, because every token makes one and dataclasses take twice as long.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str | None = None
    """``"stop"`` (stop token or string), ``"length"`` or ``"cancelled"``."""


@dataclass(frozen=True)
class Usage:
    """What a finished request took. Times in seconds."""

    prompt_tokens: int
    cached_tokens: int
    """Prompt tokens whose KV the program still held."""
    output_tokens: int
    queue_s: float
    """From submission to the first step that ran it."""
    prefill_s: float
    """From that step to the first token."""
    decode_s: float
    """From the first token to the last."""
    preemptions: int

    @classmethod
    def of(cls, request: Request, now: float) -> Usage:
        scheduled = request.first_scheduled if request.first_scheduled is not None else now
        first = request.first_token if request.first_token is not None else now
        return cls(
            prompt_tokens=len(request.prompt),
            cached_tokens=request.cached_tokens,
            output_tokens=len(request.output),
            queue_s=scheduled - request.submitted,
            prefill_s=first - scheduled,
            decode_s=now - first,
            preemptions=request.preemptions,
        )


class Generation:
    """A running request: an async iterator of :class:`Delta`, bound to the event loop it was made in.

    Iterating raises what went wrong with this request: ``RequestError``, ``Overloaded`` or ``EngineDead``.
    Its buffer is bounded by ``max_tokens``. Leaving the iteration early should be followed by :meth:`cancel`.
    """

    def __init__(self, cancel: Callable[[Generation], None]):
        self.loop = asyncio.get_running_loop()
        self.usage: Usage | None = None
        """Complete once the last Delta is out."""
        self._cancel = cancel
        self._items: asyncio.Queue[Delta | Exception] = asyncio.Queue()
        self._ended = False

    def __aiter__(self) -> Generation:
        return self

    async def __anext__(self) -> Delta:
        if self._ended:
            raise StopAsyncIteration
        item = await self._items.get()
        self._ended = isinstance(item, Exception) or item.finish_reason is not None
        if isinstance(item, Exception):
            raise item
        return item

    async def text(self) -> str:
        """Wait for the end and return the whole text."""
        return "".join([delta.text async for delta in self])

    def cancel(self) -> None:
        """Stop it, from any thread; its pages are free within one step. Does nothing once it has ended."""
        self._cancel(self)

    def put(self, item: Delta | Exception) -> None:
        """Deliver; called in the generation's own event loop."""
        self._items.put_nowait(item)


class Outbox:
    """What the loop has for callers, handed over with one wake-up per event loop."""

    def __init__(self) -> None:
        self._items: dict[asyncio.AbstractEventLoop, list[tuple[Generation, Delta | Exception]]] = {}

    def put(self, generation: Generation, item: Delta | Exception) -> None:
        self._items.setdefault(generation.loop, []).append((generation, item))

    def deliver(self) -> list[Generation]:
        """Hand everything over; returns the generations whose event loop is closed, so that nobody will read them."""
        items, self._items = self._items, {}
        lost = []
        for loop, of_loop in items.items():
            try:
                loop.call_soon_threadsafe(_put_all, of_loop)
            except RuntimeError:
                lost += [generation for generation, _ in of_loop]
        return lost


def _put_all(items: list[tuple[Generation, Delta | Exception]]) -> None:
    for generation, item in items:
        generation.put(item)
