"""The log of cached blocks: whoever hears all of it knows what the device and the host hold."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.device import complete
from support.kv_listener import Listener, Truth
from support.loop import Loop, make

from astraea_jax.scheduler.kv_log import Cleared, Removed, Stored
from astraea_jax.scheduler.prefix import hash_blocks, salted
from astraea_jax.scheduler.program import QueueFull, Rejected
from astraea_jax.scheduler.transfer import HostTier
from astraea_jax.scheduler.wait import DEVICE, HOST
from astraea_jax.scheduler.windows import Window

SALT = salted("")


class Agents:
    """Agents that return, part from what they have said, fork and vanish, on pools too small for them."""

    def __init__(self, seed: int, window: Window | None):
        self.rng = random.Random(seed)
        host = HostTier(pages=30, staging=9, layers=(1, 2) if window else (1, 0))
        strategy = self.rng.choice(["infercept", "always-offload", "adaptive"])
        self.scheduler = make("program-fcfs", strategy, num_pages=33, host=host, window=window, kv_events=True)
        self.loop, self.listener, self.truth = Loop(self.scheduler), Listener(), Truth(self.scheduler)
        self.texts: dict[str, list[int]] = {}
        self.heard = {Stored: 0, Removed: 0, Cleared: 0}

    def act(self) -> None:
        rng, scheduler, now = self.rng, self.scheduler, self.loop.now
        self.loop.delay, self.loop.faults = rng.choice([0, 0, 2]), int(rng.random() < 0.1)
        name = f"s{rng.randrange(6)}"
        action = rng.choices(["ask", "fork", "prepare", "end", "lose"], [12, 2, 2, 1, 0.3])[0]
        try:
            if action == "ask":
                self.ask(name)
            elif action == "fork":
                child = f"s{rng.randrange(6)}"
                scheduler.branches.fork(name, child, now)
                self.texts[child] = self.texts[name]
            elif action == "prepare":
                scheduler.branches.replace_tail(name, [*self.texts[name][:20], *range(9)], salt=SALT, now=now)
            elif action == "end":
                scheduler.end_program(name, now)
        except (Rejected, QueueFull, KeyError):
            return
        if action == "lose":
            self.loop.lose_device(transfers_end=rng.random() < 0.5)
        for _ in range(rng.randrange(8)):
            self.loop.turn()

    def ask(self, name: str) -> None:
        text = self.texts.get(name, [])
        kept = text[: self.rng.choice([len(text), len(text), self.rng.randrange(len(text) + 1)])]
        new = [self.rng.randrange(3) for _ in range(self.rng.randrange(1, 14))]
        prompt = (kept + new)[-38:] if len(kept) > 30 else kept + new
        self.scheduler.submit(prompt, 5, program=name, salt=SALT, now=self.loop.now)
        self.texts[name] = [*prompt, *complete(prompt, 5)]

    def compare(self) -> None:
        self.scheduler.check()
        self.scheduler.branches.take_prepared()
        records = self.scheduler.kv_log.take()
        for record in records:
            self.heard[type(record)] += len(record)
        self.listener.hear(records)
        assert self.listener.tiers == self.truth.tiers()


@pytest.mark.parametrize("window", [None, Window(5, 24)])
@settings(max_examples=30)
@given(seed=st.integers(0, 2**32))
def test_who_listens_knows_what_both_tiers_hold(window, seed):
    agents = Agents(seed, window)
    for _ in range(80):
        agents.act()
        agents.compare()
    late = Listener()
    agents.scheduler.kv_log.retell()
    late.hear(agents.scheduler.kv_log.take())
    assert late.tiers == agents.listener.tiers


def served(loop, name, prompt, count=1, **more):
    request = loop.scheduler.submit(prompt, count, program=name, salt=SALT, now=loop.now, **more)
    loop.drain()
    return request


def told(loop):
    return loop.scheduler.kv_log.take()


def loop_of(pages=13, **more) -> Loop:
    return Loop(make("program-fcfs", "infercept", num_pages=pages, kv_events=True, **more))


def test_a_block_has_its_tokens_its_parent_and_its_session():
    loop = loop_of()
    prompt = list(range(10, 19))
    served(loop, "a", prompt)  # nine tokens, of which the last fills nothing
    [stored] = told(loop)
    first, second = hash_blocks(np.array(prompt, np.int32), 4, SALT)
    assert (stored.tier, [block.hash for block in stored.blocks]) == (DEVICE, [first, second])
    assert [block.parent for block in stored.blocks] == [None, first]
    assert [np.frombuffer(block.tokens, np.int32).tolist() for block in stored.blocks] == [prompt[:4], prompt[4:8]]
    assert {(block.salt, block.session) for block in stored.blocks} == {(SALT, "a")}


def test_what_is_found_again_is_not_told_again():
    loop = loop_of()
    served(loop, "a", [1] * 9)
    told(loop)
    served(loop, "b", [1] * 9 + [2] * 4)
    [stored] = told(loop)
    assert len(stored.blocks) == 1


def test_programs_that_share_with_nobody_are_not_told():
    loop = loop_of()
    loop.scheduler.submit([1] * 9, 5, program="a", now=0)
    loop.drain()
    assert told(loop) == []


def test_a_block_goes_when_its_page_is_needed():
    loop = loop_of()
    served(loop, "a", [1] * 9, final=True)
    told(loop)
    loop.scheduler.submit([2] * 45, 1, now=loop.now)
    loop.drain()
    [removed] = told(loop)
    assert (removed.tier, {*removed.hashes}) == (DEVICE, {*hash_blocks(np.full(8, 1, np.int32), 4, SALT)})


def test_a_copy_counts_when_it_has_arrived_and_while_it_has_whole_blocks():
    loop = loop_of(host=HostTier(pages=100, staging=100))
    first = served(loop, "a", [1] * 21, 3)  # 23 tokens are computed: five blocks and a part of the sixth page
    told(loop)
    loop.delay = 4
    loop.scheduler.submit([2] * 40, 1, now=loop.now)
    loop.turn()
    assert HOST not in [record.tier for record in told(loop)]
    loop.drain()
    stored = [record for record in told(loop) if record.tier == HOST]
    assert [len(record) for record in stored] == [5]
    assert stored[0].blocks[0].session == "a"
    served(loop, "a", [*first.prompt[:9], 5], 1)  # parts in the third page
    removed = [record for record in told(loop) if isinstance(record, Removed) and record.tier == HOST]
    assert sum(map(len, removed)) == 3


def test_copies_that_two_programs_hold_go_with_the_second():
    loop = loop_of(host=HostTier(pages=100, staging=100))
    served(loop, "a", [1] * 21, 3)
    loop.scheduler.submit([2] * 40, 1, now=loop.now)
    loop.drain()
    loop.scheduler.branches.fork("a", "b", loop.now)
    told(loop)
    loop.scheduler.end_program("a", loop.now)
    assert told(loop) == []
    loop.scheduler.end_program("b", loop.now)
    [removed] = told(loop)
    assert (removed.tier, len(removed)) == (HOST, 5)


def test_transfers_that_fail_are_never_told():
    loop = loop_of(host=HostTier(pages=100, staging=100))
    served(loop, "a", [1] * 21, 3)
    told(loop)
    loop.faults = 9
    loop.scheduler.submit([2] * 40, 1, now=loop.now)
    loop.drain()
    assert loop.scheduler.stats().failed_transfers
    assert HOST not in [record.tier for record in told(loop)]


def test_a_lost_device_is_told_as_all_that_is_left():
    loop = Loop(make("program-fcfs", "always-offload", num_pages=41, kv_events=True, host=HostTier(100, 100)))
    served(loop, "a", [1] * 21, 3)
    told(loop)
    loop.lose_device(transfers_end=True)
    cleared, stored = told(loop)
    assert isinstance(cleared, Cleared)
    assert (stored.tier, len(stored)) == (HOST, 5)


def test_what_is_told_anew_has_parents_first_and_chains_together():
    loop = loop_of(60)
    served(loop, "a", [1] * 21)
    served(loop, "b", [1] * 9 + [2] * 12)
    loop.scheduler.kv_log.retell()
    cleared, *stored = told(loop)
    assert isinstance(cleared, Cleared)
    seen: set[bytes] = set()
    for record in stored:
        for block in record.blocks:
            assert block.parent is None or block.parent in seen
            seen.add(block.hash)
    assert (len(seen), len(stored)) == (8, 3)  # the beginning and what each goes on with
