"""The engine's loop around a scheduler, with a device of dictionaries."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from support.device import Device, complete

from astraea_jax.scheduler.config import SchedulerConfig
from astraea_jax.scheduler.plan import Plan
from astraea_jax.scheduler.policies import make_policy
from astraea_jax.scheduler.program import Request
from astraea_jax.scheduler.scheduler import Scheduler


def make(policy: str = "fcfs", strategy: str | None = None, **changes) -> Scheduler:
    sizes = {"num_pages": 17, "page_size": 4, "max_seqs": 4, "max_step_tokens": 12, "max_context": 48}
    return Scheduler(SchedulerConfig(**{**sizes, **changes}), make_policy(policy, strategy=strategy))


class Loop:
    """The engine's loop: dispatch a plan before the one before it is committed."""

    def __init__(self, scheduler: Scheduler):
        self.scheduler, self.device = scheduler, Device(scheduler)
        self.now = 0.0
        self.in_flight: tuple[Plan, list[int]] | None = None
        self.transfers = []  # on their way, in order
        self.delay = 0
        self.faults = 0
        """Transfers from now on that fail."""
        self.broken = set()  # requests for which the device finds no token
        self.slots = {}  # who the device was told has them
        self.log = []

    def turn(self) -> bool:
        return self.commit(self.launch())

    def commit(self, launched) -> bool:
        """Commit the step before the one launched; whether anything is left to do."""
        if self.in_flight is not None:
            before, tokens = self.in_flight
            requests = before.requests[: before.samples]
            tokens = [-1 if request in self.broken else t for request, t in zip(requests, tokens, strict=True)]
            self.scheduler.commit(before, tokens, self.now)
        busy = launched is not None or self.in_flight is not None or bool(self.transfers)
        busy = busy or self.scheduler.stats().waiting > 0
        self.in_flight = launched
        return busy

    def launch(self):
        """Plan, begin transfers and dispatch; returns the plan and what it samples."""
        self.now += 1.0
        while self.transfers and self.transfers[0][0] <= self.now:
            self.device.end(self.transfers.pop(0)[1], self.now, failed=self.faults > 0)
            self.faults = max(0, self.faults - 1)
        plan = self.scheduler.plan(self.now)
        launched = None
        transfers, dropped = self.scheduler.take_transfers()
        self.device.begin(transfers, dropped)
        self.transfers += [(self.now + self.delay, transfer) for transfer in transfers]
        if plan is not None:
            for request in plan.admitted:
                assert request.finish_reason is None
                self.slots[request.slot] = request
            assert [self.slots[slot] for slot in plan.slots.tolist()] == plan.requests
            samples = [i < plan.samples for i in range(len(plan.requests))]
            numbers = [request.number for request in plan.requests]
            self.log.append(sorted(zip(numbers, plan.starts.tolist(), plan.counts.tolist(), samples, strict=True)))
            launched = (plan, self.device.run(plan))
        return launched

    def lose_device(self, *, transfers_end: bool) -> list[Request]:
        """A step has failed; those under way will never be read. The transfers that were cancelled by it may still be
        reported."""
        self.in_flight = None
        self.device.lose()
        failed = self.scheduler.lose_device(self.now)
        if not transfers_end:
            self.transfers.clear()
            self.device.restoring.clear()
        return failed

    def drain(self, limit: int = 5000) -> None:
        while self.turn():
            limit -= 1
            assert limit > 0, "no end in sight"


def serve(loop: Loop, name: str, prompt: Sequence[int], count: int = 1, **more: Any) -> Request:
    """A request of a program, from its submission to its end; its output is checked."""
    request = loop.scheduler.submit(prompt, count, program=name, now=loop.now, **more)
    loop.drain()
    loop.scheduler.check()
    assert request.output == complete(list(prompt), count)
    return request
