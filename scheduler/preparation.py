"""Prompts computed ahead: the next prompt of a program that waits, while nobody else needs the device."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

from .admission import Admission
from .offer import Offer
from .program import Program, Request

PREPARED, SUPERSEDED = "prepared", "superseded"
"""Reasons for which such a request ends: all is computed; its program has got another request meanwhile."""


class Preparations:
    """Requests that compute the KV of the next prompt of a program that waits, and sample nothing.

    They start, in the order in which they came, when no other request waits, and leave their slots when one does, or
    when one that runs needs their pages. Neither policies nor predictions are told of them. Whatever ends one, its
    program retains what has been computed.

    Args:
        admission: finds what they can start from.
        vacate: takes one off its slot, at a time.
    """

    def __init__(self, admission: Admission, vacate: Callable[[Request, float], None]):
        self._admission, self._vacate = admission, vacate
        self._queued: OrderedDict[Request, None] = OrderedDict()
        self._started: dict[Request, None] = {}
        self._ended: list[Request] = []  # since they were last taken

    def add(self, request: Request) -> None:
        """Queue a request; one that its program has already is superseded."""
        program = request.program
        self.end(program, SUPERSEDED)
        program.preparing = request
        if request.max_computed > 0:
            self._queued[request] = None
        else:
            self.end(program, PREPARED)

    def next(self, now: float) -> Offer | None:
        """What the first in the queue starts from, if it fits."""
        request = next(iter(self._queued), None)
        return None if request is None else self._admission.fitting(request, now)

    def started(self, request: Request) -> None:
        """A request has got a slot."""
        del self._queued[request]
        self._started[request] = None

    def step_aside(self, request: Request) -> None:
        """Take a request off its slot; it is the first to start again."""
        request.matched = request.num_tokens
        self._leave(request)
        self._queued[request] = None
        self._queued.move_to_end(request, last=False)

    def settle(self, crowded: bool) -> None:
        """End the requests that dispatched steps complete; if others wait (``crowded``), the rest step aside."""
        for request in list(self._started):
            if request.num_computed == request.max_computed:
                self.end(request.program, PREPARED)
            elif crowded:
                self.step_aside(request)

    def end(self, program: Program, reason: str) -> None:
        """End the request of a program, if there is one."""
        request, program.preparing = program.preparing, None
        if request is None:
            return
        request.finish_reason = reason
        self._queued.pop(request, None)
        if request in self._started:
            self._leave(request)
        self._ended.append(request)

    def _leave(self, request: Request) -> None:
        del self._started[request]
        self._vacate(request, request.started)  # the time on its slot is not its job's, which waits

    def take_ended(self) -> list[Request]:
        """Requests that have ended since the last call."""
        ended, self._ended = self._ended, []
        return ended

    def check(self, programs: list[Program]) -> None:
        """Raise AssertionError unless the requests are those of the programs (for tests; O(everything))."""
        own = {program.preparing for program in programs} - {None}
        assert own == {*self._queued, *self._started}
        assert all(request.slot < 0 for request in self._queued)
        assert all(request.slot >= 0 and request.program.running is request for request in self._started)
