"""Turns chats and texts into tokens without holding up an event loop.

Whoever calls from this process is trusted (:func:`encode_prompt`). Front doors share :data:`DOORS`, where the text that
waits is bounded, for each client too, and short texts do not wait behind long ones.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from astraea_jax.engine.shared_bound import SharedBound
from astraea_jax.errors import Overloaded, RequestError
from astraea_jax.models.tokenizer import Tokenizer

T = TypeVar("T")

LONG_TEXT = 4096
"""Characters from which a prompt is tokenised in a thread."""
VERY_LONG_TEXT = 2**17
"""Characters from which a client's text waits for the one thread that takes such; they take a tenth of a second."""
MAX_WAITING = 2**25
"""Characters of clients' texts that may wait or be in work; a client that has some already gets three quarters."""

_threads = ThreadPoolExecutor(4, thread_name_prefix="astraea-text")
"""An event loop's default threads would not do: tools may fill them while they wait for agents of their own."""


async def encode_prompt(characters: int, encode: Callable[[], T]) -> T:
    """Return ``encode()``, computed in a thread if its prompt has about ``LONG_TEXT`` characters or more."""
    if characters < LONG_TEXT:
        return encode()
    return await asyncio.get_running_loop().run_in_executor(_threads, encode)


class TextPool:
    """Threads for the texts of clients, and a bound on what waits for them.

    Args:
        threads: for texts that are not very long; those have one of their own.
        max_waiting: characters that may wait or be in work.
    """

    def __init__(self, threads: int = max(1, (os.cpu_count() or 1) // 2), max_waiting: int = MAX_WAITING):
        self._ordinary = ThreadPoolExecutor(threads, thread_name_prefix="astraea-door-text")
        self._very_long = ThreadPoolExecutor(1, thread_name_prefix="astraea-door-long-text")
        self._waiting = SharedBound(max_waiting)
        self._lock = threading.Lock()

    async def run(self, owner: str, characters: int, work: Callable[[], T]) -> T:
        """Return ``work()``, computed in a thread unless the text is short.

        Args:
            owner: the client.
            characters: about the length of the text; of a chat, of all its strings.
            work: renders or tokenises it. If the caller is cancelled before it has begun, it is not done at all.

        Raises:
            Overloaded: too much text waits; nothing has been done.
        """
        if characters < LONG_TEXT:
            return work()
        self._reserve(owner, characters)
        pool = self._ordinary if characters < VERY_LONG_TEXT else self._very_long
        future = pool.submit(work)
        future.add_done_callback(lambda done: self._release(owner, characters, done))
        return await asyncio.wrap_future(future)

    def _reserve(self, owner: str, characters: int) -> None:
        with self._lock:
            if not self._waiting.has_room(owner, characters):
                raise Overloaded(self._waiting.refusal(owner, characters, "characters of text"))
            self._waiting.add(owner, characters)

    def _release(self, owner: str, characters: int, _: Future[Any]) -> None:
        with self._lock:
            self._waiting.add(owner, -characters)


DOORS = TextPool()
"""The pool of all front doors of this process."""


def check_length(tokenizer: Tokenizer, characters: int, max_context: int) -> None:
    """Refuse a text that cannot fit, however it is tokenised; this costs nothing.

    Raises:
        RequestError: it has more characters than ``max_context`` tokens can stand for.
    """
    if (longest := tokenizer.longest_token) is not None and characters > longest * max_context:
        raise RequestError(f"the text has {characters} characters, which exceed the context of {max_context} tokens")


def checked_ids(ids: list[int], max_context: int) -> list[int]:
    """Return the tokens of a text unless they exceed the context; for the pool's threads, since lists may be long.

    Raises:
        RequestError: they do.
    """
    if len(ids) >= max_context:
        raise RequestError(f"the prompt has {len(ids)} tokens, which leave no room in the context of {max_context}")
    return ids
