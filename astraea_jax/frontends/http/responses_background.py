"""Responses that are written in the background: they go on without any client, until they end or are cancelled."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from astraea_jax.engine.shared_bound import shown
from astraea_jax.errors import EngineDead, Overloaded, StepFailed
from astraea_jax.frontends.http.errors import failure_of
from astraea_jax.frontends.http.responses_output import Event
from astraea_jax.frontends.http.responses_record import Record
from astraea_jax.frontends.http.responses_writing import Writing


@dataclass(frozen=True)
class BackgroundLimits:
    """Bounds on responses in the background."""

    running: int = 128
    """Responses at once; one tenant may have half of them."""
    run_s: float = 3600.0
    """Seconds that one may take, beyond which it fails."""
    record_bytes: int = 2**21
    """Bytes of events that are kept of one."""


class Running:
    """A response that is being written in the background.

    Args:
        writing: the response.
        record: of its events.
    """

    def __init__(self, writing: Writing, record: Record):
        self.writing, self.record = writing, record
        self.cancelled = False
        self.task: asyncio.Task[None] | None = None
        writing.record = record
        record.add(writing.builder.start("queued"))

    @property
    def items(self) -> list[dict[str, Any]]:
        """Input items of the whole conversation."""
        return self.writing.asked.items

    @property
    def response(self) -> dict[str, Any]:
        """The response object as it is now."""
        return self.writing.ended or self.writing.builder.response(self.writing.builder.status)

    async def write(self, run_s: float) -> None:
        """Write it to its end, which comes after ``run_s`` seconds at the latest."""
        try:
            async with asyncio.timeout(run_s):
                async for events in self.writing.events():
                    self.record.add(events)
        except asyncio.CancelledError:
            shut_down = EngineDead("the server was shut down before the response had ended")
            self._end(self.writing.builder.cancel() if self.cancelled else self._failed(shut_down))
        except TimeoutError:
            self._end(self._failed(StepFailed(f"the response has taken longer than {run_s:.0f} s")))
        except Exception as error:
            self._end(self._failed(error))
        finally:
            self.writing.turn.cancel()

    async def cancel(self) -> None:
        """Cancel it, and wait until it has ended."""
        assert self.task is not None
        self.cancelled = True
        self.task.cancel()
        await asyncio.wait({self.task})

    def _failed(self, error: Exception) -> list[Event]:
        return self.writing.failed(failure_of(error))

    def _end(self, last: list[Event]) -> None:
        self.record.add(self.writing.end(last))


class Background:
    """All responses that are being written in the background.

    Args:
        tasks: of the server; those of responses are among them while they run, so that it waits for them when it stops.
        limits: on responses.
    """

    def __init__(self, tasks: set[asyncio.Task[None]], limits: BackgroundLimits | None = None):
        self._tasks, self.limits = tasks, limits or BackgroundLimits()
        self._running: dict[tuple[str, str], Running] = {}  # owner and id -> response
        self._places: Counter[str] = Counter()  # owner -> responses that run or are about to

    async def run(self, owner: str, id: str, begin: Callable[[], Awaitable[Writing]]) -> Running:
        """Begin a response, and write it.

        Args:
            owner: the tenant.
            id: of the response.
            begin: begins it; what this raises is raised here.

        Raises:
            Overloaded: too many run.
        """
        total, own, most = self._places.total(), self._places[owner], self.limits.running
        if total >= most or own >= max(1, most // 2):
            name = shown(owner)
            of_all = (
                f"{total} responses run in the background, of {most} allowed in all; tenant {name} has {own} of them"
            )
            of_own = f"tenant {name} has {own} responses in the background, of {max(1, most // 2)} allowed"
            raise Overloaded(f"{of_all if total >= most else of_own}; try again later, or cancel some")
        self._places[owner] += 1
        try:
            running = Running(await begin(), Record(self.limits.record_bytes))
        except BaseException:
            self._leave(owner)
            raise
        self._running[owner, id] = running
        running.task = asyncio.create_task(running.write(self.limits.run_s), name=id)
        self._tasks.add(running.task)

        def ended(task: asyncio.Task[None]) -> None:
            self._tasks.discard(task)
            del self._running[owner, id]
            self._leave(owner)
            running.record.end()

        running.task.add_done_callback(ended)
        return running

    def find(self, owner: str, id: str) -> Running | None:
        """Return a response of this tenant that runs."""
        running = self._running.get((owner, id))
        return running if running is not None and running.writing.ended is None else None

    def _leave(self, owner: str) -> None:
        self._places[owner] -= 1
        if not self._places[owner]:
            del self._places[owner]
