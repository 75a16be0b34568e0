"""Tests of forks, and of what is held, on a device that notices every misplaced page."""

from __future__ import annotations

import contextlib
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.branches import AMPLE, LONGER, TEXT, loop_of, serve
from support.device import complete
from support.loop import Loop, make

from astraea_jax.scheduler.policies import SERVING
from astraea_jax.scheduler.prefix import salted
from astraea_jax.scheduler.program import QueueFull, Rejected, Request
from astraea_jax.scheduler.transfer import HostTier
from astraea_jax.scheduler.windows import Window

# -- forks -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", ["parent", "child"])
@pytest.mark.parametrize("salt", [None, salted("")])
def test_a_fork_shares_every_page(first, salt):
    loop = loop_of()
    serve(loop, "parent", TEXT, 3, salt=salt)
    held = loop.scheduler.stats().retained_pages
    loop.scheduler.branches.fork("parent", "child", now=loop.now)
    loop.scheduler.check()
    stats = loop.scheduler.stats()
    assert stats.retained_pages == held == 6
    assert (stats.programs, stats.sessions, stats.created) == (2, 2, 2)
    other = {"parent": "child", "child": "parent"}[first]
    # The last page, which is not full, is left to whoever does not go on; then the other has it to itself.
    assert serve(loop, first, [*LONGER, 5, 6], 2, salt=salt).cached_tokens == 20
    assert serve(loop, other, [*LONGER, 7], 2, salt=salt).cached_tokens == 23


@pytest.mark.parametrize(("shared", "cached"), [(21, 20), (10, 8), (0, 0)])
def test_a_child_begins_with_what_its_parent_has_of_its_prompt(shared, cached):
    """Nothing else is kept for it, and it starts though the pool holds only its prompt and the parent's."""
    loop = loop_of(pages=16)
    serve(loop, "parent", TEXT, 3)
    request = serve(loop, "child", [*TEXT[:shared], *[8] * (39 - shared)], 1, parent="parent")
    assert request.cached_tokens == cached


def test_a_fork_of_a_program_on_the_host_shares_its_copies():
    loop = loop_of(pages=12)
    serve(loop, "parent", TEXT, 3)
    serve(loop, None, [2] * 40, 1)  # needs ten of twelve pages: four of the parent's go to the host
    before = loop.scheduler.stats()
    assert before.host_pages > 0
    loop.scheduler.branches.fork("parent", "child", now=loop.now)
    loop.scheduler.check()
    assert loop.scheduler.stats().host_pages == before.host_pages
    loop.scheduler.end_program("parent", loop.now)
    assert serve(loop, "child", [*LONGER, 5], 2).cached_tokens == 23
    assert loop.scheduler.stats().recomputed_tokens == 0
    loop.scheduler.end_program("child", loop.now)
    loop.turn()
    assert loop.scheduler.stats().host_pages == 0
    assert not loop.device.host


def test_a_copy_on_its_way_to_the_host_is_not_shared():
    loop = loop_of(pages=12)
    loop.delay = 1000
    serve_parent = loop.scheduler.submit(TEXT, 3, program="parent", now=loop.now)
    while serve_parent.finish_reason is None:
        loop.turn()
    other = loop.scheduler.submit([2] * 40, 1, now=loop.now)
    while other.finish_reason is None:
        loop.turn()
    loop.scheduler.branches.fork("parent", "child", now=loop.now)
    loop.scheduler.check()
    loop.delay, loop.faults = 0, 1
    loop.now += 1000
    loop.drain()  # the copy has failed
    for name in ("child", "parent"):
        assert serve(loop, name, [*LONGER, 5], 2).cached_tokens < 23


def test_under_pressure_one_of_those_that_share_goes_to_the_host():
    loop = loop_of(pages=12)
    serve(loop, "parent", TEXT, 3)
    loop.scheduler.branches.fork("parent", "child", now=loop.now)
    serve(loop, None, [2] * 40, 1)
    stats = loop.scheduler.stats()
    assert stats.offloaded_pages > 0
    cached = [serve(loop, name, [*LONGER, 5], 2).cached_tokens for name in ("child", "parent")]
    assert max(cached) == 23


def test_a_fork_while_the_program_runs_shares_what_is_computed():
    loop = loop_of()
    parent = loop.scheduler.submit(TEXT, 20, program="parent", now=loop.now)
    while len(parent.output) < 5:
        loop.turn()
    loop.scheduler.branches.fork("parent", "child", now=loop.now)
    loop.scheduler.check()
    child = loop.scheduler.submit([*TEXT, *parent.output[:4], 9], 3, program="child", now=loop.now)
    loop.drain()
    loop.scheduler.check()
    assert child.cached_tokens == 24
    assert parent.output == complete(TEXT, 20)
    assert child.output == complete(list(child.prompt), 3)


