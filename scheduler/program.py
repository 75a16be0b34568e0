"""Programs and their requests: what the scheduler knows about the work.

Every field says who writes it. All of them run in the one thread that drives the scheduler; others only read.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from .prefix import hash_blocks
from .wait import UNKNOWN, BoundedWait, Resumed, WaitOutcome

if TYPE_CHECKING:
    from .distribution import Distribution
    from .transfer import HostCopy, Transfer


NO_WINDOW = range(2**40, 2**40)
"""What a program holds that needs no window pages: none, and its window begins after all its pages."""
DEFER_S = 60.0
"""Seconds for which a request of a priority above 0 lets others start before it: a guess."""


class StepCount:
    """Counts the steps of rows that all compute one token at each, so that no step need look at any of them."""

    __slots__ = ("taken",)

    def __init__(self) -> None:
        self.taken = 0


_ALONE = StepCount()
"""The count of requests that no step advances by itself; it stays 0."""


class Rejected(ValueError):
    """The request can never run; the message gives the numbers."""


class QueueFull(RuntimeError):
    """A bound on waiting requests, live programs or requests of one program is reached; later it may work."""


@dataclass(slots=True, eq=False)
class Job:
    """The work of a program, and of its children, from a user's message to the answer: what policies read.

    Written by Scheduler and its parts, as requests of its programs start and stop.
    """

    arrival: float
    """Seconds."""
    turns: int = 0
    """Requests that have ended."""
    service: float = 0.0
    """Tokens computed for it so far: prefill that was not cached, and decode."""
    output_tokens: int = 0
    """Tokens sampled by the requests that have ended."""
    waited_s: float = 0.0
    """Seconds in the queue, over all requests so far."""
    ran_s: float = 0.0
    """Seconds on a slot, over all requests so far."""
    tool_s: float = 0.0
    """Seconds that its programs have waited for tools."""
    level: int = 0
    """Its level, in policies that have levels; 0 is served first. Written by the policy."""
    last_turn: tuple[int, int, float] | None = None
    """Number, kind and talk of its last turn as hazards have counted it. Written by the predictor."""
    ended: bool = False
    """Whether its end has been learned from."""
    left: bool = False
    """Whether the program that led it has ended, or works on another one. Others may take part in it no more."""


@dataclass(slots=True, eq=False)
class Program:
    """One conversation of an agent with the model. It works on one job after the other."""

    # Written once, by Registry.open.
    number: int
    """Order of opening. It names the program in logs, whatever its caller calls it."""
    arrival: float
    """Seconds."""
    key: Hashable | None = None
    """The caller's name for it; None: nobody can find it."""
    owner: Hashable = ""
    """The owner among whose idle programs it is counted when the table of programs is full."""
    salt: bytes | None = None
    """Programs of equal salt share KV of equal prefixes; None: with nobody."""
    parent: Hashable | None = None
    """Key of the program in whose job it takes part while there is one."""
    tenant: int = 0
    """Number of its owner among those who share pages, as long as it is there; see PageShares."""

    # Written by Registry and Scheduler, as its requests start and stop.
    job: Job = field(init=False)
    """The work that its present or last request belongs to."""
    leads: bool = True
    """Whether the job ends with it; False: the job is its parent's."""
    turns: int = 0
    """Requests that have ended, over all jobs."""
    wait: BoundedWait | None = None
    """What it waits for, if anybody has said so."""
    wait_began: float = 0.0
    """Time at which its present wait began."""
    together: Distribution | None = None
    """How long its parallel tools take together, as known when they were named. Written by Predictor."""
    io_intensive: bool = True
    """Whether its job's requests cost fewer tokens than the average request (Astraea's class, arXiv 2512.14142 §4.3);
    new programs count so. Written by Registry.classify."""

    # Written by Residency and its parts (RetainedKV, HostCopies).
    last: Request | None = None
    """The request whose KV is retained while none of its requests runs. Also written by Scheduler, for a request that
    ended before it ran."""
    kept: int = 0
    """Tokens of that request whose KV is retained, from the first on."""
    pages: list[int] = field(default_factory=list)
    """Device pages of the first of these tokens."""
    window: range = NO_WINDOW
    """Indices of the pages, its own or those of its request that runs, whose window pages it holds. Written by
    WindowPages."""
    copies: list[HostCopy] = field(default_factory=list)
    """Host copies of pages, by rising index, without overlap. Every page of the tokens kept is on the device, in a
    copy, or both."""
    running: Request | None = None
    """The request of it that runs, and owns the device pages."""
    tier: int = 1
    """Its class in the order of eviction, one of those of :mod:`~.eviction`. Written by EvictionOrder."""
    computed: int = 0
    """Tokens of that request that had been computed when it stopped running."""
    lost: str = ""
    """Why some of their KV was lost since, in a word of :mod:`~.wait`."""

    def __post_init__(self) -> None:
        self.job = Job(self.arrival)

    @property
    def awaits_human(self) -> bool:
        """Whether its job has ended, and it waits for a human to begin the next."""
        return self.wait is not None and self.wait.wait.human

    preparing: Request | None = None
    """The request that computes its next prompt while it waits. Written by Preparations."""

    @property
    def restoring(self) -> bool:
        """Whether its KV is on the way back from the host."""
        return self.running is not None and self.running.loading is not None


