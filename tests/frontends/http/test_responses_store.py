"""Stored responses: apart for each tenant, bounded, and gone after a while."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from astraea_jax.frontends.http.errors import NotFound
from astraea_jax.frontends.http.responses_store import ResponseStore, Stored

OWNERS = st.sampled_from(["a", "b", "c"])
IDS = st.integers(0, 5).map(str)


def stored(size: int) -> Stored:
    items = [{"id": f"item-{i}"} for i in range(size % 5)]
    return Stored({"output": [{"id": f"said-{size}"}]}, (), None, items, min(1, len(items)), size)


class Stores(RuleBasedStateMachine):
    """What a store gives is what was put there last, by the same tenant, not too long ago."""

    def __init__(self):
        super().__init__()
        self.time = 0.0
        self.store = ResponseStore(ttl_s=10.0, max_bytes=160, max_responses=4, now=lambda: self.time)
        self.put_last: dict[tuple[str, str], Stored] = {}
        self.used: dict[tuple[str, str], float] = {}

    @rule(owner=OWNERS, id=IDS, size=st.integers(1, 25))
    def put(self, owner, id, size):
        self.put_last[owner, id] = stored(size)
        self.used[owner, id] = self.time
        self.store.put(owner, id, self.put_last[owner, id])
        if size <= 20:
            assert self.store.get(owner, id) is self.put_last[owner, id]

    @rule(owner=OWNERS, id=IDS)
    def get(self, owner, id):
        try:
            found = self.store.get(owner, id)
        except NotFound:
            return
        assert found is self.put_last[owner, id]
        assert self.time < self.used[owner, id] + 10.0
        self.used[owner, id] = self.time

    @rule(owner=OWNERS, item=st.sampled_from([*(f"item-{i}" for i in range(5)), *(f"said-{i}" for i in range(1, 26))]))
    def quote(self, owner, item):
        """An item is found as long as some response of this tenant has brought it."""
        kept = [stored for (of, _), (until, stored) in self.store._kept.items() if of == owner and until > self.time]
        if any(item == own["id"] for stored in kept for own in stored.own):
            assert self.store.item(owner, item)["id"] == item
            self.used |= {key: self.time for key, (until, _) in self.store._kept.items() if until == self.time + 10.0}
        else:
            with pytest.raises(NotFound, match=item):
                self.store.item(owner, item)

    @rule(owner=OWNERS, id=IDS)
    def delete(self, owner, id):
        try:
            self.store.delete(owner, id)
        except NotFound:
            return
        with pytest.raises(NotFound):
            self.store.get(owner, id)

    @rule(seconds=st.floats(0, 8))
    def wait(self, seconds):
        self.time += seconds

    @invariant()
    def is_bounded(self):
        kept = self.store._kept
        sizes = {owner: [s.size for (o, _), (_, s) in kept.items() if o == owner] for owner in "abc"}
        assert sum(map(sum, sizes.values())) == self.store._bytes <= 160
        assert all(sum(of) <= 20 and len(of) <= 4 for of in sizes.values())
        assert {owner: set(share.items) for owner, share in self.store._tenants.items()} == {
            owner: {item["id"] for (of, _), (_, stored) in kept.items() if of == owner for item in stored.own}
            for owner in {of for of, _ in kept}
        }
        assert [expires for expires, _ in kept.values()] == sorted(expires for expires, _ in kept.values())


TestStores = Stores.TestCase
TestStores.settings = settings(max_examples=60, stateful_step_count=30)


def test_a_tenant_that_stores_much_loses_only_its_own():
    store = ResponseStore(max_responses=2)
    store.put("a", "0", stored(1))
    for i in range(9):
        store.put("b", str(i), stored(1))
    assert store.get("a", "0")
    with pytest.raises(NotFound, match="expired"):
        store.get("b", "6")
