"""Requests that wait, made by hand, and the order in which a policy would run them."""

from __future__ import annotations

from astraea_jax.scheduler.policy import Pressure, WaitingQueue
from astraea_jax.scheduler.program import Program, Request

ROOM = Pressure(page_size=16, pages=1000, free=1000, retained=0, running=0, host_tier=True)
"""A device that is empty."""


def request(number, program=None, prompt=100, submitted=0.0, **history) -> Request:
    """A request of a program, which is a new one if none is given and whose job has this ``history``."""
    program = program or Program(number, submitted, key=f"p{number}")
    for name, value in history.items():
        setattr(program.job, name, value)
    return Request(number, program, range(prompt), 1000, frozenset(), False, submitted, page_size=16)


def order(policy, requests, now) -> list[int]:
    """Numbers of all these requests, the first to run first."""
    queue = WaitingQueue(policy.columns)
    for s in requests:
        policy.queued(s, s.queued)
        queue.push(s, policy.features(s))
    return [s.number for s in queue.first(policy, now, ROOM, len(requests))]
