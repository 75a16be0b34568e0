"""A budget for the thoughts of a turn: when it is used up, the next token is the one that ends the thought."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from astraea_jax.engine.sampling import Grammar, Matcher


@dataclass(frozen=True)
class ThoughtBudget:
    """A grammar of turns whose thoughts are bounded; it is compiled of nothing, and may stand before another one."""

    tokens: int
    """All thoughts of the turn have so many at most, without those that begin and end them."""
    begin: int
    """The token that begins a thought."""
    end: int
    """The token that ends one."""
    opened: bool
    """Whether the turn begins within a thought."""
    inner: Grammar | None = None
    """What the turn must look like besides."""

    def matcher(self) -> BudgetMatcher:
        """Begin at the start of a turn."""
        return BudgetMatcher(self, self.inner.matcher() if self.inner is not None else None)


class BudgetMatcher:
    """Follows one turn, and counts the tokens of its thoughts.

    Args:
        budget: for them.
        inner: follows the turn through the other grammar.
    """

    def __init__(self, budget: ThoughtBudget, inner: Matcher | None):
        self._budget, self._inner = budget, inner
        self._thinks, self._left = budget.opened, budget.tokens

    @property
    def free(self) -> bool:
        """Whether any token may come next."""
        return not self._used_up and (self._inner is None or self._inner.free)

    @property
    def finished(self) -> bool:
        """Whether nothing may follow."""
        return self._inner is not None and self._inner.finished

    def fill(self, row: np.ndarray) -> None:
        """Write which tokens may come next; one that the other grammar does not allow is never forced on it."""
        words, (word, bit) = row.view(np.uint32), divmod(self._budget.end, 32)
        words[:] = ~np.uint32(0)
        if self._inner is not None and not self._inner.free:
            self._inner.fill(row)
        if self._used_up and words[word] >> np.uint32(bit) & 1:
            words[:] = 0
            words[word] = 1 << bit

    def accept(self, token: int) -> bool:
        """Go on by a token; False: the other grammar does not allow it here."""
        if not self._thinks:
            self._thinks = token == self._budget.begin
        elif token == self._budget.end:
            self._thinks = False
        else:
            self._left -= 1
        return self._inner is None or self._inner.accept(token)

    @property
    def _used_up(self) -> bool:
        return self._thinks and self._left <= 0
