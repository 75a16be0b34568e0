"""Programs that leave a scheduler, and go on with another one."""

from __future__ import annotations

import pytest
from support.device import complete
from support.loop import Loop, make

from astraea_jax.scheduler.handover import HandOver
from astraea_jax.scheduler.prefix import salted
from astraea_jax.scheduler.program import Rejected
from astraea_jax.scheduler.wait import Wait


def loop_with(*names: str) -> Loop:
    loop = Loop(make(num_pages=41, max_seqs=4))
    for i, name in enumerate(names):
        loop.scheduler.submit([i + 1] * 6, 4, program=name, salt=salted("s"), now=loop.now)
        loop.drain()
        loop.now += 1
    return loop


def test_a_program_goes_on_elsewhere_with_its_tokens_computed_ahead():
    here, there = loop_with("a", "b"), Loop(make(num_pages=41, max_seqs=4))
    [handed] = here.scheduler.branches.hand_over(1)
    text = [2] * 6 + complete([2] * 6, 4)
    assert handed == HandOver("b", "", salted("s"), tuple(text)), "the one whose wait began last"
    assert not here.scheduler.knows("b")
    stats = here.scheduler.stats()
    assert (stats.programs, stats.moved, stats.created) == (1, 1, 2)
    there.scheduler.branches.take_over(handed, there.now)
    assert there.scheduler.report(there.now).live == len(text)
    there.drain()
    request = there.scheduler.submit([*text, 3], 2, program="b", salt=salted("s"), now=there.now)
    there.drain()
    assert request.cached_tokens == len(text) - 1, "all but the last, which is never computed ahead"
    assert request.output == complete([*text, 3], 2)
    assert request.wait is None, "nobody knows how long it has waited"
    for loop in (here, there):
        loop.scheduler.check()


def test_nothing_is_learned_from_programs_that_leave():
    loop = loop_with("a", "b")
    before = loop.scheduler._policy.predict.turns.values[:]
    loop.scheduler.waits("a", Wait(("look",)), loop.now)
    assert len(loop.scheduler.branches.hand_over(5)) == 2
    assert loop.scheduler._policy.predict.turns.values == before


def test_only_those_asked_for_leave_and_only_while_they_wait():
    loop = loop_with("a", "b", "c")
    loop.scheduler.submit([9] * 4, 8, program="c", salt=salted("s"), now=loop.now)
    handed = loop.scheduler.branches.hand_over(9, ["c", "a", "a", "nobody"])
    assert [one.key for one in handed] == ["a"]
    assert loop.scheduler.knows("b")
    assert loop.scheduler.knows("c")
    assert loop.scheduler.branches.hand_over(0) == []


def test_a_session_that_has_come_back_meanwhile_is_not_opened_twice():
    loop = loop_with("a")
    with pytest.raises(Rejected, match="of that name already"):
        loop.scheduler.branches.take_over(HandOver("a", "", None, (1, 2)), loop.now)
    for tokens in ((), (1,) * 1000):
        with pytest.raises(Rejected):
            loop.scheduler.branches.take_over(HandOver("b", "", None, tokens), loop.now)
    loop.scheduler.check()


def test_a_tail_that_is_replaced_is_what_goes():
    loop = loop_with("a")
    tail = [1] * 3 + [8] * 5
    loop.scheduler.branches.replace_tail("a", tail, salt=salted("s"), now=loop.now)
    [handed] = loop.scheduler.branches.hand_over(1)
    assert handed.tokens == tuple(tail)
    assert [request.finish_reason for request in loop.scheduler.branches.take_prepared()] == ["cancelled"]


def test_a_program_that_has_been_taken_over_can_leave_again_at_once():
    loop = Loop(make(num_pages=41, max_seqs=4))
    handed = HandOver("a", "o", salted(""), (1, 2, 3), "parent")
    loop.scheduler.branches.take_over(handed, loop.now)
    assert loop.scheduler.branches.hand_over(1) == [handed]
    loop.scheduler.check()
