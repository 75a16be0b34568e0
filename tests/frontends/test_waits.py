"""What programs wait for is remembered within bounds."""

from __future__ import annotations

from astraea_jax.frontends.waits import MAX_OWNERS, MAX_WAITS, Waiting, Waits
from astraea_jax.scheduler.wait import Wait


def waiting(program: str, session: str | None = None, *calls: str) -> Waiting:
    return Waiting(program, session, Wait(("tool",)), frozenset(calls))


def test_programs_are_found_by_their_session_or_by_a_call():
    waits = Waits()
    one, two = waiting("s", "s", "a"), waiting("s/2", "s", "b")
    for each in (one, two):
        waits.begin("owner", each)
    assert waits.find("owner", "s") == [one, two]
    assert waits.find("owner", "s/2") == [two]
    assert waits.find("owner", None, ["b", "x"]) == [two]
    assert waits.find("owner", "s", ["a"]) == [one]
    assert waits.find("owner", None) == waits.find("owner", "t") == waits.find("other", "s", ["a"]) == []
    assert waits.end("owner", "s") == one
    assert waits.end("owner", "s") is waits.end("other", "s") is None
    assert waits.find("owner", "s") == [two]


def test_the_longest_ago_are_forgotten():
    waits = Waits()
    for i in range(MAX_WAITS + 1):
        waits.begin("owner", waiting(str(i), str(i)))
    assert not waits.find("owner", "0")
    assert waits.find("owner", "1")
    for i in range(MAX_OWNERS):
        waits.begin(str(i), waiting("p", "p"))
    assert not waits.find("owner", "1")
    assert waits.find("0", "p")
