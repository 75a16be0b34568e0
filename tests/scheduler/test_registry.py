"""The table of programs: keys that never meet, and who makes room when it is full."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.loop import Loop, make

from astraea_jax.scheduler.program import Program, QueueFull, Rejected
from astraea_jax.scheduler.registry import IdlePrograms
from astraea_jax.scheduler.wait import Wait


def wait(loop: Loop, key, owner="") -> None:
    """A program begins, and waits for its tool."""
    loop.scheduler.submit([1, 2, 3], 1, program=key, owner=owner, now=loop.now)
    loop.drain()
    loop.scheduler.check()


@pytest.mark.parametrize("key", ["#1", "#2", "1", "", 1, 2, ("", "#2"), ("", None), b"#2", frozenset()])
def test_no_key_meets_a_program_without_one(key):
    loop = Loop(make(num_pages=60))
    anonymous = loop.scheduler.submit([1, 2], 30, now=0)
    other = loop.scheduler.submit([1, 2], 30, now=0)
    named = loop.scheduler.submit([1, 2], 30, program=key, now=0)
    assert loop.scheduler.end_program(key, 0) is named
    assert loop.scheduler.end_program(key, 0) is None
    loop.scheduler.waits(key, Wait(("t",)), 0)
    loop.drain()
    assert [s.finish_reason for s in (anonymous, other, named)] == ["length", "length", "cancelled"]
    loop.scheduler.check()


def test_equal_sessions_of_two_owners_are_two_programs():
    loop = Loop(make(num_pages=60))
    wait(loop, ("a", "main"), "a")
    second = loop.scheduler.submit([1, 2, 3], 5, program=("b", "main"), owner="b", salt=b"b", now=loop.now)
    loop.scheduler.end_program(("a", "main"), loop.now)
    loop.drain()
    assert second.finish_reason == "length"
    assert loop.scheduler.stats().programs == 1


def test_messages_do_not_show_keys_or_owners():
    loop = Loop(make())
    key = ("secret-tenant", "secret-session")
    loop.scheduler.submit([1], 1, program=key, owner="secret-tenant", now=0)
    with pytest.raises(QueueFull, match=r"^this session has a request in progress; try again when it has ended$"):
        loop.scheduler.submit([1], 1, program=key, owner="other", now=0)
    loop.drain()
    with pytest.raises(Rejected) as error:
        loop.scheduler.submit([1], 1, program=key, salt=b"another", now=loop.now)
    assert "secret" not in str(error.value)


def test_who_holds_most_programs_makes_room():
    loop = Loop(make(num_pages=60, max_programs=8))
    wait(loop, "victim", "modest")
    for i in range(50):
        wait(loop, i, "greedy")
    find = loop.scheduler._programs.find
    assert find("victim") is not None
    assert [i for i in range(50) if find(i)] == list(range(43, 50))  # of the greedy one those idle longest have gone
    wait(loop, "second", "modest")
    assert find("victim") is not None
    assert find(43) is None


def test_programs_without_key_are_bounded_like_others():
    scheduler = make(max_programs=2)
    for _ in range(2):
        scheduler.submit([1], 1, now=0)
    with pytest.raises(QueueFull, match="2 programs are live"):
        scheduler.submit([1], 1, now=0)
    scheduler.check()


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 20)), max_size=200))
def test_the_largest_owner_is_found_whatever_comes_and_goes(events):
    idle, programs, order = IdlePrograms(), [Program(n, 0.0, owner=n % 4) for n in range(21)], []
    for add, n in events:
        program = programs[n]
        if add and program not in order:
            idle.add(program)
            order.append(program)
        elif not add:
            idle.discard(program)
            order = [p for p in order if p is not program]
        idle.check()
        assert list(idle) == order
        if order:
            counts = Counter(p.owner for p in order)
            found = idle.of_largest_owner()
            assert counts[found.owner] == max(counts.values())
            assert found is next(p for p in order if p.owner == found.owner)
            assert idle.longest() is order[0]
