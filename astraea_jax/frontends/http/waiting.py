"""Bounds on what waits before the engine's own queue."""

from __future__ import annotations

from dataclasses import dataclass

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
    """Counts turns that have not begun, and the tokens of their prompts.

    A request is counted before its prompt is made, which may take longer than to serve it: whoever is refused has cost
    nothing.

    Args:
        choices: turns that may wait.
        tokens: prompt tokens that may wait.
    """

    def __init__(self, choices: int, tokens: int):
        self._most_choices, self._most_tokens = choices, tokens
        self.choices = 0
        self.tokens = 0

    def enter(self, choices: int) -> None:
        """Count the turns of a request whose prompt is going to be made.

        Raises:
            Overloaded: too many wait; a request that is alone is always taken.
        """
        if self.choices and self.choices + choices > self._most_choices:
            raise Overloaded("too many requests are waiting; try again later")
        self.choices += choices

    def weigh(self, tokens: int) -> None:
        """Count the tokens of a request's prompts, now that they are known.

        Raises:
            Overloaded: too many wait; a request that is alone is always taken.
        """
        if self.tokens and self.tokens + tokens > self._most_tokens:
            raise Overloaded("too many prompt tokens are waiting; try again later")
        self.tokens += tokens

    def leave(self, choices: int, tokens: int) -> None:
        """Count turns that have begun or ended no longer."""
        self.choices -= choices
        self.tokens -= tokens
