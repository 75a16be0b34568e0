"""Machines of the simulator: what a step and a transfer cost there.

The CPU preset was fitted to the engine's own steps
(`scripts/bench_jct.py --backend=engine` fits anew). The accelerator presets are **computed from data sheets and not
measured**: base reads all weights at 75 % of the memory bandwidth, a new token costs two operations per weight at 50 %
of the peak, a context token its KV at 75 % of the bandwidth; transfers run at 80 % of the host link.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..costs import StepCosts, prefilled_pairs
from ..plan import Plan


@dataclass(frozen=True)
class Machine:
    """A model on a machine, as the simulator sees it."""

    steps: StepCosts
    kv_bytes: float
    """KV of one token over all layers."""
    link_bytes_s: float
    """Between device and host, each way."""
    measured: bool
    """False: computed from hardware constants."""
    lag_s: float = 0.0
    """Seconds from the end of a transfer on the link to the turn of the loop that sees it, beyond what is simulated."""
    window: int | None = None
    """Tokens that a query sees in layers with a window, its own included; None: no layer has one."""
    layers: tuple[int, int] = (1, 0)
    """Layers without a window and with one, or numbers in their proportion."""

    def mean(self, number: Any, in_windows: Any) -> Any:
        """The mean over all layers of a number in those without a window, and of another in those with one."""
        full, windowed = self.layers
        return (number * full + in_windows * windowed) / (full + windowed)

    def attended(self, context: Any, tokens: Any = 1) -> Any:
        """Of the tokens of a context those that its last ``tokens`` attend to, in the mean over all layers."""
        if self.window is None:
            return context
        return self.mean(context, np.minimum(context, self.window + tokens - 1))

    def pairs(self, start: Any, count: Any) -> Any:
        """Pairs of one of ``count`` tokens from ``start`` on and one that it attends to; the mean over layers."""
        whole = count * (start + count / 2)
        if self.window is None:
            return whole
        inside = np.clip(self.window - start, 0, count)  # of these tokens a window hides nothing
        return self.mean(whole, inside * (start + inside / 2) + (count - inside) * self.window)

    def step_s(self, plan: Plan, later: int = 0) -> float:
        """Seconds of a step, or of a ``later`` one if all its rows decode one more token at each."""
        rows = len(plan.requests)
        if self.window is None:
            return self.steps.step_s(rows, plan.tokens, plan.context + later * rows, prefilled_pairs(plan))
        context = float(self.attended(plan.starts + plan.counts + later, plan.counts).sum())
        counts, starts = plan.counts[plan.num_decodes :], plan.starts[plan.num_decodes :]
        pairs = float(self.pairs(starts, counts).sum()) if plan.tokens > rows else 0.0
        return self.steps.step_s(rows, plan.tokens, context, pairs)

    def even_steps(self, plan: Plan) -> int:
        """Steps of rows that decode, each of which takes as much longer than the one before, at most.

        They end where the next token of a row no longer attends to all before it.
        """
        if self.window is None:
            return sys.maxsize
        ends = plan.starts + plan.counts
        inside = ends[ends < self.window]
        return 1 + int(self.window - inside.max()) if len(inside) else sys.maxsize

    def bytes_of(self, tokens: int, in_windows: int) -> float:
        """KV of so many tokens in layers without a window, and of others in those with one."""
        return float(self.mean(tokens, in_windows)) * self.kv_bytes

    def transfer_s(self, tokens: int, in_windows: int = 0) -> float:
        """Seconds in which as much KV is copied between device and host."""
        return 50e-6 + self.bytes_of(tokens, in_windows) / self.link_bytes_s


def computed(
    *, parameters: float, kv_bytes: float, bandwidth: float, peak: float, link: float, chips: float = 1
) -> Machine:
    """Compute a machine from hardware constants.

    Args:
        parameters: weights of the model, two bytes each.
        kv_bytes: KV of one token over all layers.
        bandwidth: bytes per second of one chip's memory.
        peak: operations per second of one chip in bfloat16.
        link: bytes per second between one chip and its host, each way.
        chips: number of chips that share the model.
    """
    steps = StepCosts(
        base_s=1e-3 + 2 * parameters / (0.75 * bandwidth * chips),
        per_prefill_s=0.0,
        per_token_s=2 * parameters / (0.5 * peak * chips),
        per_context_s=kv_bytes / (0.75 * bandwidth * chips),
    )
    return Machine(
        steps=steps,
        kv_bytes=kv_bytes,
        link_bytes_s=0.8 * link * chips,
        measured=False,
    )


H200 = {"bandwidth": 4.8e12, "peak": 989e12, "link": 64e9}
V5E = {"bandwidth": 0.82e12, "peak": 197e12, "link": 16e9}
V6E = {"bandwidth": 1.64e12, "peak": 918e12, "link": 32e9}
LLAMA_1B = {"parameters": 1.24e9, "kv_bytes": 32 * 1024}
LLAMA_8B = {"parameters": 8.03e9, "kv_bytes": 128 * 1024}
LLAMA_70B = {"parameters": 70.6e9, "kv_bytes": 320 * 1024}

MACHINES: dict[str, Machine] = {
    "h200-1b": computed(**LLAMA_1B, **H200),
    "h200-8b": computed(**LLAMA_8B, **H200),
    "h200x4-70b": computed(**LLAMA_70B, **H200, chips=4),
    "v5e-8b": computed(**LLAMA_8B, **V5E, chips=4),
    "v6e-8b": computed(**LLAMA_8B, **V6E),
    "cpu-tiny": Machine(
        steps=StepCosts(base_s=1.1e-3, per_prefill_s=8.6e-3, per_token_s=1.5e-5, per_context_s=1.1e-6),
        kv_bytes=2048.0,
        link_bytes_s=3e9,
        measured=True,
    ),
}
