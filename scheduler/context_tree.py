"""Contexts of live programs as a tree, in which what several of them begin with is there once.

Two programs share a full page of tokens, and all before it, if its block hash is the same, wherever the KV of it lies
and whoever has computed it. So the sum over the tree is the KV of all programs, as if memory had no end; a beginning
counts as long as one program has it, and fades when none of them has a request. Programs without hashes share with
nobody.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence

from .contexts import Contexts
from .program import Program


class _Run:
    """Blocks that follow each other, all of the same programs; a root has none."""

    __slots__ = ("above", "active", "below", "hashes", "holders", "start")

    def __init__(self, hashes: Sequence[bytes], start: int, above: _Run | None):
        self.hashes, self.start = hashes, start
        """Its own, from block ``start`` on: a context that has ended must not stay for those of its beginning."""
        self.above = above
        self.below: dict[bytes, _Run] = {}
        """Runs that follow it, by their first block."""
        self.holders = self.active = 0
        """Programs whose contexts have it, and those of them that have a request."""

    @property
    def end(self) -> int:
        return self.start + len(self.hashes)

    def common(self, hashes: Sequence[bytes], end: int) -> int:
        """Count the blocks that a context has in common with it and the runs above, whose first block it has."""
        own, start, end = self.hashes, self.start, min(self.end, end)
        if own[end - 1 - start] == hashes[end - 1]:  # a hash names all before it
            return end
        return start + bisect_left(range(start, end), True, key=lambda i: own[i - start] != hashes[i])


class ContextTree:
    """Follows the contexts of programs. An event costs O(runs of the context), which are at most twice the programs.

    Runs that part or join are copied, which for a million tokens is a fraction of a millisecond.

    Args:
        page_size: tokens of a block.
    """

    def __init__(self, page_size: int):
        self.sums = Contexts()
        """Of runs, and of what each program has after its last run."""
        self._size = page_size
        self._root = _Run((), 0, None)
        self._last: dict[Program, tuple[_Run, bool]] = {}  # the last run of each context; whether it has a request

    def __len__(self) -> int:
        """Programs."""
        return len(self._last)

    def works(self, program: Program, hashes: Sequence[bytes], tokens: int, now: float) -> None:
        """A program has a request whose context is ``tokens``, of which the full pages have these hashes."""
        own = self._put(program, hashes, tokens, True, now)
        self.sums.works(program, own, now)

    def waits(self, program: Program, hashes: Sequence[bytes], tokens: int, now: float) -> None:
        """A program begins to wait with such a context."""
        own = self._put(program, hashes, tokens, False, now)
        self.sums.waits(program, own, now)

    def forget(self, program: Program, now: float | None = None) -> None:
        """Count a program no more."""
        last = self._last.pop(program, None)
        if last is not None:
            self._leave(*last, self.sums.now if now is None else now)
            self.sums.forget(program, now)

    def _put(self, program: Program, hashes: Sequence[bytes], tokens: int, active: bool, now: float) -> int:
        """Note a context; returns how many of its tokens are in no run: the last one is always computed."""
        blocks = min(len(hashes), max(0, tokens - 1) // self._size)
        before, last = self._last.get(program), self._find(hashes, blocks)
        for run in self._upwards(last):
            run.holders += 1
            run.active += active
            if not run.active:
                self.sums.waits(run, self._tokens(run), now)
            elif active and run.active == 1:
                self.sums.works(run, self._tokens(run), now)
        self._last[program] = last, active
        if before is not None:  # only now, so that nothing is gone that stays
            self._leave(*before, now)
        return tokens - blocks * self._size

    def _leave(self, last: _Run, active: bool, now: float) -> None:
        """A program has no longer what ends with a run."""
        for run in self._upwards(last):
            run.holders -= 1
            run.active -= active
            if not run.holders:
                self.sums.forget(run, now)
                assert run.above is not None
                del run.above.below[run.hashes[0]]
                continue
            if active and not run.active:
                self.sums.waits(run, self._tokens(run), now)
            below = next(iter(run.below.values()), None)
            if below is not None and below.holders == run.holders:  # nobody parts from the others here
                self._join(run, below)

    def _find(self, hashes: Sequence[bytes], blocks: int) -> _Run:
        """The run that ends with the last of these blocks; it is made if there is none."""
        run, at = self._root, 0
        while at < blocks:
            below = run.below.get(hashes[at])
            if below is None:
                below = run.below[hashes[at]] = _Run(hashes[at:blocks], at, run)
            at = below.common(hashes, blocks)
            run = below if at == below.end else self._split(below, at)
        return run

    def _split(self, run: _Run, at: int) -> _Run:
        """Let the first blocks of a run be a run of their own."""
        assert run.above is not None
        count = at - run.start
        first, rest = _Run(run.hashes[:count], run.start, run.above), run.hashes[count:]
        first.holders, first.active, first.below = run.holders, run.active, {rest[0]: run}
        run.above.below[first.hashes[0]] = first
        run.hashes, run.start, run.above = rest, at, first
        self.sums.split(run, first, self._tokens(first))
        return first

    def _join(self, run: _Run, below: _Run) -> None:
        """Let a run, and the only one that follows it, be one."""
        assert run.above is not None
        below.hashes, below.start, below.above = [*run.hashes, *below.hashes], run.start, run.above
        run.above.below[below.hashes[0]] = below
        self.sums.join(below, run)

    def _tokens(self, run: _Run) -> int:
        return len(run.hashes) * self._size

    @staticmethod
    def _upwards(run: _Run) -> Iterator[_Run]:
        """Go through a run and those above it, whatever becomes of each of them."""
        while run.above is not None:
            yield run
            run = run.above

    def check(self, active: set[Program]) -> None:
        """Raise AssertionError unless these programs have a request, and all adds up (for tests; O(everything))."""
        assert {program for program, (_, works) in self._last.items() if works} == active, (
            "contexts and programs differ"
        )
        holders: dict[_Run, list[bool]] = {}
        for last, works in self._last.values():
            for run in self._upwards(last):
                holders.setdefault(run, []).append(works)
        assert all((run.holders, run.active) == (len(of), sum(of)) for run, of in holders.items())
        assert all(run.start == run.above.end for run in holders if run.above), "blocks that nobody has are kept"
        assert len(holders) <= 2 * len(self._last), "runs were to be one"
        self.sums.check({*active, *(run for run, of in holders.items() if any(of))})
        assert len(self.sums) == len(self._last) + len(holders), "runs of nobody count"
