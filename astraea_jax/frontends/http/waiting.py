"""Bounds on what waits before the engine's own queue."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass

from astraea_jax.engine.shared_bound import SharedBound
from astraea_jax.errors import Overloaded


@dataclass(frozen=True)
class Limits:
    """Bounds on what waits, and how long."""

    choices: int | None = None
    """Turns that have not begun, from before their prompts are made; None: as many as the engine queues and runs."""
    tokens: int | None = None
    """Prompt tokens of all turns that have not begun; None: 64 contexts."""
    wait_s: float = 300.0
    """Seconds until the first token of a turn; beyond that it is given up."""


class Waiting:
    """Counts turns that have not begun, and the tokens of their prompts, by tenant.

    A request is counted before its prompt is made, which may take longer than to serve it: whoever is refused has cost
    nothing. No tenant can fill either bound alone.

    Args:
        choices: turns that may wait.
        tokens: prompt tokens that may wait.
        weights: of tenants' shares.
    """

    def __init__(self, choices: int, tokens: int, weights: Mapping[Hashable, float] | None = None):
        self._choices, self._tokens = SharedBound(choices, weights), SharedBound(tokens, weights)

    @property
    def choices(self) -> int:
        """Turns that have not begun."""
        return self._choices.total

    @property
    def tokens(self) -> int:
        """Prompt tokens of these."""
        return self._tokens.total

    def enter(self, owner: str, choices: int) -> None:
        """Count the turns of a request whose prompt is going to be made.

        Raises:
            Overloaded: too many wait; a request that is alone is always taken.
        """
        if self.choices and not self._choices.has_room(owner, choices):
            raise Overloaded(self._choices.refusal(owner, choices, "requests"))
        self._choices.add(owner, choices)

    def weigh(self, owner: str, tokens: int) -> None:
        """Count the tokens of a request's prompts, now that they are known.

        Raises:
            Overloaded: too many wait; a request that is alone is always taken.
        """
        if self.tokens and not self._tokens.has_room(owner, tokens):
            raise Overloaded(self._tokens.refusal(owner, tokens, "prompt tokens"))
        self._tokens.add(owner, tokens)

    def leave(self, owner: str, choices: int, tokens: int) -> None:
        """Count turns that have begun or ended no longer."""
        self._choices.add(owner, -choices)
        self._tokens.add(owner, -tokens)
