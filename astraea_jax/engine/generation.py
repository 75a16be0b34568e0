"""One request as its caller sees it."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

from astraea_jax.engine.pacing import Pace
from astraea_jax.scheduler.program import Request
from astraea_jax.scheduler.wait import UNKNOWN, Resumed, WaitOutcome

log = logging.getLogger(__name__)


class TokenLogprob(NamedTuple):
    """Natural logarithms of probabilities at one token, as the model gave them."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]
    """The most probable tokens and theirs, the highest first; as many as the request asked for."""


class Delta(NamedTuple):
    """Output of a request since its previous Delta. ``finish_reason`` is set on the last one only.

    A tuple, because every token makes one and dataclasses take twice as long.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str | None = None
    """``"stop"`` (stop token or string, or the end of a grammar), ``"length"`` or ``"cancelled"``; of a prompt computed
    ahead ``"prepared"`` or ``"superseded"``."""
    logprobs: tuple[TokenLogprob, ...] = ()
    """One for each of ``token_ids``, if the request asked for them."""
    stop: str | None = None
    """The stop string that has ended the request, if one has."""

    @classmethod
    def joined(cls, deltas: Sequence[Delta]) -> Delta:
        """Return consecutive ones, of which there is at least one, as one."""
        if len(deltas) == 1:
            return deltas[0]
        return cls(
            "".join([delta.text for delta in deltas]),
            tuple(chain.from_iterable([delta.token_ids for delta in deltas])),
            deltas[-1].finish_reason,
            tuple(chain.from_iterable([delta.logprobs for delta in deltas])),
            deltas[-1].stop,
        )


@dataclass(frozen=True)
class Usage:
    """Token counts and times of a finished request. Times in seconds."""

    prompt_tokens: int
    cached_tokens: int
    """Prompt tokens whose KV the program still held."""
    output_tokens: int
    queue_s: float
    """From submission to the first step that ran it."""
    prefill_s: float
    """From that step to the first token."""
    decode_s: float
    """From the first token to the last."""
    preemptions: int
    wait: WaitOutcome | None = None
    """How the wait of its program came out that it has ended; None: it is the program's first request."""
    resumed: Resumed = UNKNOWN
    """Where the KV of its prompt came from."""

    @classmethod
    def of(cls, request: Request, now: float) -> Usage:
        scheduled = request.first_scheduled if request.first_scheduled is not None else now
        first = request.first_token if request.first_token is not None else now
        return cls(
            prompt_tokens=len(request.prompt),
            cached_tokens=request.cached_tokens,
            output_tokens=len(request.output),
            queue_s=scheduled - request.submitted,
            prefill_s=first - scheduled,
            decode_s=now - first,
            preemptions=request.preemptions,
            wait=request.wait,
            resumed=request.resumed,
        )


@dataclass(frozen=True)
class Ended:
    """A request that has ended, for those who count, trace or log requests."""

    reason: str
    """A finish reason of :class:`Delta`, or ``"error"``."""
    usage: Usage | None
    """None: the whole engine has ended before the request."""
    program: int
    """Number of its program in this engine; 0: it never had one."""
    restore_s: float
    """How long its KV took to come back from the host, as the last part of its time in the queue."""


Observer = Callable[[Ended], object]
"""Called with every request that has ended, in the event loop of its caller; it must not block."""


def is_last(item: Delta | Exception) -> bool:
    """Whether this is the last item of a request."""
    return isinstance(item, Exception) or item.finish_reason is not None


