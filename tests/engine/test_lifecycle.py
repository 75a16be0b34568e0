"""The queue's share per client. States and ends of requests are the state machine's (test_engine_states.py)."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from astraea_jax.engine.lifecycle import RESERVE, Lifecycle
from astraea_jax.errors import Overloaded


def serving(max_queued: int) -> Lifecycle:
    life = Lifecycle(max_queued)
    life.compile()
    life.serve()
    return life


def accepted(life: Lifecycle, owner: str, requests: int) -> list[Any]:
    """Ask so often, and return those that were accepted."""
    taken: list[Any] = []
    for _ in range(requests):
        try:
            life.accept(box := object(), owner)
        except Overloaded:
            continue
        taken.append(box)
    return taken


def test_one_client_cannot_fill_the_queue():
    life = serving(16)
    flood = accepted(life, "one", 100)
    assert len(flood) == 12
    assert [len(accepted(life, owner, 9)) for owner in ("two", "three")] == [1, 1]
    life.started(flood[0])
    life.end(flood[1])
    assert not accepted(life, "one", 9)  # twelve wait, with those of others
    assert len(accepted(life, "four", 9)) == 1
    with pytest.raises(Overloaded, match="13 requests are waiting, 10 of them of this client"):
        life.accept(object(), "one")


def test_the_engines_own_process_may_fill_it():
    assert len(accepted(serving(16), "", 100)) == 16


@given(
    max_queued=st.integers(1, 12),
    calls=st.lists(
        st.tuples(st.sampled_from(["accept", "started", "end"]), st.sampled_from("abc"), st.integers(0, 30))
    ),
)
def test_the_books_agree_with_a_list(max_queued, calls):
    life, open_ = serving(max_queued), {}
    for call, owner, which in calls:
        waiting = [of for of, started in open_.values() if not started]
        if call == "accept":
            boxes = accepted(life, owner, 1)
            reserve = max_queued // RESERVE if owner in waiting else 0
            assert bool(boxes) == (len(waiting) < max_queued - reserve)
            open_.update(dict.fromkeys(boxes, (owner, False)))
        elif open_:
            box = list(open_)[which % len(open_)]
            if call == "started":
                life.started(box)
                open_[box] = open_[box][0], True
            else:
                assert life.end(box)
                assert not life.end(box)
                del open_[box]
        assert life.in_progress == len(open_)
