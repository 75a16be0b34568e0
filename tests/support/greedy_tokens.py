"""Print the tokens that `astraea-tiny` writes here, in float32, for prompts of several lengths: a line of JSON.

JAX_PLATFORMS=cpu python tests/support/greedy_tokens.py
"""

from __future__ import annotations

import asyncio
import json
import sys

from astraea_jax.engine.config import EngineConfig
from astraea_jax.engine.engine import Engine
from astraea_jax.engine.sampling import SamplingParams

TEXT = "What is the status of order 1042, and when will it arrive? "
TIMES = (1, 2, 5, 9)
"""How often each prompt repeats the text."""


async def generate(engine: Engine, prompts: list[list[int]]) -> list[list[int]]:
    """24 greedy tokens for each, all at once."""
    params = SamplingParams(max_tokens=24, ignore_eos=True)
    streams = [engine.generate(prompt, params) for prompt in prompts]
    return [[token async for delta in stream for token in delta.token_ids] for stream in streams]


def greedy_tokens(attention: str | None) -> list[list[int]]:
    """What an engine with this attention backend writes, or with its default if None."""
    engine = Engine.from_folder("astraea-tiny", EngineConfig(dtype="float32", attention=attention, kv_bytes=2**24))
    engine.start()
    try:
        return asyncio.run(generate(engine, [engine.tokenizer.encode(TEXT * n) for n in TIMES]))
    finally:
        engine.shutdown(0)


if __name__ == "__main__":
    sys.stdout.write(json.dumps(greedy_tokens(None)) + "\n")
