"""Runs an event loop in a thread of its own, for callers that wait for coroutines without being one."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import threading
from collections.abc import Callable, Coroutine
from typing import Any, Generic, TypeVar, cast

from astraea_jax.engine.engine import ENGINE_THREAD
from astraea_jax.errors import EngineDead

log = logging.getLogger(__name__)

STOP_S = 10.0
"""Seconds to wait for the event loop to end; an async tool that blocks it cannot be stopped."""

T = TypeVar("T")


class _Call(Generic[T]):
    """A coroutine that somebody waits for. ``start`` and ``cancel`` run in the event loop.

    Signals may interrupt the waiting at any instant, twice in a row, too. So it waits for a bare lock: conditions in
    Python's own futures stay locked if an interrupt comes just when they have been taken.
    """

    def __init__(self, work: Callable[[], Coroutine[Any, Any, T]]):
        self._work = work
        self._task: asyncio.Task[T] | None = None
        self._outcome: list[tuple[T | None, BaseException | None]] = []
        """The first entry counts: there may be another one of a call that was abandoned."""
        self._over = threading.Lock()
        self._over.acquire()

    @property
    def done(self) -> bool:
        """Whether there is an outcome."""
        return bool(self._outcome)

    def wait(self, timeout_s: float = -1) -> None:
        """Wait for the outcome, without a timeout for ever."""
        if not self.done:
            self._over.acquire(timeout=timeout_s)

    def result(self) -> T:
        """Wait for the outcome, and return or raise it."""
        self.wait()
        result, error = self._outcome[0]
        if error is not None:
            raise error
        return cast(T, result)

    def start(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._work())
        self._task.add_done_callback(self._settle)

    def cancel(self) -> None:
        if self._task is None:  # the caller was interrupted before it could ask for a start
            self.abandon()
        elif not self._task.cancelling():
            self._task.cancel()

    def abandon(self) -> None:
        """Let the caller go with an error, in any thread, unless there is an outcome already."""
        self._end(None, EngineDead("this LLM was closed while the call was running"))

    def _settle(self, task: asyncio.Task[T]) -> None:
        if task.cancelled():
            self.abandon()
        elif (error := task.exception()) is not None:
            self._end(None, error)
        else:
            self._end(task.result(), None)

    def _end(self, result: T | None, error: BaseException | None) -> None:
        self._outcome.append((result, error))
        with contextlib.suppress(RuntimeError):  # there was an outcome already
            self._over.release()


class LoopThread(threading.Thread):
    """A started thread with an event loop; a daemon, so that a process may end without :meth:`stop`."""

    def __init__(self, name: str):
        super().__init__(name=name, daemon=True)
        self._runner = asyncio.Runner(loop_factory=asyncio.new_event_loop)
        self._loop = self._runner.get_loop()
        self._stopping = asyncio.Event()
        self._lock = threading.RLock()  # a signal handler may come in where its own thread holds it
        self._closed = False
        self._process = os.getpid()
        self._calls: set[_Call[Any]] = set()
        try:
            self.start()
        except BaseException:
            self._runner.close()
            raise

    def wait_for(self, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Run the coroutine that ``work`` makes, and return its result to this thread, which is any other one.

        What interrupts the waiting (Ctrl-C) cancels the coroutine, and is raised when that has ended, or does not end.

        Raises:
            EngineDead: the thread is stopped, or is stopping.
            RuntimeError: an event loop of this kind, or an engine, runs in the calling thread.
        """
        self.check_caller()
        call = _Call(work)
        try:
            self._post(call)
            return call.result()
        except BaseException:
            try:
                self._cancel(call)
            finally:  # interrupted again, perhaps before that
                if not call.done and self._cancel(call):
                    call.wait(STOP_S)
            raise
        finally:
            self._calls.discard(call)

    def check_caller(self) -> None:
        """Refuse a caller that would wait for itself, or for one that waits for it.

        Raises:
            RuntimeError: the calling thread runs such an event loop, or an engine.
        """
        if threading.current_thread().name == ENGINE_THREAD:
            raise RuntimeError(
                "an engine's own thread must not wait for an LLM, because the answer would have to come from it; what "
                "calls the LLM here is the destructor of an object that Python has collected in this thread"
            )
        if isinstance(threading.current_thread(), LoopThread):
            raise RuntimeError(
                "an async tool must not wait for an LLM, because it holds up the event loop that runs the agents: "
                "make the tool a plain function, which gets a thread of its own, or await llm.engine.generate(…) in it"
            )

    def check_open(self) -> None:
        """Refuse a caller whom nobody would answer.

        Raises:
            EngineDead: the thread is stopped or is stopping, or belongs to the process that this one was forked from.
        """
        if self._closed or os.getpid() != self._process:  # is_alive() would end the thread if it were interrupted
            raise EngineDead("this LLM is closed; make a new one")

    def stop(self) -> None:
        """Cancel what runs, let every caller go, and end the thread. Idempotent, and for any other thread."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._loop.call_soon_threadsafe(self._stopping.set)
        self.join(STOP_S)
        if self.is_alive():
            log.warning("an async tool blocks the event loop of %s, whose thread is left behind", self.name)
            self._abandon_all()

    def run(self) -> None:
        """Run the event loop until :meth:`stop`; cancels what is left by then."""
        try:
            with self._runner:
                try:
                    self._runner.run(self._stopping.wait())
                finally:
                    with self._lock:
                        self._closed = True
        finally:
            self._abandon_all()

    def _post(self, call: _Call[Any]) -> None:
        with self._lock:
            self.check_open()
            self._calls.add(call)
            self._loop.call_soon_threadsafe(call.start)

    def _cancel(self, call: _Call[Any]) -> bool:
        """Whether the call is being cancelled: by this, or by a stop. It is not if it has never been posted."""
        with self._lock:
            if not self._closed:
                self._loop.call_soon_threadsafe(call.cancel)
        return call in self._calls

    def _abandon_all(self) -> None:
        for call in list(self._calls):
            call.abandon()