def test_a_fork_while_kv_comes_back_shares_what_has_arrived_and_the_copies():
    loop = loop_of(pages=12)
    serve(loop, "parent", TEXT, 3)
    serve(loop, None, [2] * 40, 1)
    loop.delay = 3
    back = loop.scheduler.submit([*LONGER, 5], 2, program="parent", now=loop.now)
    loop.turn()
    assert back.loading is not None
    loop.scheduler.branches.fork("parent", "child", now=loop.now)
    loop.scheduler.check()
    loop.drain()
    assert serve(loop, "child", [*LONGER, 6], 2).cached_tokens == 23
    assert back.output == complete([*LONGER, 5], 2)


def test_a_fork_of_a_program_that_has_not_started_shares_nothing():
    loop = loop_of()
    parent = loop.scheduler.submit(TEXT, 3, program="parent", now=loop.now)
    loop.scheduler.branches.fork("parent", "child", now=loop.now)
    loop.scheduler.check()
    loop.scheduler.finish(parent, "cancelled", loop.now)
    assert serve(loop, "child", TEXT, 3).cached_tokens == 0


def test_forks_of_forks_end_in_any_order():
    loop = loop_of()
    serve(loop, "a", TEXT, 3)
    loop.scheduler.branches.fork("a", "b", now=loop.now)
    loop.scheduler.branches.fork("b", "c", now=loop.now)
    loop.scheduler.end_program("a", loop.now)
    assert serve(loop, "c", [*LONGER, 5], 3).cached_tokens == 20
    loop.scheduler.branches.fork("c", "d", now=loop.now)
    loop.scheduler.end_program("c", loop.now)
    assert serve(loop, "b", [*LONGER, 6], 2).cached_tokens == 23
    assert serve(loop, "d", [*LONGER, 5, *complete([*LONGER, 5], 3), 7], 1).cached_tokens == 27
    for name in ("b", "d"):
        loop.scheduler.end_program(name, loop.now)
    loop.scheduler.check()
    assert loop.scheduler.stats().free_pages == 40


def test_what_cannot_be_forked_is_refused():
    loop = loop_of(max_programs=3, session_ttl_s=60)
    fork = loop.scheduler.branches.fork
    with pytest.raises(Rejected, match="has expired"):
        fork("parent", "child", now=loop.now)
    serve(loop, "parent", TEXT, 3)
    fork("parent", "child", now=loop.now)
    with pytest.raises(Rejected, match="name already"):
        fork("parent", "child", now=loop.now)
    with pytest.raises(Rejected, match="name already"):
        fork("parent", "parent", now=loop.now)
    fork("parent", "third", now=loop.now)
    fork("parent", "fourth", now=loop.now)  # the longest idle makes room, but never the parent
    assert loop.scheduler.stats().expired == 1
    with pytest.raises(Rejected, match="has expired"):
        fork("child", "fifth", now=loop.now)
    loop.scheduler.check()
    loop.now += 100
    loop.turn()
    with pytest.raises(Rejected, match="has expired"):
        fork("parent", "sixth", now=loop.now)
    assert loop.scheduler.stats().programs == 0


def test_a_full_table_with_nobody_idle_but_the_parent_forks_nothing():
    loop = loop_of(max_programs=2)
    serve(loop, "parent", TEXT, 3)
    loop.scheduler.submit(TEXT, 3, program="other", now=loop.now)
    with pytest.raises(QueueFull, match="2 programs are live"):
        loop.scheduler.branches.fork("parent", "child", now=loop.now)
    loop.scheduler.check()


def test_a_fork_has_waited_for_no_tool():
    loop = loop_of()
    serve(loop, "parent", TEXT, 3)
    loop.scheduler.branches.fork("parent", "child", now=loop.now)
    loop.now += 50
    serve(loop, "child", [*LONGER, 5], 1)
    assert sum(loop.scheduler._policy.predict.waits.tools.seconds.counts) == 0


# -- what is held ------------------------------------------------------------------------------------------------


def held(loop, prompt, **more):
    return tuple(loop.scheduler.branches.held(prompt, **more))


def test_what_is_held_is_what_the_next_request_finds():
    loop = loop_of(pages=12)
    serve(loop, "p", TEXT, 3, salt=salted(""))
    prompt = [*LONGER, 5]
    assert held(loop, prompt, program="p", salt=salted("")) == (25, 24, 23, 0)
    assert held(loop, [*TEXT[:10], 5], program="p", salt=salted("")) == (11, 10, 10, 0)
    assert held(loop, prompt, salt=salted("")) == (25, 0, 20, 0)  # full pages are found by anybody of that salt
    assert held(loop, prompt, salt=salted("b")) == held(loop, prompt, program="p", salt=salted("b")) == (25, 0, 0, 0)
    serve(loop, None, [2] * 40, 1)
    moved = held(loop, prompt, program="p", salt=salted(""))
    assert moved[:2] == (25, 24)
    assert moved[3] > 0
    assert moved[2] + moved[3] == 23
    back = serve(loop, "p", prompt, 2, salt=salted(""))
    assert back.cached_tokens == 23


