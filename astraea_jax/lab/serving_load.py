"""Loads of random tokens: prompts that come all at once or as they arrive, and what became of them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from astraea_jax.engine.engine import Engine
from astraea_jax.engine.sampling import SamplingParams


@dataclass(frozen=True)
class Load:
    """Prompts, and the number of tokens to generate for each."""

    prompts: Sequence[list[int]]
    outputs: Sequence[int]

    @classmethod
    def draw(cls, count: int, tokens_in: int, tokens_out: int, spread: float, vocab: int, seed: int) -> Load:
        """Draw ``count`` prompts of about ``tokens_in`` random tokens; those of different seeds share no prefix."""
        rng = np.random.default_rng(seed)

        def lengths(mean: int) -> list[int]:
            return rng.integers(round(mean * (1 - spread)), round(mean * (1 + spread)) + 1, count).clip(1).tolist()

        prompts = [rng.integers(0, vocab, n).tolist() for n in lengths(tokens_in)]
        return cls(prompts, [max(2, n) for n in lengths(tokens_out)])

    def first(self, count: int) -> Load:
        """Return the first ``count`` prompts as a load."""
        return Load(self.prompts[:count], self.outputs[:count])

    def decode_steps(self, max_seqs: int) -> int:
        """Count the fewest steps that can decode it. The first token of each output comes from its prefill."""
        return max(-(-sum(n - 1 for n in self.outputs) // max_seqs), max(self.outputs) - 1)

    def read_tokens(self) -> int:
        """Sum of the contexts of all decoded tokens."""
        return sum(
            (n - 1) * (len(prompt) + 1) + (n - 1) * (n - 2) // 2 for prompt, n in zip(self.prompts, self.outputs)
        )


@dataclass(frozen=True)
class Served:
    """One request as its caller saw it. Times in seconds of ``time.perf_counter``."""

    arrived: float
    """Time at which it was to be submitted."""
    tokens: list[float]
    """Time of each token."""
    prompt_tokens: int
    cached_tokens: int
    preemptions: int

    @property
    def ttft(self) -> float:
        """Time to the first token."""
        return self.tokens[0] - self.arrived

    @property
    def e2e(self) -> float:
        """Time to the last token."""
        return self.tokens[-1] - self.arrived

    @property
    def tpot(self) -> float:
        """Mean time of a token after the first."""
        return (self.tokens[-1] - self.tokens[0]) / max(1, len(self.tokens) - 1)


@dataclass(frozen=True)
class Offline:
    """Result of a load whose prompts are all submitted at once. Tokens are counted by the engine."""

    seconds: float
    input_tokens: int
    cached_tokens: int
    output_tokens: int
    preemptions: int
    steps: int


@dataclass(frozen=True)
class Latencies:
    """Percentiles, in seconds."""

    p50: float
    p90: float
    p99: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Latencies:
        """Take percentiles of ``values``."""
        return cls(*(float(x) for x in np.percentile(values, (50, 90, 99))))

    def text(self, factor: float, digits: int) -> str:
        """Show the percentiles times ``factor``."""
        return " / ".join(f"{factor * x:.{digits}f}" for x in (self.p50, self.p90, self.p99))


@dataclass(frozen=True)
class Slo:
    """Service-level objectives of a request, in seconds."""

    ttft: float
    tpot: float

    def met(self, request: Served) -> bool:
        """Whether a request was as fast as that."""
        return request.ttft <= self.ttft and request.tpot <= self.tpot


@dataclass(frozen=True)
class Online:
    """Result of a load whose prompts arrive one by one."""

    rate: float
    """Requested arrivals per second."""
    requests: int
    output_tokens: int
    requests_s: float
    """Requests that ended per second, from the first arrival to the last token."""
    ttft: Latencies
    """From arrival to the first token."""
    tpot: Latencies
    """Mean time per token after the first, of each request."""
    itl: Latencies
    """Times between tokens, of all requests together."""
    e2e: Latencies
    """From arrival to the last token."""
    good: float
    """Share of requests that met the objectives."""
    good_s: float
    """Requests per second that met the objectives."""


def offline(engine: Engine, load: Load) -> Offline:
    """Serve all prompts at once."""
    steps, began = engine.times.steps, time.perf_counter()
    served = asyncio.run(_all(engine, load, np.zeros(len(load.prompts))))
    return Offline(
        seconds=max(r.tokens[-1] for r in served) - began,
        input_tokens=sum(r.prompt_tokens for r in served),
        cached_tokens=sum(r.cached_tokens for r in served),
        output_tokens=sum(len(r.tokens) for r in served),
        preemptions=sum(r.preemptions for r in served),
        steps=engine.times.steps - steps,
    )


def online(engine: Engine, load: Load, rate: float, slo: Slo, seed: int) -> Online:
    """Arrivals with exponential gaps, ``rate`` per second on average; each is submitted when it arrives."""
    at = np.cumsum(np.random.default_rng(seed).exponential(1 / rate, len(load.prompts)))
    served = asyncio.run(_all(engine, load, at - at[0]))
    took = max(r.tokens[-1] for r in served) - min(r.arrived for r in served)
    good = sum(slo.met(r) for r in served)
    return Online(
        rate=rate,
        requests=len(served),
        output_tokens=sum(len(r.tokens) for r in served),
        requests_s=len(served) / took,
        ttft=Latencies.of([r.ttft for r in served]),
        tpot=Latencies.of([r.tpot for r in served]),
        itl=Latencies.of(np.concatenate([np.diff(r.tokens) for r in served]).tolist()),
        e2e=Latencies.of([r.e2e for r in served]),
        good=good / len(served),
        good_s=good / took,
    )


async def _all(engine: Engine, load: Load, at: np.ndarray) -> list[Served]:
    """Submit every prompt, ``at [n]`` seconds from now, and wait for all."""
    zero = time.perf_counter()

    async def one(prompt: list[int], output: int, at: float) -> Served:
        if at > 0:
            await asyncio.sleep(zero + at - time.perf_counter())
        tokens: list[float] = []
        generation = engine.generate(prompt, SamplingParams(max_tokens=output, ignore_eos=True))
        async for delta in generation:
            tokens += [time.perf_counter()] * len(delta.token_ids)
        usage = generation.usage
        assert usage is not None
        if usage.output_tokens != len(tokens):
            raise RuntimeError(f"{len(tokens)} tokens came, the engine counted {usage.output_tokens}")
        return Served(zero + at, tokens, usage.prompt_tokens, usage.cached_tokens, usage.preemptions)

    return list(await asyncio.gather(*(one(*request) for request in zip(load.prompts, load.outputs, at.tolist()))))
