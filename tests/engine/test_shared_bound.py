"""A bound that no client fills alone."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from astraea_jax.engine.shared_bound import RESERVE, SharedBound


@given(
    most=st.integers(1, 60),
    weights=st.dictionaries(st.sampled_from("abc"), st.sampled_from([0.0, 0.5, 2.0])),
    calls=st.lists(st.tuples(st.sampled_from("abcd"), st.integers(1, 20), st.booleans()), max_size=60),
)
def test_counts_stay_within_the_bound_and_leave_a_share_to_each(most, weights, calls):
    bound, counts = SharedBound(most, weights), Counter()
    for owner, amount, goes in calls:
        if goes:
            amount = -min(amount, counts[owner])
        elif not bound.has_room(owner, amount):
            room = most - most // RESERVE if counts[owner] else most
            assert counts.total() + amount > room, "refused although there is room for anybody"
            share = most * weights.get(owner, 1.0)
            others = sum(weights.get(other, 1.0) for other in counts if counts[other])
            assert counts.total() + amount > most or (counts[owner] + amount) * (1 + others) > share
            continue
        bound.add(owner, amount)
        counts[owner] += amount
        assert (bound.total, bound[owner]) == (counts.total(), counts[owner])
        assert bound.total <= most
    bound.clear()
    assert bound.total == bound["a"] == 0


def test_a_refusal_does_not_tell_a_cache_salt():
    bound, owner = SharedBound(12), "salt:secret"
    bound.add(owner, 8)
    bound.add("key:12", 4)
    expected = "12 requests are waiting, of 12 allowed in all; tenant salt:… has 8 of them; try again later"
    assert bound.refusal(owner, 1, "requests") == expected
    assert "tenant key:12 has 4 of them" in bound.refusal("key:12", 1, "requests")


def test_a_refusal_names_what_waits_of_the_tenant_and_how_much_may():
    bound = SharedBound(16, {"b": 3.0})
    bound.add("a", 10)
    bound.add("b", 2)
    assert not bound.has_room("a", 1)
    expected = "tenant a has 10 requests waiting, of 3 allowed; 12 wait in all; try again later"
    assert bound.refusal("a", 1, "requests") == expected
    assert bound.has_room("b", 4)
    bound.add("b", 4)
    expected = "16 requests are waiting, of 16 allowed in all; tenant b has 6 of them; try again later"
    assert bound.refusal("b", 1, "requests") == expected
    assert bound.refusal("", 1, "requests") == "16 requests are waiting, of 16 allowed in all; try again later"
