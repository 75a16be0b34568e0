"""What tests of forks and of prompts prepared ahead have in common."""

from __future__ import annotations

from support.device import complete
from support.loop import Loop, make

from astraea_jax.scheduler.transfer import HostTier

AMPLE = HostTier(pages=100, staging=100)
TEXT = [1] * 21
"""With three tokens of output, 23 are computed: five full pages and one of three tokens."""
LONGER = [*TEXT, *complete(TEXT, 3)]


def loop_of(strategy="infercept", host=AMPLE, pages=40, **more) -> Loop:
    return Loop(make("program-fcfs", strategy, num_pages=pages + 1, host=host, **more))


def serve(loop, name, prompt, count=1, **more):
    request = loop.scheduler.submit(prompt, count, program=name, now=loop.now, **more)
    loop.drain()
    loop.scheduler.check()
    assert request.output == complete(list(prompt), count)
    return request