def test_what_is_held_of_a_program_that_runs_is_what_anybody_finds():
    loop = loop_of()
    loop.scheduler.submit(TEXT, 9, program="p", salt=salted(""), now=loop.now)
    loop.turn()
    loop.turn()
    assert held(loop, TEXT, program="p", salt=salted("")) == (21, 0, 20, 0)


# -- at random ---------------------------------------------------------------------------------------------------


class Families:
    """Sessions that fork, replace their tails, go on and end, in an order drawn by a seed, on a pool too small."""

    def __init__(self, seed: int):
        self.rng = rng = random.Random(seed)
        host = rng.choice([HostTier(), HostTier(pages=12, staging=4), AMPLE])
        policy, strategy = rng.choice(SERVING), rng.choice(["infercept", "adaptive", "always-offload", "always-keep"])
        sizes: dict[str, Any] = {
            "max_seqs": 3,
            "max_step_tokens": rng.choice([4, 12, 40]),
            "max_programs": rng.choice([6, 40]),
        }
        if rng.random() < 0.5:
            sizes["window"] = Window(rng.choice([1, 4, 6, 13]), 1 + rng.randint(1, 3) * 5 + 10)
        self.loop = Loop(make(policy, strategy, num_pages=rng.randint(14, 30), host=host, **sizes))
        self.loop.delay = rng.choice([0, 0, 3])
        self.scheduler, self.branches = self.loop.scheduler, self.loop.scheduler.branches
        self.salt = rng.choice([None, salted("")])
        self.texts: dict[str, list[int]] = {}
        self.running: dict[str, Request] = {}
        self.asked: list[Request] = []

    def turn(self) -> None:
        self.loop.turn()
        for name, request in list(self.running.items()):
            if request.finish_reason is not None:
                del self.running[name]
                self.texts[name] = [*request.prompt, *request.output]

    def act(self) -> None:
        """Do one thing, to a session that exists or not."""
        rng, names = self.rng, list(self.texts)
        name = rng.choice(names) if names and rng.random() < 0.9 else f"s{rng.randrange(99)}"
        text = self.texts.get(name, [])
        text = [
            *text[: rng.choice([len(text), rng.randint(0, len(text))])][:36],
            *rng.choices(range(9), k=rng.randint(1, 6)),
        ]
        with contextlib.suppress(Rejected, QueueFull):
            match rng.randrange(10):
                case 0 | 1:
                    child = f"s{rng.randrange(99)}"
                    self.branches.fork(name, child, self.loop.now)
                    self.texts[child] = self.texts[name]
                case 2 | 3 | 4:
                    self.branches.replace_tail(name, text, salt=self.salt, now=self.loop.now)
                    if name not in self.running:
                        self.texts[name] = text
                case 5 if rng.random() < 0.4:
                    self.scheduler.end_program(name, self.loop.now)
                    self.texts.pop(name, None)
                    self.running.pop(name, None)
                case 6 if rng.random() < 0.1:
                    self.loop.lose_device(transfers_end=rng.random() < 0.5)
                case 7 if rng.random() < 0.3:
                    self.loop.faults = 1
                case _:
                    parent = rng.choice(names) if names else None
                    known = {"program": name, "salt": self.salt, "parent": parent, "now": self.loop.now}
                    request = self.scheduler.submit(text, rng.randint(1, 6), **known)
                    self.running[name], self.texts[name] = request, text
                    self.asked.append(request)

    def check(self) -> None:
        self.scheduler.check()
        for request in self.asked:
            assert request.output == complete(list(request.prompt), len(request.output))
        self.asked = [request for request in self.asked if request.finish_reason is None]


@given(seed=st.integers(0, 10**9))
@settings(max_examples=60, deadline=None)
def test_families_get_the_tokens_of_cold_runs_whatever_happens(seed):
    families = Families(seed)
    for _ in range(60):
        families.act()
        families.check()
        for _ in range(families.rng.choice([0, 0, 1, 2, 5])):
            families.turn()
            families.check()
    families.loop.drain()
    families.check()
    assert not families.asked
    for name in list(families.texts):
        families.scheduler.end_program(name, families.loop.now)
    families.check()
    stats = families.scheduler.stats()
    assert (stats.programs, stats.free_pages) == (0, families.scheduler.config.num_pages - 1)
    families.loop.turn()
    families.loop.drain()
    assert not families.loop.device.host
