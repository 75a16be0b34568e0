"""Feeds an engine with more requests than its queue holds, without losing any or asking too often."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from functools import partial
from typing import TypeVar

from astraea_jax.engine.generation import Delta, Usage
from astraea_jax.engine.interface import Model, Stream
from astraea_jax.engine.sampling import SamplingParams
from astraea_jax.errors import Overloaded

RETRY_S = 0.02
"""Seconds after which a request that was refused because the queue was full is offered again."""

A = TypeVar("A")
R = TypeVar("R")


async def map_in_order(work: Callable[[A], Awaitable[R]], items: Sequence[A], limit: int) -> list[R]:
    """Results of ``work`` for each item, ``limit`` items at a time at most. Items are begun in order.

    ``work`` returns its errors. Cancelling this cancels what has begun, and waits until that has ended.
    """
    results: dict[int, R] = {}
    waiting = iter(enumerate(items))

    async def take_items() -> None:
        for i, item in waiting:
            results[i] = await work(item)

    async with asyncio.TaskGroup() as group:
        for _ in range(min(limit, len(items))):
            group.create_task(take_items())
    return [results[i] for i in range(len(items))]


class PatientModel:
    """A model whose requests wait where the engine would refuse them because its queue is full.

    Those that wait enter in the order in which they came. Others that use the engine may fill its queue at any time.
    """

    def __init__(self, model: Model):
        self.tokenizer = model.tokenizer
        self.tool_called, self.end_session = model.tool_called, model.end_session
        self._model = model
        self._entry = asyncio.Lock()

    def generate(
        self,
        prompt: Sequence[int],
        params: SamplingParams | None = None,
        *,
        session: str | None = None,
        final: bool = False,
        salt: str = "",
    ) -> PatientStream:
        """Do as :meth:`Model.generate`, but raise every error while iterating."""
        generate = partial(self._model.generate, prompt, params, session=session, final=final, salt=salt)
        return PatientStream(generate, self._entry)


class PatientStream:
    """A request that may not have been accepted yet; it is made when somebody iterates."""

    def __init__(self, generate: Callable[[], Stream], entry: asyncio.Lock):
        self._generate = generate
        self._entry = entry
        self._stream: Stream | None = None

    @property
    def usage(self) -> Usage | None:
        """Complete once the last Delta is out."""
        return self._stream.usage if self._stream is not None else None

    def cancel(self) -> None:
        """Stop the request if it has been accepted. Who waits for that is cancelled as any coroutine is."""
        if self._stream is not None:
            self._stream.cancel()

    async def __aiter__(self) -> AsyncIterator[Delta]:
        while True:
            self._stream = await self._enter()
            begun = False
            try:
                async for delta in self._stream:
                    begun = True
                    yield delta
                return
            except Overloaded:  # too many programs: found out only after the queue
                if begun:
                    raise
            await asyncio.sleep(RETRY_S)

    async def _enter(self) -> Stream:
        async with self._entry:
            while True:
                try:
                    return self._generate()
                except Overloaded:
                    await asyncio.sleep(RETRY_S)
