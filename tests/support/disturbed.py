"""Programs whose every token is checked, whatever happens to their KV."""

from __future__ import annotations

import asyncio
import random

from astraea_jax.engine.engine import Engine
from astraea_jax.engine.sampling import SamplingParams
from astraea_jax.scheduler.wait import Wait

SYSTEM = list(range(40, 57))
"""A beginning that all programs share: four pages and a token."""


def params(n: int) -> SamplingParams:
    return SamplingParams(max_tokens=n, ignore_eos=True)


async def tokens(generation) -> list[int]:
    return [t async for delta in generation for t in delta.token_ids]


async def program(engine: Engine, greedy, number: int, rng: random.Random, *, cancels: float = 0.0) -> int:
    """Three requests with tool waits between them, all checked; returns the tokens that need not be computed."""
    text, cached = [*SYSTEM, *(rng.randrange(256) for _ in range(rng.randint(1, 12)))], 0
    for turn in range(3):
        n = rng.randint(1, 10)
        generation = engine.generate(text, params(n), session=f"p{number}", final=turn == 2, salt=str(number % 2))
        if rng.random() < cancels:
            await asyncio.sleep(rng.random() * 0.02)
            generation.cancel()
            output = await tokens(generation)
            assert output == greedy(text, len(output), output)
            engine.end_session(f"p{number}")
            return cached
        output = await tokens(generation)
        assert output == greedy(text, n, output)
        cached += generation.usage.cached_tokens
        engine.waits(f"p{number}", Wait((rng.choice(["fast", "slow"]),)))
        await asyncio.sleep(rng.random() * 0.03)
        text = [*text, *output, *(rng.randrange(256) for _ in range(rng.randint(1, 6)))]
        if rng.random() < 0.2:  # earlier text is replaced, as by a compaction
            text[rng.randrange(len(text))] ^= 1
    return cached
