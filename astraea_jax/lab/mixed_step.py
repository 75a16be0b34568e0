"""Measures a step that computes a prompt while other rows decode, beside the two alone."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from astraea_jax.engine.engine import Engine
from astraea_jax.engine.sampling import SamplingParams
from astraea_jax.lab.record import Section

WINDOW = 8
"""Steps that are timed together; one of them may compute a prompt."""


@dataclass(frozen=True)
class MixedStep:
    """Milliseconds of a step."""

    rows: int
    """Rows that decode."""
    tokens: int
    """Tokens of the prompt."""
    decode_ms: float
    prompt_ms: float
    mixed_ms: float
    """Of a step that does both."""

    def section(self) -> Section:
        """A table of these."""
        share = self.mixed_ms / (self.decode_ms + self.prompt_ms)
        rows = [
            (f"{self.rows} rows that decode", f"{self.decode_ms:.2f} ms", ""),
            (f"a prompt of {self.tokens}", f"{self.prompt_ms:.2f} ms", ""),
            ("both in one step", f"{self.mixed_ms:.2f} ms", f"{share:.2f} of their sum"),
        ]
        return Section("a step with a prompt", ("", "measured", ""), rows)


def measure(engine: Engine, prompts: Sequence[list[int]], tokens: int, rounds: int) -> MixedStep:
    """Measure while programs with ``prompts`` decode; another's prompt of so many tokens is computed in one step.

    Windows of steps with such a prompt and without take turns, after as many of the prompt alone; medians count.
    """
    return asyncio.run(_measure(engine, prompts, tokens, rounds))


async def _measure(engine: Engine, prompts: Sequence[list[int]], tokens: int, rounds: int) -> MixedStep:
    vocab = engine.model_config.vocab_size

    async def prefill(salt: int) -> float:
        ids = [(7 * i + salt) % vocab for i in range(tokens)]
        began = time.perf_counter()
        await engine.generate(ids, SamplingParams(max_tokens=1, ignore_eos=True)).text()
        return time.perf_counter() - began

    alone = [await prefill(1000 + i) for i in range(rounds)]
    params = SamplingParams(max_tokens=2 * WINDOW * rounds + 64, ignore_eos=True)
    running = [aiter(engine.generate(prompt, params)) for prompt in prompts]
    for generation in running:
        await anext(generation)
    plain, mixed = [], []
    for i in range(rounds):
        plain.append(await _passed(engine))
        beside = asyncio.create_task(prefill(2000 + i))
        mixed.append(await _passed(engine))
        await beside
    for generation in running:
        generation.cancel()
    decode = float(np.median(plain)) / WINDOW
    both = float(np.median(mixed)) - (WINDOW - 1) * decode
    return MixedStep(len(prompts), tokens, 1e3 * decode, 1e3 * float(np.median(alone)), 1e3 * both)


async def _passed(engine: Engine) -> float:
    """Seconds until :data:`WINDOW` more steps have ended."""
    before, began = engine.times.steps, time.perf_counter()
    while engine.times.steps - before < WINDOW:
        await asyncio.sleep(0.0002)
    return time.perf_counter() - began
