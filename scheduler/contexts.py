"""Contexts of live programs: the KV, in tokens, that they would hold if memory had no end."""

from __future__ import annotations

from collections.abc import Hashable, Set
from math import inf, log2

HALF_LIFE_S = 10.0
"""Seconds in which the context of a program that waits comes to count half as much: a guess, longer than most tools
take."""


class Contexts:
    """Sums of contexts of programs, or of parts of them that several programs share.

    The context of a program that waits fades: it counts ``2 ** -(waited / HALF_LIFE_S)`` times.

    (After ThunderAgent, arXiv 2602.13692.) Every operation is O(1), because all contexts that fade do so at the same
    rate, as one sum.
    """

    def __init__(self) -> None:
        self.active = 0.0
        """Tokens of programs that have a request."""
        self.waiting = 0.0
        """Tokens of programs that wait, all of them."""
        self.now = 0.0
        """The latest time that has been said."""
        self._active: dict[Hashable, float] = {}
        self._waiting: dict[Hashable, tuple[float, float]] = {}  # tokens, and since when
        self._faded = 0.0  # the sum as of now

    def __contains__(self, program: Hashable) -> bool:
        return program in self._active or program in self._waiting

    def __len__(self) -> int:
        return len(self._active) + len(self._waiting)

    @property
    def any_active(self) -> bool:
        """Whether any program has a request."""
        return bool(self._active)

    def works(self, program: Hashable, tokens: float, now: float) -> None:
        """A program has a request whose context is ``tokens``."""
        self.forget(program, now)
        self._active[program] = float(tokens)
        self.active += tokens

    def waits(self, program: Hashable, tokens: float, now: float) -> None:
        """A program begins to wait with a context of ``tokens``."""
        self.forget(program, now)
        self._waiting[program] = float(tokens), self.now
        self.waiting += tokens
        self._faded += tokens

    def forget(self, program: Hashable, now: float | None = None) -> None:
        """Count a program no more."""
        self.fade(self.now if now is None else now)
        self.active -= self._active.pop(program, 0.0)
        tokens, since = self._waiting.pop(program, (0.0, self.now))
        self.waiting -= tokens
        self._faded = max(0.0, self._faded - tokens * self._weight(since))

    def split(self, program: Hashable, part: Hashable, tokens: float) -> None:
        """Let so many of a context's tokens be a context of their own, which is active or fades as they did."""
        if program in self._active:
            self._active[program] -= tokens
            self._active[part] = float(tokens)
        else:
            whole, since = self._waiting[program]
            self._waiting[program], self._waiting[part] = (whole - tokens, since), (float(tokens), since)

    def join(self, program: Hashable, part: Hashable) -> None:
        """Add the tokens of another context, which is active or waits like this one: together they count as before."""
        if program in self._active:
            self._active[program] += self._active.pop(part)
            return
        both = self._waiting.pop(program), self._waiting.pop(part)
        tokens = sum(tokens for tokens, _ in both)
        weight = sum(tokens * self._weight(since) for tokens, since in both) / tokens
        self._waiting[program] = tokens, self.now + HALF_LIFE_S * log2(weight) if weight > 0 else -inf

    def fade(self, now: float) -> None:
        """Bring the sum of what fades up to date; time never runs back."""
        self._faded, self.now = self.faded(now), max(now, self.now)

    def _weight(self, since: float) -> float:
        """How much a token of a program that has waited since then counts."""
        return 2.0 ** -((self.now - since) / HALF_LIFE_S)

    def faded(self, now: float) -> float:
        """Tokens of programs that wait, faded. Any thread may ask; one that does meanwhile is wrong by a step's."""
        return self._faded * 2.0 ** -((now - self.now) / HALF_LIFE_S) if now > self.now else self._faded

    def check(self, active: Set[Hashable]) -> None:
        """Raise AssertionError unless these programs have a request, and the sums add up (for tests; O(everything))."""
        assert self._active.keys() == active, "contexts and programs differ"
        assert abs(self.active - sum(self._active.values())) < 1e-3
        assert abs(self.waiting - sum(tokens for tokens, _ in self._waiting.values())) < 1e-3