class Mailbox:
    """The engine's end of a request: carries what it produces into the event loop of its caller.

    It holds no reference to its :class:`Generation`, so that an abandoned one is collected and cancels its request.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, observers: Sequence[Observer] = ()):
        self.loop = loop
        self.observers = observers
        self.usage: Usage | None = None
        """Set before the last item is delivered."""
        self.program = 0, 0.0
        """``program`` and ``restore_s`` of :class:`Ended`; set at the same time."""
        self.pace: Pace | None = None
        self._items: deque[Delta | Exception] = deque()  # bounded by the request's max_tokens
        self._reader: asyncio.Future[None] | None = None
        self._begun = self._ended = self._waits = False

    def put(self, item: Delta | Exception) -> None:
        """Add an item; called in the event loop."""
        self._items.append(item)
        self._ended = self._ended or is_last(item)
        if self._reader is not None:
            self._wake_in_turn()

    async def take(self) -> Delta | Exception:
        """Wait for the next item, with a pace until its next turn, which neither the first item nor the last awaits."""
        if not self._items or (self.pace is not None and not self._ended):
            self._reader = self.loop.create_future()
            if self._items:
                self._wake_in_turn()
            try:
                await self._reader
            finally:
                self._reader = None
        self._begun = True
        if self.pace is None or isinstance(self._items[0], Exception):
            return self._items.popleft()
        deltas = []
        while self._items and not isinstance(item := self._items[0], Exception):
            deltas.append(item)
            self._items.popleft()
        return Delta.joined(deltas)

    def wake(self) -> None:
        """Wake the reader, if there is one and something for it: its turn has come.

        There may be nothing: what came between the last turn and its reader's awakening has been taken with the rest.
        """
        self._waits = False
        if self._reader is not None and self._items and not self._reader.done():
            self._reader.set_result(None)

    def _wake_in_turn(self) -> None:
        if self.pace is None or self._ended or not self._begun:
            self.wake()
        elif not self._waits:
            self._waits = True
            self.pace.wake(self)

    def tell(self, last: Delta | Exception) -> None:
        """Tell the observers how the request has ended."""
        reason = "error" if isinstance(last, Exception) else last.finish_reason or ""
        for observer in self.observers:
            try:
                observer(Ended(reason, self.usage, *self.program))
            except Exception:  # whoever counts must not cost anybody an answer
                log.exception("an observer of requests failed")


class Generation:
    """A running request: an async iterator of :class:`Delta`, bound to the event loop it was made in.

    Iterating raises what went wrong with this request: ``RequestError``, ``Overloaded``, ``StepFailed`` or
    ``EngineDead``. Whoever gives up, by :meth:`cancel`, by a cancelled task, or by holding it no longer (``break``),
    frees what it holds within a step.
    """

    def __init__(self, mailbox: Mailbox, cancel: Callable[[Mailbox], None]):
        self._mailbox = mailbox
        self._cancel = cancel
        self._cancelled = self._ended = False

    @property
    def usage(self) -> Usage | None:
        """Token counts and times of the request; complete once the last Delta is out."""
        return self._mailbox.usage

    def __aiter__(self) -> Generation:
        return self

    async def __anext__(self) -> Delta:
        if self._ended:
            raise StopAsyncIteration
        if asyncio.get_running_loop() is not self._mailbox.loop:
            raise RuntimeError("a generation can be read only in the event loop in which generate() was called")
        try:
            item = await self._mailbox.take()
        except BaseException:  # the caller's task was cancelled or closed
            self.cancel()
            self._ended = True
            raise
        self._ended = is_last(item)
        if isinstance(item, Exception):
            raise item
        return item

    def observe(self, ended: Observer) -> None:
        """Call ``ended`` when it has ended; to be called where it was made, before anything is awaited."""
        self._mailbox.observers = (*self._mailbox.observers, ended)

    def paced(self, pace: Pace) -> Generation:
        """Return itself; from now on a Delta may be several in one, and comes in the turns of ``pace``."""
        self._mailbox.pace = pace
        return self

    async def text(self) -> str:
        """Wait for the end and return the whole text."""
        return "".join([delta.text async for delta in self])

    def cancel(self) -> None:
        """Stop it, from any thread; its pages are free within one step. Does nothing once it has ended."""
        if not (self._ended or self._cancelled):
            self._cancelled = True
            self._cancel(self._mailbox)

    async def aclose(self) -> None:
        """Cancel it, as :func:`contextlib.aclosing` does."""
        self.cancel()

    def __del__(self) -> None:
        self.cancel()


class Outbox:
    """Collects what the loop has for callers and hands it over with one wake-up per event loop."""

    def __init__(self) -> None:
        self._items: dict[asyncio.AbstractEventLoop, list[tuple[Mailbox, Delta | Exception]]] = {}

    def put(self, mailbox: Mailbox, item: Delta | Exception) -> None:
        """Add what the next :meth:`deliver` hands over."""
        self._items.setdefault(mailbox.loop, []).append((mailbox, item))

    def deliver(self, end: Callable[[Mailbox], bool]) -> list[Mailbox]:
        """Hand everything over; returns the mailboxes whose event loop is closed, so that nobody will read them.

        Args:
            end: called for every mailbox whose last item this is; if False, it has had its last item already.
        """
        items, self._items = self._items, {}
        lost = []
        for loop, all_of_loop in items.items():
            of_loop = [(mailbox, item) for mailbox, item in all_of_loop if not is_last(item) or end(mailbox)]
            try:
                loop.call_soon_threadsafe(_put_all, of_loop)
            except RuntimeError:
                lost += [mailbox for mailbox, _ in of_loop]
        return lost


def _put_all(items: list[tuple[Mailbox, Delta | Exception]]) -> None:
    for mailbox, item in items:
        mailbox.put(item)
        if mailbox.observers and is_last(item):
            mailbox.tell(item)
