"""Programs and their requests: what the scheduler knows about the work."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from .prefix import page_keys

if TYPE_CHECKING:
    from .transfer import HostCopy, Transfer


class Rejected(ValueError):
    """The request can never run; the message gives the numbers."""


class QueueFull(RuntimeError):
    """A bound on waiting requests, live programs or requests of one program is reached; later it may work."""


@dataclass(slots=True, eq=False)
class Program:
    """One agent session, and its history as policies see it."""

    number: int
    """Order of opening. It names the program in logs, whatever its caller calls it."""
    arrival: float
    key: Hashable | None = None
    """What its caller finds it by; None: nobody finds it."""
    owner: Hashable = ""
    """Whose idle programs it is counted among when the table of programs is full."""
    salt: bytes | None = None
    """Programs of equal salt share KV of equal prefixes; None: with nobody."""
    turns: int = 0
    """Requests that have ended."""
    service: float = 0.0
    """Tokens computed for it so far: prefill that was not cached, and decode."""
    output_tokens: int = 0
    """Sampled by the requests that have ended."""
    waited_s: float = 0.0
    """In the queue, over all requests so far."""
    ran_s: float = 0.0
    """On a slot, over all requests so far."""
    io_intensive: bool = True
    """Its requests cost fewer tokens than the average request (Astraea's class, arXiv 2512.14142 §4.3); new ones count
    so."""
    level: int = 0
    """Of policies that have levels; 0 is served first."""
    tool: str | None = None
    """The tool it waits for, if the client has said so."""
    wait_began: float = 0.0
    """When its present tool wait began."""
    wait_s: float = 0.0
    """How long its last tool wait took."""

    last: Request | None = None
    """The request whose KV is retained while none of its requests runs."""
    kept: int = 0
    """Tokens of that request whose KV is retained, from the first on."""
    pages: list[int] = field(default_factory=list)
    """Device pages of the first of these tokens."""
    copies: list[HostCopy] = field(default_factory=list)
    """Host copies of pages, by rising index and apart from each other. Every page of the tokens kept is on the device,
    in a copy, or both."""
    running: Request | None = None
    """The request of it that runs, and owns the device pages."""

    @property
    def restoring(self) -> bool:
        """Whether its KV is on the way back from the host."""
        return self.running is not None and self.running.loading is not None


@dataclass(slots=True, eq=False, repr=False)  # an error message must not show anybody's prompt
class Request:
    """One model call of a program.

    ``computed`` tokens chase ``length`` tokens. Of those, ``pending`` have been sampled by a dispatched step whose
    result the host has not read. A step that computes all of them samples one more, so ``computed`` stays below.
    """

    number: int
    """Order of submission."""
    program: Program
    prompt: Sequence[int]
    max_tokens: int
    stops: frozenset[int]
    """Tokens that end it."""
    final: bool
    """Its program ends with it."""
    submitted: float
    page_size: int
    matched: int = 0
    """Tokens it shares with what its program retained when it was submitted."""
    queued: float = 0.0
    """When it last entered the queue."""
    started: float = 0.0
    """When it last got a slot."""
    output: list[int] = field(default_factory=list)
    computed: int = 0
    """Tokens whose KV is written, or will be by a dispatched step."""
    slot: int = -1
    """Its row in the page table while it runs; -1 otherwise."""
    keys: list[bytes] = field(default_factory=list)
    """Of its first full pages, by content; none if its program shares with nobody."""
    pages: list[int] = field(default_factory=list)
    room: int = 0
    """Tokens that these pages hold."""
    reused: int = 0
    """Tokens that it had not to compute when it last got a slot."""
    loading: Transfer | None = None
    """Brings back what the host holds of it; it computes nothing until that has ended."""
    finish_reason: str | None = None
    cached_tokens: int = 0
    """Prompt tokens whose KV its program still held when it was first admitted."""
    preemptions: int = 0
    passed: int = 0
    """Times that a later one has started because this one, first in order, did not fit."""
    first_scheduled: float | None = None
    first_token: float | None = None
    reached: int = field(init=False)
    """Its length when it last began to compute."""
    limit: int = field(init=False)
    """Tokens that are ever computed; the last one it may generate is not fed back."""

    def __post_init__(self) -> None:
        self.reached = len(self.prompt)
        self.limit = self.reached + self.max_tokens - 1
        self.queued = self.submitted

    @property
    def length(self) -> int:
        """Tokens the device knows: prompt, output and pending ones."""
        return max(self.reached, self.computed + 1)

    @property
    def known(self) -> int:
        """Tokens the host knows."""
        return len(self.prompt) + len(self.output)

    @property
    def pending(self) -> int:
        return self.length - self.known

    @property
    def wanted(self) -> int:
        """Tokens it could compute now."""
        return min(self.length, self.limit) - self.computed

    @property
    def reusable(self) -> int:
        """Tokens whose KV its program retains; while it waits. One is always left to compute."""
        return min(self.matched, self.program.kept, self.known - 1)

    def shared_with(self, prompt: Sequence[int]) -> int:
        """Length of the common prefix of its tokens and ``prompt``."""
        shared = _common(self.prompt, prompt)
        if shared == len(self.prompt):
            shared += _common(self.output, list(prompt[shared : shared + len(self.output)]))
        return shared

    def extend_keys(self) -> None:
        """Give every full page of known tokens its key."""
        salt, start, stop = self.program.salt, len(self.keys) * self.page_size, self.known
        if salt is not None and stop - start >= self.page_size:
            tokens = np.empty(stop - start, np.int32)
            self.copy_tokens(start, tokens)
            self.keys += page_keys(tokens, self.page_size, self.keys[-1] if self.keys else salt)

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
