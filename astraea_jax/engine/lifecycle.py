"""The life of an engine: its state and the requests it has accepted, which change under one lock.

Accepting a request and ending all of them exclude each other, so a request is either refused or ended, and ended once.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Hashable, Mapping
from enum import Enum

from astraea_jax.engine.generation import Mailbox
from astraea_jax.engine.shared_bound import SharedBound
from astraea_jax.errors import EngineDead, Overloaded

log = logging.getLogger(__name__)


class State(Enum):
    """The states of an engine, in the order of its life; DEAD is final."""

    NEW = "new"
    COMPILING = "compiling"
    SERVING = "serving"
    DRAINING = "draining"
    DEAD = "dead"


class Lifecycle:
    """The state of an engine, and the requests accepted and not yet answered. Any thread may call it.

    Args:
        max_queued: requests that may wait for their first step; beyond that they are refused.
        weights: of owners' shares of the queue.
    """

    def __init__(self, max_queued: int, weights: Mapping[Hashable, float] | None = None):
        self._changed = threading.Condition()
        self._state = State.NEW
        self._reason = "the engine has not been started"
        self._open: dict[Mailbox, str | None] = {}  # accepted and not ended; the owner, until it has started
        self._queued = SharedBound(max_queued, weights)  # requests that have not started
        self.cut = 0
        """Requests that were still open when the engine died while it was draining."""
        self._max_queued = max_queued
        self.refused = 0
        """Requests refused because too many waited."""
        self._watchers: list[Callable[[], object]] = []

    @property
    def state(self) -> State:
        """The present state."""
        return self._state

    @property
    def in_progress(self) -> int:
        """Requests accepted and not yet ended."""
        return len(self._open)

    def watch(self, changed: Callable[[], object]) -> None:
        """Call ``changed`` after every change of state, in the thread that makes it."""
        self._watchers.append(changed)

    # -- states ----------------------------------------------------------------------------------------------

    def compile(self) -> bool:
        """Enter COMPILING; False if the engine serves already.

        Raises:
            EngineDead: it is being started by somebody else, is shutting down, or has ended.
        """
        with self._changed:
            if self._state is State.SERVING:
                return False
            if self._state is not State.NEW:
                raise EngineDead(f"an engine is started once, and this one is {self._state.value}: {self._reason}")
            self._set(State.COMPILING, "the engine is still compiling")
        self._tell()
        return True

    def serve(self) -> None:
        """Enter SERVING.

        Raises:
            EngineDead: it was shut down meanwhile.
        """
        with self._changed:
            if self._state is not State.COMPILING:
                raise EngineDead(self._reason)
            self._set(State.SERVING, "")
        self._tell()

    def drain(self) -> None:
        """Refuse requests from now on."""
        with self._changed:
            if self._state is not State.SERVING:
                return
            self._set(State.DRAINING, "the engine is shutting down")
        self._tell()

    def die(self, reason: str) -> list[Mailbox]:
        """Enter DEAD for ``reason``; returns the mailboxes still open, which the caller has to answer."""
        with self._changed:
            cut = list(self._open)
            if self._state is State.DRAINING:
                self.cut = len(cut)
            self._open.clear()
            self._queued.clear()
            first = self._state is not State.DEAD
            if first:
                self._set(State.DEAD, reason)
        if first:
            self._tell()
        return cut

    def wait_until_empty(self, timeout_s: float) -> None:
        """Wait until no request is in progress, or for ``timeout_s`` seconds."""
        with self._changed:
            self._changed.wait_for(lambda: not self._open, timeout_s)

    def _set(self, state: State, reason: str) -> None:
        self._state, self._reason = state, reason
        self._changed.notify_all()

    def _tell(self) -> None:
        for changed in self._watchers:
            try:
                changed()
            except Exception:  # whoever watches must not stop the engine from ending
                log.exception("a watcher of the engine's state failed")

    # -- requests --------------------------------------------------------------------------------------------

    def accept(self, mailbox: Mailbox, owner: str = "") -> None:
        """Take a request in.

        Args:
            mailbox: where its answers go.
            owner: whose it is; "" is the process of the engine itself, which may fill the queue.

        Raises:
            EngineDead: not serving.
            Overloaded: too many wait.
        """
        with self._changed:
            if self._state is not State.SERVING:
                raise EngineDead(self._reason)
            full = self._queued.total >= self._max_queued
            if full or (owner and not self._queued.has_room(owner, 1)):
                self.refused += 1
                raise Overloaded(self._queued.refusal(owner, 1, "requests"))
            self._open[mailbox] = owner
            self._queued.add(owner, 1)

    def started(self, mailbox: Mailbox) -> None:
        """Count a request as waiting no more, because its first step is planned; later calls do nothing."""
        with self._changed:
            if (owner := self._open.get(mailbox)) is not None:
                self._open[mailbox] = None
                self._queued.add(owner, -1)

    def end(self, mailbox: Mailbox) -> bool:
        """Remove a request that is answered; False if it was removed before, so that nobody is answered twice."""
        with self._changed:
            if mailbox not in self._open:
                return False
            if (owner := self._open.pop(mailbox)) is not None:
                self._queued.add(owner, -1)
            if not self._open:
                self._changed.notify_all()
            return True
