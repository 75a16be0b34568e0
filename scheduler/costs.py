"""Costs of steps and transfers, and how they are learned from those that have run."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .plan import Plan


@dataclass(frozen=True)
class StepCosts:
    """Seconds of a step, linear in what it computes: learned here, or computed for a machine that is not here."""

    base_s: float
    per_prefill_s: float
    """More if any row prefills: other compiled shapes, padded."""
    per_token_s: float
    """For each new token."""
    per_context_s: float
    """For each token attended to."""
    per_pair_s: float = 0.0
    """For each pair of a token that is prefilled and one that it attends to."""

    def step_s(self, rows: int, tokens: int, context: float, pairs: float = 0.0) -> float:
        """Seconds of a step.

        Args:
            rows: that it has.
            tokens: that it computes.
            context: tokens that it attends to.
            pairs: of tokens that it prefills and those that they attend to; see :func:`prefilled_pairs`.
        """
        prefill = self.per_prefill_s if tokens > rows else 0.0
        linear = self.per_token_s * tokens + self.per_context_s * context
        return self.base_s + prefill + linear + self.per_pair_s * pairs

    def batching_saves(self, context: float) -> float:
        """Share of a decode step over ``context`` tokens that takes as long whatever is in it, from 0 to 1.

        Only that share of the time is saved by rows that run together: near 0 they take as long as one by one.
        """
        return self.base_s / max(self.base_s + self.per_context_s * context, 1e-12)

    def prefill_in_context(self, tokens: float, context: float) -> float:
        """Tokens of context that take as long, while ``tokens`` are decoded, as a prefill however short it is.

        A step over ``context`` tokens is shared by them in equal parts.
        """
        return self.per_prefill_s / max(tokens * (self.base_s / context + self.per_context_s), 1e-12)

    def prefill_s(self, tokens: int, before: int = 0) -> float:
        """Seconds of step time that prefilling ``tokens`` adds, with ``before`` in front of them that are there."""
        return self.per_prefill_s + self.per_token_s * tokens + self.per_pair_s * tokens * (before + tokens / 2)


def prefilled_pairs(plan: Plan) -> float:
    """Pairs of a token that a step prefills and one that it attends to."""
    if plan.tokens == len(plan.requests):
        return 0.0
    counts = plan.counts[plan.num_decodes :].astype(np.float64)
    return float(counts @ (plan.starts[plan.num_decodes :] + counts / 2))


class StepFit:
    """Learns step costs online: least squares over a sliding exponential window, solved again every few steps."""

    EVERY = 64
    SCALE = np.array([1.0, 1.0, 1e-2, 1e-5, 1e-6])
    """Brings steps' columns (one, prefills, tokens, context, pairs) to one size."""

    def __init__(self) -> None:
        self.forget = 0.998
        """Weight of a step against the one after it; 1: all count alike."""
        self.costs = StepCosts(base_s=5e-3, per_prefill_s=0.0, per_token_s=5e-5, per_context_s=5e-8)
        """The latest fit; at first a guess of the size that small models have."""
        self.mean_step_s = self.costs.base_s
        """Mean over the last 50 steps or so: how long one decoded token takes at the present load."""
        self.largest_step = 512
        """Tokens of the largest step so far; at first a guess."""
        self._steps = 0
        self._recent: list[tuple[float, ...]] = []  # steps that are not in the sums yet
        self._gram = np.zeros((5, 5))
        self._right = np.zeros(5)

    def observe(self, plan: Plan, seconds: float) -> None:
        """Learn how long a step took."""
        prefills = plan.tokens > len(plan.requests)
        self._recent.append((1.0, prefills, plan.tokens, plan.context, prefilled_pairs(plan), seconds))
        self.largest_step = max(self.largest_step if self._steps else 1, plan.tokens)
        self._steps += 1
        self.mean_step_s += (seconds - self.mean_step_s) / min(self._steps, 50)
        if len(self._recent) == self.EVERY:
            self._fit()

    def decode_s(self, tokens: float) -> float:
        """Seconds until ``tokens`` more tokens are decoded, at the present load."""
        return self.mean_step_s * tokens

    def again_s(self, tokens: int) -> float:
        """Seconds of step time that it adds to prefill ``tokens`` more, in a request that prefills something anyway."""
        costs = self.costs
        return costs.prefill_s(tokens) + costs.per_prefill_s * (tokens / self.largest_step - 1)

    def _fit(self) -> None:
        steps = np.array(self._recent)
        self._recent.clear()
        rows, weights = self.SCALE * steps[:, :-1], self.forget ** np.arange(self.EVERY - 1, -1, -1)
        self._gram = self.forget**self.EVERY * self._gram + (weights * rows.T) @ rows
        self._right = self.forget**self.EVERY * self._right + (weights * steps[:, -1]) @ rows
        ridge = 1e-6 * np.trace(self._gram) * np.eye(5)
        kept = np.ones(5, bool)
        while True:
            fitted = np.zeros(5)
            fitted[kept] = np.linalg.solve((self._gram + ridge)[np.ix_(kept, kept)], self._right[kept])
            if (fitted >= 0.0).all():
                break
            kept[fitted.argmin()] = False  # no cost is below 0: the others are found again without the lowest
        self.costs = StepCosts(*(fitted * self.SCALE).tolist())


class TransferFit:
    """Learns what transfers between device and host cost.

    ``latency_s`` and ``per_page_s`` are fitted by least squares over the transfers as they end, in a sliding
    exponential window.
    """

    def __init__(self) -> None:
        self.forget = 0.98
        """Weight of a transfer against the one after it: a guess, about the last fifty count; 1: all count alike."""
        self.latency_s, self.per_page_s = 0.0, 1e-4
        self._sums = [0.0] * 5

    def observe(self, pages: int, seconds: float) -> None:
        """Learn how long a transfer took, waiting for others and for the loop to notice included."""
        new = (1.0, pages, seconds, pages * pages, pages * seconds)
        self._sums = [self.forget * old + more for old, more in zip(self._sums, new, strict=True)]
        n, x, y, xx, xy = self._sums
        spread = n * xx - x * x
        slope = (n * xy - x * y) / spread if spread > 1e-6 * xx else y / x
        self.per_page_s = min(max(slope, 0.0), y / x)
        self.latency_s = (y - self.per_page_s * x) / n

    def seconds(self, pages: int) -> float:
        """Seconds of a transfer of ``pages`` pages."""
        return self.latency_s + self.per_page_s * pages
