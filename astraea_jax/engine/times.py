"""The work of a serving loop and its times: numbers that the loop adds up and anybody reads."""

from __future__ import annotations

from dataclasses import dataclass, field

from astraea_jax.scheduler.histogram import Histogram

STEP_S = (1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
"""Bounds of what happens once per step."""
TOKEN_S = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0)
"""vLLM's bounds of the time between two tokens."""
STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
"""vLLM's bounds of the tokens of a step."""


@dataclass
class StepTimes:
    """Time that the loop has spent, by activity, in seconds, summed over ``steps``."""

    steps: int = 0
    tokens: int = 0
    """Tokens computed by the model, prefill included."""
    plan_s: float = 0.0
    dispatch_s: float = 0.0
    wait_s: float = 0.0
    """Time spent waiting for the device."""
    commit_s: float = 0.0
    resample_s: float = 0.0
    """Time spent on rows that need more than plain sampling."""
    cpu_s: float = 0.0
    """CPU time of the loop's thread; less than the times above where the device computes on the same cores."""
    starved: int = 0
    """Steps dispatched after the previous one had ended, so that the device waited for the host."""


@dataclass
class Work:
    """Counts of a loop's work, for metrics: a few additions per step, however many rows it has."""

    prompt_tokens: int = 0
    """Of the requests that have got a slot."""
    cached_tokens: int = 0
    """Of those, the ones whose KV was still there."""
    output_tokens: int = 0
    plan_s: Histogram = field(default_factory=lambda: Histogram(STEP_S))
    step_s: Histogram = field(default_factory=lambda: Histogram(STEP_S))
    """From the dispatch of a step, or the end of the one before it, to the arrival of its tokens."""
    token_s: Histogram = field(default_factory=lambda: Histogram(TOKEN_S))
    """Times of steps, each counted once for every token that came from it."""
    step_tokens: Histogram = field(default_factory=lambda: Histogram(STEP_TOKENS))

    def planned(self, tokens: int, plan_s: float) -> None:
        """Count a step that is planned."""
        self.plan_s.add(plan_s)
        self.step_tokens.add(tokens)

    def committed(self, outputs: int, step_s: float) -> None:
        """Count a step whose tokens have arrived."""
        self.output_tokens += outputs
        self.step_s.add(step_s)
        if outputs:
            self.token_s.add(step_s, outputs)
