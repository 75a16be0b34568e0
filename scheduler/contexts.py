"""Contexts of live programs: the KV, in tokens, that they would hold if memory had no end."""

from __future__ import annotations

from .program import Program

HALF_LIFE_S = 10.0
"""Seconds in which the context of a program that waits comes to count half as much: a guess, longer than most tools
take."""


class Contexts:
    """Sums of contexts. That of a program that waits fades: it counts ``2 ** -(waited / HALF_LIFE_S)`` times.

    (After ThunderAgent, arXiv 2602.13692.) Every operation is O(1), because all contexts that fade do so at the same
    rate, as one sum.
    """

    def __init__(self) -> None:
        self.active = 0.0
        """Tokens of programs that have a request."""
        self.waiting = 0.0
        """Tokens of programs that wait, all of them."""
        self._active: dict[Program, float] = {}
        self._waiting: dict[Program, tuple[float, float]] = {}  # tokens, and since when
        self._faded, self._at = 0.0, 0.0  # the sum as of that time

    def __contains__(self, program: Program) -> bool:
        return program in self._active or program in self._waiting

    def __len__(self) -> int:
        return len(self._active) + len(self._waiting)

    @property
    def any_active(self) -> bool:
        """Whether any program has a request."""
        return bool(self._active)

    def works(self, program: Program, tokens: float, now: float) -> None:
        """A program has a request whose context is ``tokens``."""
        self.forget(program, now)
        self._active[program] = float(tokens)
        self.active += tokens

    def waits(self, program: Program, tokens: float, now: float) -> None:
        """A program begins to wait with a context of ``tokens``."""
        self.forget(program, now)
        self._waiting[program] = float(tokens), self._at
        self.waiting += tokens
        self._faded += tokens

    def forget(self, program: Program, now: float | None = None) -> None:
        """Count a program no more."""
        self.fade(self._at if now is None else now)
        self.active -= self._active.pop(program, 0.0)
        tokens, since = self._waiting.pop(program, (0.0, self._at))
        self.waiting -= tokens
        self._faded = max(0.0, self._faded - tokens * 2.0 ** -((self._at - since) / HALF_LIFE_S))

    def fade(self, now: float) -> None:
        """Bring the sum of what fades up to date; time never runs back."""
        self._faded, self._at = self.faded(now), max(now, self._at)

    def faded(self, now: float) -> float:
        """Tokens of programs that wait, faded. Any thread may ask; one that does meanwhile is wrong by a step's."""
        return self._faded * 2.0 ** -((now - self._at) / HALF_LIFE_S) if now > self._at else self._faded

    def check(self, active: set[Program]) -> None:
        """Raise AssertionError unless these programs have a request, and the sums add up (for tests; O(everything))."""
        assert self._active.keys() == active, "contexts and programs differ"
        assert abs(self.active - sum(self._active.values())) < 1e-3
        assert abs(self.waiting - sum(tokens for tokens, _ in self._waiting.values())) < 1e-3