@dataclass(slots=True, eq=False, repr=False)  # an error message must not show anybody's prompt
class Request:
    """One model call of a program.

    Its computed tokens chase its known ones. Of those, *pending* ones have been sampled by a dispatched step whose
    result the host has not read. A step that computes all of them samples one more, so ``num_computed`` stays below
    ``num_with_pending``.
    """

    # Written once, by Scheduler.submit.
    number: int
    """Order of submission."""
    program: Program
    prompt: Sequence[int]
    max_tokens: int
    """0: it only computes the KV of its prompt, ahead of the request that will use it, and samples nothing."""
    stops: frozenset[int]
    """Tokens that end it."""
    final: bool
    """Its program ends with it. Scheduler.end_program sets it, too."""
    submitted: float
    page_size: int
    priority: int = 0
    """Above 0: it starts after the others, until it has waited long enough."""
    wait: WaitOutcome | None = None
    """How the wait of its program came out that it has ended; None: it is the program's first."""
    max_computed: int = field(init=False)
    """Tokens that are ever computed: the last one it may generate is not fed back."""

    # Written by Scheduler.
    matched: int = 0
    """Tokens that it shares with what its program retained when it was last queued."""
    queued: float = 0.0
    """Time at which it last entered the queue."""
    started: float = 0.0
    """Time at which it last got a slot."""
    deferred: bool = False
    """Whether it has got its slot as one of those that start after the others."""
    service: float = 0.0
    """Tokens computed for it so far."""
    output: list[int] = field(default_factory=list)
    """Tokens sampled so far that the host has read."""
    num_at_start: int = field(init=False)
    """Its ``num_with_pending`` when it last entered the queue."""
    block_hashes: list[bytes] = field(default_factory=list)
    """Hashes of its first full pages; none if its program shares with nobody."""
    finish_reason: str | None = None
    """"stop", "length", "error", or whatever reason Scheduler.finish was given."""
    cached_tokens: int = 0
    """Prompt tokens whose KV was still there when it was first admitted."""
    preemptions: int = 0
    first_token: float | None = None
    """Time at which its first token was read."""
    skipped: int = 0
    """Times that a later request has started because this one, first in order, did not fit. Written by Admission."""

    # Written by Running.
    slot: int = -1
    """Its row in the page table while it runs; -1 otherwise."""
    pages: list[int] = field(default_factory=list)
    """Device pages of its first tokens while it runs."""
    capacity: int = 0
    """Tokens that these pages hold."""
    first_scheduled: float | None = None
    """Time at which it was first part of a step."""

    # Written by DecodeBatch, and by whoever sets num_computed.
    steps: StepCount = field(init=False, default=_ALONE)
    """The steps at each of which it computes one token."""
    computed_base: int = field(init=False, default=0)
    """``num_computed`` less the steps taken."""

    # Written by Residency and HostCopies when it is admitted, and when a restore ends.
    reused: int = 0
    """Tokens that it had not to compute when it last got a slot."""
    loading: Transfer | None = None
    """The restore that brings back what the host holds of it; it computes nothing until that has ended."""
    restore_s: float = 0.0
    """Seconds that restores took before its first step."""
    resumed: Resumed = UNKNOWN
    """Where its KV came from when it was first admitted."""

    def __post_init__(self) -> None:
        self.num_at_start = len(self.prompt)
        self.max_computed = self.num_at_start + self.max_tokens - 1
        self.queued = self.submitted

    @property
    def num_computed(self) -> int:
        """Tokens whose KV is written, or will be by a dispatched step.

        Residency, Running and DecodeBatch advance it; Scheduler sets it back to 0 when it leaves its slot.
        """
        return self.computed_base + self.steps.taken

    @num_computed.setter
    def num_computed(self, tokens: int) -> None:
        self.computed_base = tokens - self.steps.taken

    def advance_with(self, steps: StepCount | None) -> None:
        """From now on one token is computed at every step that is counted; None: no longer."""
        computed = self.num_computed
        self.steps = steps or _ALONE
        self.num_computed = computed

    @property
    def defers_until(self) -> float:
        """Time until which it starts after requests of priority 0."""
        return self.submitted + DEFER_S if self.priority > 0 else self.submitted

    @property
    def num_tokens(self) -> int:
        """Tokens that the host knows: prompt and output."""
        return len(self.prompt) + len(self.output)

    @property
    def num_with_pending(self) -> int:
        """Tokens that the device knows: prompt, output and pending ones."""
        return max(self.num_at_start, self.num_computed + 1)

    @property
    def num_pending(self) -> int:
        return self.num_with_pending - self.num_tokens

    @property
    def num_to_compute(self) -> int:
        """Tokens that it could compute now."""
        return min(self.num_with_pending, self.max_computed) - self.num_computed

    @property
    def prepares(self) -> bool:
        """Whether it only computes the KV of its prompt."""
        return self.max_tokens == 0

    @property
    def most_reusable(self) -> int:
        """Tokens that it could find computed: one is always left to compute."""
        return min(self.num_tokens, self.max_computed) - 1

    @property
    def reusable(self) -> int:
        """Tokens whose KV its program retains, while it waits."""
        return min(self.matched, self.program.kept, self.most_reusable)

    def shared_with(self, prompt: Sequence[int]) -> int:
        """Length of the common prefix of its tokens and ``prompt``."""
        shared = _common(self.prompt, prompt)
        if shared == len(self.prompt):
            shared += _common(self.output, list(prompt[shared : shared + len(self.output)]))
        return shared

    def matches(self, last: Request) -> None:
        """Note what it has in common with the last request of its program."""
        self.matched = last.shared_with(self.prompt)
        self.block_hashes += last.block_hashes[len(self.block_hashes) : self.matched // self.page_size]

    def extend_block_hashes(self) -> None:
        """Hash every full page of known tokens that has no hash yet."""
        self.block_hashes += self.further_hashes()

    def further_hashes(self) -> list[bytes]:
        """Hashes of the full pages of known tokens that have none yet."""
        salt, start, stop = self.program.salt, len(self.block_hashes) * self.page_size, self.num_tokens
        if salt is None or stop - start < self.page_size:
            return []
        tokens = np.empty(stop - start, np.int32)
        self.copy_tokens(start, tokens)
        before = self.block_hashes[-1] if self.block_hashes else salt
        return hash_blocks(tokens, self.page_size, before)

    def copy_tokens(self, start: int, out: np.ndarray) -> None:
        """Fill ``out`` with its tokens from ``start``; -1 where only the device knows them."""
        stop, prompt = start + len(out), len(self.prompt)
        out[:] = -1
        if start < prompt:
            head = self.prompt[start:stop]
            out[: len(head)] = head
        if stop > prompt:
            first = max(start, prompt)
            tail = self.output[first - prompt : stop - prompt]
            out[first - start : first - start + len(tail)] = tail


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common prefix."""
    n = min(len(a), len(b))
    if type(a) is type(b) and a[:n] == b[:n]:  # the usual case, at the speed of C
        return n
    return next((i for i in range(n) if a[i] != b[i]), n)
