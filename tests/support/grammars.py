"""Grammars made by hand: small enough that a test knows what they allow."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


def mask_of(tokens, row: np.ndarray) -> None:
    """Write a mask that allows those of ``tokens`` that are in the vocabulary."""
    allowed = np.zeros(32 * len(row), np.uint8)
    allowed[[token for token in tokens if token < len(allowed)]] = 1
    row[:] = np.packbits(allowed, bitorder="little").view(np.int32)


class Following:
    """A matcher that asks a function of the tokens so far which may come next."""

    free = False

    def __init__(self, allowed: Callable[[tuple[int, ...]], frozenset[int]], ends: frozenset[tuple[int, ...]]):
        self._allowed, self._ends = allowed, ends
        self._tokens: tuple[int, ...] = ()

    @property
    def finished(self) -> bool:
        return self._tokens in self._ends

    def fill(self, row: np.ndarray) -> None:
        mask_of(self._allowed(self._tokens), row)

    def accept(self, token: int) -> bool:
        fits = token in self._allowed(self._tokens)
        self._tokens = (*self._tokens, token)
        return fits


@dataclass(frozen=True)
class Only:
    """Any text of these tokens."""

    tokens: frozenset[int]

    def matcher(self) -> Following:
        return Following(lambda _: self.tokens, frozenset())


EVEN = Only(frozenset(range(0, 256, 2)))


@dataclass(frozen=True)
class Spelled:
    """One text."""

    text: tuple[int, ...]

    def matcher(self) -> Following:
        return Following(lambda before: frozenset(self.text[len(before) : len(before) + 1]), frozenset({self.text}))


@dataclass(frozen=True)
class Broken:
    """A grammar that does not work: ``call`` fails, or contradicts the others."""

    call: str
    after: int = 2
    """Tokens that go well."""

    def matcher(self) -> Following:
        if self.call == "matcher":
            raise ZeroDivisionError
        return _BrokenMatcher(self)


class _BrokenMatcher(Following):
    def __init__(self, how: Broken):
        super().__init__(lambda _: EVEN.tokens, frozenset())
        self._how = how

    @property
    def _now(self) -> bool:
        return len(self._tokens) >= self._how.after

    @property
    def finished(self) -> bool:
        if self._how.call == "finished" and self._now:
            raise ZeroDivisionError
        return False

    def fill(self, row: np.ndarray) -> None:
        if self._how.call == "fill" and self._now:
            raise ZeroDivisionError
        super().fill(row)
        if self._how.call == "nothing" and self._now:
            row[:] = 0

    def accept(self, token: int) -> bool:
        fits = super().accept(token)
        if self._how.call == "accept" and self._now:
            raise ZeroDivisionError
        return fits and not (self._how.call == "refuses" and self._now)


BROKEN = ("matcher", "fill", "nothing", "accept", "refuses", "finished")
