"""Programs and their segments: what the scheduler knows about the work."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np


class Rejected(ValueError):
    """The segment can never run; the message gives the numbers."""


class QueueFull(RuntimeError):
    """A bound on waiting segments, live programs or segments of one program is reached; later it may work."""


@dataclass(slots=True, eq=False)
class Program:
    """One agent's life, named by a session."""

    id: str
    arrival: float
    wait_began: float = 0.0
    """When its present tool wait began."""
    tokens: list[int] = field(default_factory=list)
    """The tokens whose KV is in ``pages``, while none of its segments runs."""
    pages: list[int] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class Segment:
    """One model call of a program.

    ``computed`` tokens chase ``length`` tokens. Of those, ``pending`` have been sampled by a dispatched step whose
    result the host has not read.
    """

    number: int
    """Order of submission."""
    program: Program
    prompt: tuple[int, ...]
    max_tokens: int
    stops: frozenset[int]
    """Tokens that end it."""
    final: bool
    """Its program ends with it."""
    submitted: float
    output: list[int] = field(default_factory=list)
    computed: int = 0
    """Tokens whose KV is written, or will be by a dispatched step."""
    pending: int = 0
    slot: int = -1
    """Its row in the page table while it runs; -1 otherwise."""
    pages: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    cached_tokens: int = 0
    """Prompt tokens whose KV its program still held when it was first admitted."""
    preemptions: int = 0
    first_scheduled: float | None = None
    first_token: float | None = None
    length: int = field(init=False)
    """Tokens the device knows: prompt, output and pending ones."""
    limit: int = field(init=False)
    """Tokens that are ever computed; the last one it may generate is not fed back."""

    def __post_init__(self) -> None:
        self.length = len(self.prompt)
        self.limit = self.length + self.max_tokens - 1

    @property
    def known(self) -> int:
        """Tokens the host knows."""
        return self.length - self.pending

    @property
    def wanted(self) -> int:
        """Tokens it could compute now."""
        return min(self.length, self.limit) - self.computed

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
