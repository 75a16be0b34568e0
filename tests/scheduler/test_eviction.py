"""Whose KV goes first: a human's, then the least recently used, and what clients have asked to keep last."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.device import complete
from support.loop import Loop, make

from astraea_jax.scheduler.eviction import EvictionOrder
from astraea_jax.scheduler.program import Program
from astraea_jax.scheduler.transfer import HostCopy, HostPages, HostTier
from astraea_jax.scheduler.wait import Wait

SHELL, HUMAN, KEPT = Wait(("shell",)), Wait(), Wait(("shell",), keep_s=100.0)
HOST = HostTier(pages=100, staging=100)


def serve(loop, name, prompt, wait=None, count=1, **more):
    request = loop.scheduler.submit(prompt, count, program=name, now=loop.now, **more)
    loop.drain()
    if wait is not None:
        loop.scheduler.waits(name, wait, loop.now)
    loop.scheduler.check()
    assert request.output == complete(list(prompt), count)
    return request


def resumed(loop, name, number, size=13):
    """Where the KV of a program comes from, of which nothing has changed."""
    prompt = [number] * size + complete([number] * size, 1)
    request = serve(loop, name, prompt, count=1)
    assert request.cached_tokens == request.resumed.device_tokens + request.resumed.host_tokens
    return request.resumed


@pytest.mark.parametrize("host", [HostTier(), HOST], ids=["no host", "host"])
def test_a_human_s_kv_goes_first(host):
    loop = Loop(make("astraea", "adaptive", num_pages=17, host=host))
    for number, wait in enumerate((SHELL, SHELL, HUMAN, SHELL)):  # four pages each
        serve(loop, number, [number] * 13, wait)
    serve(loop, None, [9] * 13)  # needs four
    assert loop.scheduler.stats().in_human_wait == 1
    sources = [resumed(loop, number, number).source for number in (0, 1, 3)]
    assert sources == ["device"] * 3
    human = resumed(loop, 2, 2)
    assert human.source == ("host" if host.pages else "recomputed")
    assert human.why == ("" if host.pages else "evicted")


def test_what_is_kept_on_request_goes_last_and_no_longer_than_asked():
    loop = Loop(make("astraea", "adaptive", num_pages=17))
    for number, wait in enumerate((KEPT, SHELL, SHELL, SHELL)):
        serve(loop, number, [number] * 13, wait)
    serve(loop, None, [9] * 13)
    assert resumed(loop, 0, 0).source == "device"
    assert resumed(loop, 1, 1).source == "recomputed"


def test_a_lease_ends():
    loop = Loop(make("astraea", "adaptive", num_pages=17))
    serve(loop, 0, [0] * 13, KEPT)
    loop.now += 101.0
    for number in (1, 2, 3):
        serve(loop, number, [number] * 13, SHELL)
    (order,) = loop.scheduler._residency._order.of.values()
    assert list(order.all)[-1].key == 3
    serve(loop, None, [9] * 13)
    assert resumed(loop, 0, 0).source == "recomputed"


def test_leases_delay_nobody():
    """All that clients have asked to keep is given up for a request that needs it."""
    loop = Loop(make("astraea", "adaptive", num_pages=17))
    for number in range(4):
        serve(loop, number, [number] * 13, KEPT, owner=number)
    large = serve(loop, None, [9] * 44, count=4)
    assert large.finish_reason == "length"


def test_an_owner_s_leases_are_bounded_and_say_so():
    loop = Loop(make("astraea", "adaptive", num_pages=17))
    outcomes = []
    for number in range(4):
        serve(loop, number, [number] * 13, KEPT, owner="greedy")
    for number in range(4):
        outcomes.append(serve(loop, number, [number] * 13 + complete([number] * 13, 1)).wait.leased)
    assert outcomes == ["accepted", "ignored", "ignored", "ignored"]  # four of sixteen pages


@pytest.mark.parametrize(
    ("change", "source", "why"),
    [
        (lambda text: text, "device", ""),
        (lambda text: text[:9], "device", ""),
        (lambda text: [*text[:11], 7], "device", ""),  # not a page
        (lambda text: [*text[:3], 7, *text[4:]], "recomputed", "prefix differs"),
        (lambda text: [7, 7], "device", ""),
        (lambda text: [7, *text], "recomputed", "prefix differs"),
    ],
)
def test_a_prompt_that_begins_differently_says_so(change, source, why):
    loop = Loop(make(num_pages=40))
    first = serve(loop, "p", [1] * 13, SHELL, count=3)
    assert first.resumed.source == "new"
    back = serve(loop, "p", change([*first.prompt, *first.output]))
    assert (back.resumed.source, back.resumed.why) == (source, why)
    resumes = {what: n for what, n in loop.scheduler.stats().decisions.items() if what.startswith("resume")}
    assert resumes == {f"resume: {source}, {why}" if why else f"resume: {source}": 1}


def test_kv_that_its_strategy_discards_says_so():
    loop = Loop(make("fcfs", "always-discard", num_pages=40))
    serve(loop, 1, [1] * 13, SHELL)
    assert resumed(loop, 1, 1).why == "discarded"


def test_kv_whose_way_back_fails_says_so():
    loop = Loop(make("program-fcfs", "infercept", num_pages=13, host=HOST))
    serve(loop, 1, [1] * 21)
    serve(loop, None, [2] * 40)
    loop.faults = 1
    back = resumed(loop, 1, 1, 21)
    assert (back.source, back.why) == ("recomputed", "failed")


def test_a_new_program_finds_what_others_have_computed():
    loop = Loop(make(num_pages=40))
    serve(loop, 1, [1] * 13, salt=b"s")
    other = serve(loop, 2, [1] * 13, salt=b"s")
    assert (other.resumed.source, other.resumed.device_tokens, other.resumed.recomputed_tokens) == ("new", 12, 0)


@given(st.lists(st.tuples(st.integers(0, 7), st.sampled_from(["add", "discard", "front", "aside", "copy", 0, 1, 2]))))
def test_every_page_is_found_whatever_comes_and_goes(events):
    order, programs = EvictionOrder(), [Program(n, 0.0, tenant=n % 3) for n in range(8)]
    for number, event in events:
        program = programs[number]
        if event == "add":
            program.pages = [1, 2, 3]
            order.add(program)
        elif event == "discard":
            program.pages = []
            order.discard(program)
        elif event == "aside" and program.pages:
            order.set_aside(program)
        elif event == "front":
            order.put_first(program)
        elif event == "copy":
            program.copies = [] if program.copies else [HostCopy(1, 2, HostPages(2))]
            order.recount(program)
        elif isinstance(event, int):
            order.move(program, event)
        order.check(programs)
        for of in order.of.values():
            tiers = [program.tier for program in of.all]
            assert tiers == sorted(tiers)
    for keep in programs:
        for of in list(order.of.values()):
            for clean in (True, False):
                assert keep not in evict_all(order, of.oldest(clean=clean, keep=keep))
    order.check(programs)
    assert not any(program in order for program in programs)


def evict_all(order, programs):
    found = []
    for program in programs:
        found.append(program)
        program.pages = []
        order.discard(program)
    return found
