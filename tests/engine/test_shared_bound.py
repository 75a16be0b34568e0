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


def test_a_refusal_does_not_name_the_owner():
    """Its name has the cache salt in it, which a gateway may have set, and which its clients must not learn."""
    bound, owner = SharedBound(12), "salt:secret"
    bound.add(owner, 8)
    bound.add("other", 2)
    refusals = {amount: bound.refusal(owner, amount, "requests") for amount in (1, 5)}
    assert refusals == {
        1: "this tenant has 8 requests waiting, of 4 allowed; 10 wait in all; try again later",
        5: "10 requests are waiting, of 12 allowed in all; this tenant has 8 of them; try again later",
    }
