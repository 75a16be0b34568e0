"""What the next step computes.

There is no prefill phase and no decode phase (after vLLM v1): a segment has ``computed`` tokens chasing ``length``
tokens. Prefill in chunks, decode, the return from a tool and recomputation after preemption are this one case.

Steps overlap. A plan is made and dispatched before the tokens of the plan before it are known: the segments in it have
a ``pending`` token that only the device knows, and the plan schedules it all the same. If that token turns out to end
the segment, the row was computed for nothing and its token is dropped at commit. Pages freed meanwhile may be given
away at once, because the device runs steps in the order of dispatch: a late write lands before the new owner's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .pages import PagePool
from .plan import Plan, Row
from .policy import Policy, WaitingQueue
from .program import Program, QueueFull, Rejected, Segment


@dataclass(frozen=True)
class SchedulerConfig:
    num_pages: int
    """Scrap page included."""
    page_size: int
    max_seqs: int
    max_step_tokens: int
    max_context: int
    max_waiting: int = 1024
    max_programs: int = 8192
    session_ttl_s: float = 600.0

    @property
    def pages_per_seq(self) -> int:
        return -(-self.max_context // self.page_size)


@dataclass(frozen=True)
class SchedulerStats:
    """Programs conserve: created = live + finished + failed + expired."""

    running: int
    waiting: int
    programs: int
    in_tool_wait: int
    created: int
    finished: int
    failed: int
    expired: int
    preemptions: int
    free_pages: int
    retained_pages: int
    """Held by programs without a running segment; can be had at any time."""
    reused_tokens: int
    reclaimed_pages: int
    """Taken from waiting programs under pressure."""


@dataclass
class _Counts:
    created: int = 0
    finished: int = 0
    failed: int = 0
    expired: int = 0
    preemptions: int = 0
    reused_tokens: int = 0
    reclaimed_pages: int = 0


class Scheduler:
    """Decides what every step computes and where its KV lives. Single-threaded; time is passed in, in seconds."""

    def __init__(self, config: SchedulerConfig, policy: Policy):
        self.config = config
        self.page_table = np.zeros((config.max_seqs, config.pages_per_seq), np.int32)
        """Pages of each slot, in order."""
        self._policy = policy
        self._pool = PagePool(config.num_pages)
        self._queue = WaitingQueue(policy)
        self._running: list[Segment] = []  # in the order of the policy
        self._slots = list(range(config.max_seqs - 1, -1, -1))
        self._programs: dict[str, Program] = {}
        self._live: dict[Program, Segment] = {}
        self._idle: dict[Program, None] = {}  # in a tool wait, longest first
        self._retaining: dict[Program, None] = {}  # with pages but no running segment, longest first
        self._counts = _Counts()
        self._submitted = 0

    # -- events ----------------------------------------------------------------------------------------------

    def submit(
        self,
        prompt: Sequence[int],
        max_tokens: int,
        stops: frozenset[int] = frozenset(),
        *,
        program: str | None = None,
        final: bool = False,
        now: float,
    ) -> Segment:
        """Queue a segment; of a named program the next one, which ends its tool wait.

        Raises:
            Rejected: it can never run.
            QueueFull: too many segments wait, too many programs are live, or its program has a segment already.
        """
        c, total = self.config, len(prompt) + max_tokens
        capacity = min(c.max_context, self._pool.size * c.page_size)
        if not prompt or max_tokens < 1:
            raise Rejected(f"a prompt of {len(prompt)} tokens and max_tokens {max_tokens}: both must be at least 1")
        if total > capacity:
            raise Rejected(
                f"a prompt of {len(prompt)} tokens and max_tokens {max_tokens} exceed the {capacity} that fit"
            )
        if len(self._queue) >= c.max_waiting:
            raise QueueFull(f"{len(self._queue)} segments are waiting; try again later")
        owner = self._program(program, now)
        self._idle.pop(owner, None)
        self._submitted += 1
        segment = Segment(
            number=self._submitted,
            program=owner,
            prompt=tuple(prompt),
            max_tokens=max_tokens,
            stops=stops,
            final=final or program is None,
            submitted=now,
        )
        self._live[owner] = segment
        self._queue.push(segment)
        return segment

    def finish(self, segment: Segment, reason: str, now: float) -> None:
        """End a segment, wherever it is, and free or retain its pages; a second call does nothing."""
        if segment.finish_reason is not None:
            return
        segment.finish_reason = reason
        program = segment.program
        del self._live[program]
        keeps = not segment.final and reason != "error"
        if segment.slot >= 0:
            program.tokens = [*segment.prompt, *segment.output][: segment.computed] if keeps else []
            program.pages = self._vacate(segment, keep=len(program.tokens))
        else:
            self._queue.remove(segment)
        if segment.final:
            failed = reason == "error"
            self._counts.failed += failed
            self._counts.finished += not failed
            self._forget(program)
        else:
            program.wait_began = now
            if not keeps:
                self._discard(program)
            self._idle[program] = None
            if program.pages:
                self._retaining[program] = None

    def end_program(self, program: str, now: float) -> Segment | None:
        """End a program; returns the live segment that was cancelled with it, if any. Unknown ones are ignored."""
        found = self._programs.get(program)
        if found is None:
            return None
        segment = self._live.get(found)
        if segment is None:
            self._counts.finished += 1
            self._forget(found)
        else:
            segment.final = True
            self.finish(segment, "cancelled", now)
        return segment

    def expire(self, now: float) -> None:
        """Forget programs whose tool wait has outlasted the session's time to live."""
        while self._idle:
            program = next(iter(self._idle))
            if now - program.wait_began < self.config.session_ttl_s:
                return
            self._counts.expired += 1
            self._forget(program)

    def stats(self) -> SchedulerStats:
        return SchedulerStats(
            running=len(self._running),
            waiting=len(self._queue),
            programs=len(self._programs),
            in_tool_wait=len(self._idle),
            created=self._counts.created,
            finished=self._counts.finished,
            failed=self._counts.failed,
            expired=self._counts.expired,
            preemptions=self._counts.preemptions,
            free_pages=self._pool.free,
            retained_pages=self._pool.size - self._pool.free - sum(len(s.pages) for s in self._running),
            reused_tokens=self._counts.reused_tokens,
            reclaimed_pages=self._counts.reclaimed_pages,
        )

    def check(self) -> None:
        """Raise AssertionError unless pages and programs conserve (for tests and debugging; O(everything))."""
        owners = [segment.pages for segment in self._running] + [p.pages for p in self._programs.values()]
        self._pool.check(owners)
        c = self._counts
        assert c.created == len(self._programs) + c.finished + c.failed + c.expired, "programs do not add up"
        assert len(self._programs) == len(self._live) + len(self._idle), "a program is neither live nor in a tool wait"
        assert {s for s in self._live.values() if s.slot >= 0} == set(self._running), "a running segment is not live"
        assert sorted([s.slot for s in self._running] + self._slots) == list(range(self.config.max_seqs)), "slots leak"
        for segment in self._running:
            assert self.page_table[segment.slot, : len(segment.pages)].tolist() == segment.pages, "page table is stale"
            assert segment.computed <= len(segment.pages) * self.config.page_size, "computed tokens without a page"
        for program in self._programs.values():
            assert bool(program.pages) == (program in self._retaining), "retained pages that cannot be reclaimed"
            assert len(program.tokens) <= len(program.pages) * self.config.page_size, "tokens without a page"

    # -- a step ----------------------------------------------------------------------------------------------

    def plan(self, now: float) -> Plan | None:
        """The next step, or None if nothing can run. It must be dispatched; its pages and tokens count as computed."""
        self.expire(now)
        chosen: dict[Segment, int] = {}
        budget = self.config.max_step_tokens
        decodes: list[tuple[Segment, int]] = []
        chunks: list[tuple[Segment, int]] = []
        for segment in self._running:
            if (wanted := segment.wanted) > 0:
                (decodes if wanted == 1 else chunks).append((segment, wanted))
        for segment, count in decodes + chunks:
            if segment.slot < 0:
                continue  # preempted by one before it
            count = self._hold(segment, min(count, budget), chosen)
            if count > 0:
                chosen[segment] = count
                budget -= count
        admitted = []
        while budget > 0 and (newcomer := self._admissible()) is not None:
            self._admit(newcomer)
            admitted.append(newcomer)
            chosen[newcomer] = self._hold(newcomer, min(newcomer.wanted, budget), chosen)
            budget -= chosen[newcomer]
        if not chosen:
            return None
        rows = [self._row(segment, count, now) for segment, count in chosen.items()]
        return Plan(rows, admitted, self.config.max_step_tokens - budget)

    def commit(self, plan: Plan, tokens: Sequence[int], now: float) -> list[tuple[Segment, int]]:
        """Take in what a dispatched plan sampled, ``tokens`` one per row; returns the new token of each live segment.

        Segments that have ended since the plan are passed over. A segment ends here if its token is a stop or its
        last, or negative: that is, if the device could not choose one.
        """
        new = []
        for row, token in zip(plan.rows, tokens, strict=True):
            segment = row.segment
            if not row.samples or segment.finish_reason is not None:
                continue
            segment.pending -= 1
            new.append((segment, token))
            if token < 0:
                segment.length -= 1
                self.finish(segment, "error", now)
                continue
            segment.output.append(token)
            if segment.first_token is None:
                segment.first_token = now
            if token in segment.stops:
                self.finish(segment, "stop", now)
            elif len(segment.output) == segment.max_tokens:
                self.finish(segment, "length", now)
        return new

    def _row(self, segment: Segment, count: int, now: float) -> Row:
        start = segment.computed
        segment.computed = start + count
        samples = segment.computed == segment.length
        segment.pending += samples
        segment.length += samples
        if segment.first_scheduled is None:
            segment.first_scheduled = now
        return Row(segment, start, count, samples)

    def _admissible(self) -> Segment | None:
        """The first waiting segment, if it has a slot and all its known tokens can have pages without preemption."""
        segment = self._queue.peek()
        if segment is None or not self._slots or segment.pending:
            return None  # a preempted one whose last token is still on the device waits for its commit
        spoken_for = sum(max(len(s.pages), self._pages_for(s.known)) for s in self._running)
        return segment if self._pages_for(segment.known) <= self._pool.size - spoken_for else None

    def _admit(self, segment: Segment) -> None:
        self._queue.pop()
        program = segment.program
        self._retaining.pop(program, None)
        kept = min(_common(program.tokens, segment.prompt), segment.known - 1)
        keep = self._pages_for(kept)
        self._pool.release(program.pages[keep:])
        segment.pages, program.pages, program.tokens = program.pages[:keep], [], []
        segment.computed = kept
        if segment.first_scheduled is None:
            segment.cached_tokens = kept
            self._counts.reused_tokens += kept
        segment.slot = self._slots.pop()
        self.page_table[segment.slot, :keep] = segment.pages
        self._running.append(segment)
        self._running.sort(key=self._policy.key)

    # -- pages -----------------------------------------------------------------------------------------------

    def _hold(self, segment: Segment, count: int, chosen: dict[Segment, int]) -> int:
        """Give ``segment`` pages for ``count`` more tokens; returns how many tokens it has pages for, at most that.

        Pages come from the free ones, then from waiting programs, then from running segments after it in the order of
        the policy. So the first in order always gets on, and nothing waits for ever.
        """
        held, size = len(segment.pages), self.config.page_size
        if segment.computed + count <= held * size:
            return count
        need = self._pages_for(segment.computed + count) - held
        self._reclaim(need)
        while self._pool.free < need and self._running[-1] is not segment:
            victim = self._running[-1]
            chosen.pop(victim, None)
            self._preempt(victim)
        new = self._pool.allocate(min(need, self._pool.free))
        self.page_table[segment.slot, held : held + len(new)] = new
        segment.pages += new
        return min(count, len(segment.pages) * self.config.page_size - segment.computed)

    def _reclaim(self, need: int) -> None:
        """Make ``need`` pages free if waiting programs hold enough: longest wait first, last pages first.

        The one place that decides what a waiting program's KV is worth; the residency manager will stand here.
        """
        while self._pool.free < need and self._retaining:
            program = next(iter(self._retaining))
            take = min(need - self._pool.free, len(program.pages))
            keep = len(program.pages) - take
            self._pool.release(program.pages[keep:])
            del program.pages[keep:]
            del program.tokens[keep * self.config.page_size :]
            self._counts.reclaimed_pages += take
            if not program.pages:
                del self._retaining[program]

    def _preempt(self, victim: Segment) -> None:
        """Take everything from a running segment; it is computed again from its tokens later."""
        self._vacate(victim, keep=0)
        victim.computed = 0
        victim.preemptions += 1
        self._counts.preemptions += 1
        self._queue.push(victim)

    def _vacate(self, segment: Segment, keep: int) -> list[int]:
        """Take a segment off its slot; returns the pages of its first ``keep`` tokens, the others are released."""
        self._running.remove(segment)
        self._slots.append(segment.slot)
        segment.slot = -1
        pages, segment.pages = segment.pages, []
        kept = self._pages_for(keep)
        self._pool.release(pages[kept:])
        return pages[:kept]

    def _discard(self, program: Program) -> None:
        self._pool.release(program.pages)
        program.pages, program.tokens = [], []
        self._retaining.pop(program, None)

    def _pages_for(self, tokens: int) -> int:
        return -(-tokens // self.config.page_size)

    # -- programs --------------------------------------------------------------------------------------------

    def _program(self, name: str | None, now: float) -> Program:
        found = self._programs.get(name) if name is not None else None
        if found is not None:
            if found in self._live:
                raise QueueFull(f"session {name!r} has a segment in progress; try again when it has ended")
            return found
        if len(self._programs) >= self.config.max_programs:
            if not self._idle:
                raise QueueFull(f"{len(self._programs)} programs are live; try again later")
            self._counts.expired += 1
            self._forget(next(iter(self._idle)))
        self._counts.created += 1
        program = Program(name if name is not None else f"#{self._counts.created}", now)
        self._programs[program.id] = program
        return program

    def _forget(self, program: Program) -> None:
        self._discard(program)
        self._idle.pop(program, None)
        del self._programs[program.id]


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common prefix."""
    n = min(len(a), len(b))
    if list(a[:n]) == list(b[:n]):
        return n
    return next(i for i in range(n) if a[i] != b[i])
