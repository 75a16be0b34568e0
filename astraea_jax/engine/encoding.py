"""Tokenises prompts without holding up an event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

LONG_TEXT = 4096
"""Characters from which a prompt is tokenised in a thread."""

_threads = ThreadPoolExecutor(4, thread_name_prefix="astraea-text")
"""An event loop's default threads would not do: tools may fill them while they wait for agents of their own."""


async def encode_prompt(characters: int, encode: Callable[[], list[int]]) -> list[int]:
    """Return ``encode()``, computed in a thread if its prompt has about ``LONG_TEXT`` characters or more."""
    if characters < LONG_TEXT:
        return encode()
    return await asyncio.get_running_loop().run_in_executor(_threads, encode)
