"""Strategies of the residency manager by name: those that are ours, and fixed ones to compare with."""

from __future__ import annotations

from collections.abc import Callable

from .prediction import Predictor
from .program import Program
from .rival_strategies import CacheTTL, Idleness, MinWaste
from .strategy import DISCARD, EVICT_FIRST, KEEP, OFFLOAD, Decision, Strategy


class AlwaysKeep(Strategy):
    """``always-keep``: on the device until somebody needs the pages, then dropped, least recently used first.

    What a prefix cache without a host tier does (vLLM).
    """

    def waits(self, program: Program, slack: float, now: float) -> Decision:
        return Decision(KEEP, "always")


class AlwaysOffload(Strategy):
    """``always-offload``: every program that waits moves to the host at once."""

    ahead = (1.0, 1.0)
    uses_host = True
    evicts_clean = True

    def waits(self, program: Program, slack: float, now: float) -> Decision:
        return Decision(OFFLOAD, "always")


class AlwaysDiscard(Strategy):
    """``always-discard``: every program that waits loses its KV at once and computes it again."""

    def waits(self, program: Program, slack: float, now: float) -> Decision:
        return Decision(DISCARD, "always")


class Adaptive(Strategy):
    """``adaptive``: keep KV while there is room; under pressure decide by cost.

    Without pressure nothing ever moves. With less than ``ahead`` of the pool free or clean, the KV that is idle longest
    is offloaded *and stays on the device*: its pages can then be had at once, and a program that returns before anybody
    needed them has lost nothing. A program whose tool usually takes ``LONG`` times the way to the host and back is
    evicted first. KV is dropped instead where computing it again wastes less memory than restoring it: restoring idles
    the program's own pages, computing again delays everybody who runs (InferCept's waste).
    """

    ahead = (0.30, 0.35)
    """A guess: early enough to copy while steps go on, late enough to do nothing without pressure."""
    uses_host = True
    LONG = 20.0
    """A guess: the decision matters little, since pages are evicted only when they are needed."""

    def waits(self, program: Program, slack: float, now: float) -> Decision:
        if slack > self.ahead[1]:
            return Decision(KEEP, "no pressure")
        if not self.predict.knows_wait(program):
            return Decision(KEEP, "nothing is known of its tool")
        way_s = 2 * self.predict.transfers.seconds(len(program.pages))
        if self.predict.returns_in(program, now - program.wait_began) > self.LONG * way_s:
            return Decision(EVICT_FIRST, "its tool takes long")
        return Decision(KEEP, "it returns soon")

    def offloads(self, program: Program) -> bool:
        back_s = self.predict.transfers.seconds(len(program.pages))
        again_s = self.predict.steps.again_s(program.kept)
        return back_s * program.kept < again_s * (program.kept + self.running_tokens)


STRATEGIES: dict[str, Callable[[Predictor], Strategy]] = {
    "adaptive": Adaptive,
    "always-keep": AlwaysKeep,
    "always-offload": AlwaysOffload,
    "always-discard": AlwaysDiscard,
    "infercept": MinWaste,
    "cachettl": CacheTTL,
    "mori": Idleness,
}
"""Strategies by name."""


def make_strategy(name: str, predictor: Predictor) -> Strategy:
    """Make the strategy of that name.

    Raises:
        ValueError: there is none; the message lists them.
    """
    if name not in STRATEGIES:
        raise ValueError(f"no residency strategy is called {name!r}; there are {', '.join(STRATEGIES)}")
    return STRATEGIES[name](predictor)
