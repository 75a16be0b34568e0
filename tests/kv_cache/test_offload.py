"""Pages to the host and back, bit for bit, on the CPU's own pinned memory; and what happens when a copy goes wrong."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from astraea_jax.kv_cache.arrays import gather_pages, scatter_pages, write_pages
from astraea_jax.kv_cache.offload import NOWHERE, HostStore, batch_sizes, block_sharding, block_sizes
from astraea_jax.scheduler.program import Program
from astraea_jax.scheduler.transfer import HostCopy, HostPages, Part, Transfer

PAGES, WINDOWS, LAYERS = 64, 10, 2


class Pools:
    """Paged arrays whose every number is different, of layers without a window and of one with a window."""

    groups = (0, 1)

    def __init__(self):
        shape = (PAGES, 2, 2, 4, 8)
        numbers = jnp.arange(LAYERS * np.prod(shape), dtype=jnp.float32).reshape(LAYERS, *shape)
        self.pages = tuple(numbers)
        self.scattered: list[list[int]] = []
        """The sizes of the blocks of each scatter."""

        self.windows = tuple(-numbers[:1, :WINDOWS])

    def gather(self, pages, group):
        return gather_pages(*self._of(group, np.asarray(pages)))

    def scatter(self, blocks, pages, group):
        self.scattered.append([len(block) for block in blocks])
        written = scatter_pages(self._of(group)[0], jnp.concatenate(blocks), pages, (PAGES, WINDOWS)[group])
        if group:
            self.windows = written
        else:
            self.pages = written

    def _of(self, group, *pages):
        return (self.windows, *pages, WINDOWS) if group else (self.pages, *pages, PAGES)

    def wipe(self):
        self.pages, self.windows = (
            tuple(jnp.full_like(layer, jnp.nan) for layer in layers) for layers in (self.pages, self.windows)
        )

    def content(self, pages) -> np.ndarray:
        return np.stack([np.asarray(layer[np.asarray(pages)]) for layer in self.pages], axis=1)


def store_of(pools, staging=16, **more) -> HostStore:
    return HostStore(pools, block_sharding(pools.pages[0]), staging, **more)


def offload(program: Program, pages, windows=()) -> Transfer:
    copy = HostCopy(0, len(pages), HostPages(len(pages), len(windows)))
    parts, window_parts = (Part(copy, 0, len(pages)),), (Part(copy, 0, len(windows)),)
    return Transfer(program, tuple(pages), parts, True, 0.0, tuple(windows), window_parts)


def restore(program: Program, pages, parts, windows=(), window_parts=()) -> Transfer:
    return Transfer(program, tuple(pages), tuple(parts), False, 0.0, tuple(windows), tuple(window_parts))


def finish(store: HostStore) -> list[tuple[Transfer, bool]]:
    ended, limit = [], time.monotonic() + 60
    while store.busy:
        ended += store.poll()
        assert time.monotonic() < limit
    return ended


def held_pages(store: HostStore) -> int:
    return sum(len(block) for groups in store._copies.values() for block in groups[0])


def test_blocks_are_powers_of_two():
    assert block_sizes(64) == [64, 32, 16, 8, 4, 2, 1]
    assert block_sizes(1000) == block_sizes(64)
    assert block_sizes(5) == [4, 2, 1]
    assert block_sizes(0) == []
    assert [batch_sizes(most) for most in (1000, 32, 16, 5, 1, 0)] == [[64, 16, 4], [32, 8], [16, 4], [4], [1], []]


@pytest.mark.parametrize("stacked", [False, True])
def test_a_cpu_writes_the_same_pages(stacked):
    """Page by page, where other devices scatter; rows beyond the ids and ids beyond the pool are left out."""
    pools = Pools()
    block = pools.gather([9, 8, 7, 6, 5], 0)
    pages = (jnp.concatenate(pools.pages),) if stacked else pools.pages
    ids = jnp.array([3, NOWHERE, 1, PAGES], jnp.int32)
    for one, other in zip(write_pages(pages, block, ids, PAGES), scatter_pages(pages, block, ids, PAGES), strict=True):
        np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(one[3], pools.pages[0 if stacked else -1][9])
    np.testing.assert_array_equal(one[2], pools.pages[0 if stacked else -1][2])


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_restored_bytes_are_the_offloaded_bytes(data):
    """Any pages, any part of several copies, to any other pages, through any staging."""
    pools, program = Pools(), Program(1, 0.0)
    store = store_of(pools, staging=data.draw(st.sampled_from([1, 4, 16])))
    order = data.draw(st.permutations(range(1, PAGES)))
    first = data.draw(st.integers(1, 20))
    outs = [offload(program, order[:first]), offload(program, order[first : first + 7])]
    expected = pools.content(order[: first + 7])
    store.start(outs, [])
    pools.wipe()  # they may be written again at once
    assert [failed for _, failed in finish(store)] == [False, False]
    assert held_pages(store) == first + 7
    low = data.draw(st.integers(0, first - 1))
    high = data.draw(st.integers(1, 7))
    parts = [Part(outs[0].parts[0].copy, low, first - low), Part(outs[1].parts[0].copy, 0, high)]
    to = order[30 : 30 + first - low + high]
    back = restore(program, to, parts)
    store.start([back], [])
    assert finish(store) == [(back, False)]
    np.testing.assert_array_equal(pools.content(to), expected[low : first + high])
    assert max(map(sum, pools.scattered)) <= store._sizes[0]
    untouched = [page for page in range(PAGES) if page not in to]
    assert np.isnan(pools.content(untouched)).all()
    store.start([], [out.parts[0].copy.memory for out in outs])
    assert held_pages(store) == 0


def test_window_pages_go_with_the_last_pages():
    """They are fewer, and have ids of their own."""
    pools, program = Pools(), Program(1, 0.0)
    store = store_of(pools, staging=4)
    out = offload(program, [3, 4, 5, 6, 7], windows=[2, 9, 5])
    expected = pools.content([4, 5, 6, 7]), np.asarray(pools.windows[0][np.array([9, 5])])
    store.start([out], [])
    pools.wipe()
    assert [failed for _, failed in finish(store)] == [False]
    copy = out.parts[0].copy
    store.start([restore(program, [11, 12, 13, 14], [Part(copy, 1, 4)], [1, 3], [Part(copy, 1, 2)])], [])
    finish(store)
    np.testing.assert_array_equal(pools.content([11, 12, 13, 14]), expected[0])
    np.testing.assert_array_equal(pools.windows[0][np.array([1, 3])], expected[1])


def test_the_comparison_of_bytes_can_fail():
    """A canary: one wrong bit on the host shows."""
    pools, program = Pools(), Program(1, 0.0)
    store = store_of(pools)
    out = offload(program, [3, 4])
    expected = pools.content([3, 4])
    store.start([out], [])
    finish(store)
    (copy,) = store._copies
    block = np.array(store._copies[copy][0][0])
    block.view(np.uint32)[1, 0, 1, 0, 2, 5] ^= 1
    store._copies[copy] = [jax.device_put(block, store._host)], []
    store.start([restore(program, [5, 6], out.parts)], [])
    finish(store)
    assert not np.array_equal(pools.content([5, 6]), expected)
    assert np.array_equal(pools.content([5])[0], expected[0])


def test_what_has_arrived_is_scattered_at_once():
    """Of several copies and programs, and in no more batches than their pages fill."""
    pools, order = Pools(), list(range(1, 59))
    store = store_of(pools, staging=64)
    outs, counts = [], [1, 2, 3, 5, 7, 13]
    for count in counts:
        outs.append(offload(Program(len(outs), 0.0), order[:count]))
        del order[:count]
    store.start(outs, [])
    finish(store)
    expected = pools.content(range(1, 32))
    pools.wipe()
    backs = [restore(out.program, out.pages, out.parts) for out in outs]
    store.start(backs[:4], [])
    jax.block_until_ready([block for moving in store._moving for block, *_ in moving.arriving])
    assert {id(transfer) for transfer, _ in store.poll()} == set(map(id, backs[:4]))
    (sizes,) = pools.scattered
    assert sum(sizes) == sum(counts[:4])
    assert sizes == sorted(sizes, reverse=True)
    store.start([backs[4]], [])
    finish(store)
    store.start([backs[5]], [])
    finish(store)
    np.testing.assert_array_equal(pools.content(range(1, 32)), expected)


def test_a_batch_is_no_larger_than_the_largest_block():
    pools = Pools()
    store = store_of(pools, staging=8)
    outs = [offload(Program(i, 0.0), range(1 + 7 * i, 8 + 7 * i)) for i in range(3)]
    store.start(outs, [])
    finish(store)
    store._staging = 64  # so that all of it may arrive at once
    store.start([restore(out.program, out.pages, out.parts) for out in outs], [])
    jax.block_until_ready([block for moving in store._moving for block, *_ in moving.arriving])
    assert [failed for _, failed in store.poll()] == [False] * 3
    assert [sum(sizes) for sizes in pools.scattered] == [8, 8, 5]


def test_a_restore_begins_before_the_step():
    """Copies are begun when transfers are, not at the next turn: a GPU lets them wait for the steps before them."""
    pools = Pools()
    store = store_of(pools)
    out = offload(Program(1, 0.0), [1, 2, 3])
    store.start([out], [])
    finish(store)
    back = restore(out.program, [4, 5, 6], out.parts)
    store.start([back], [])
    (moving,) = store._moving
    assert [len(pages) for _, pages, _ in moving.arriving] == [2, 1]


def test_what_cannot_be_scattered_fails():
    pools = Pools()
    store = store_of(pools)
    out = offload(Program(1, 0.0), [1, 2, 3])
    store.start([out], [])
    finish(store)

    def scatter(blocks, pages, group):
        raise RuntimeError("INTERNAL")

    pools.scatter = scatter
    back = restore(out.program, [4, 5, 6], out.parts)
    store.start([back], [])
    assert finish(store) == [(back, True)]


def test_a_copy_that_cannot_be_made_fails_alone():
    pools, program = Pools(), Program(1, 0.0)
    calls = []

    def put(block, sharding):
        calls.append(len(block))
        if len(calls) == 2:
            raise RuntimeError("RESOURCE_EXHAUSTED: out of pinned memory")
        return jax.device_put(block, sharding)

    store = store_of(pools, put=put)
    outs = [offload(program, [1]), offload(program, [2]), offload(program, [3])]
    store.start(outs, [])
    assert {id(t): failed for t, failed in finish(store)} == {id(t): i == 1 for i, t in enumerate(outs)}


def test_a_copy_that_fails_on_its_way_is_told():
    class Broken:
        def __init__(self, block):
            self._block = block

        def __len__(self):
            return len(self._block)

        def is_ready(self):
            return True

        def block_until_ready(self):
            raise RuntimeError("DATA_LOSS")

    store = store_of(Pools(), put=lambda block, _: Broken(block))
    store.start([offload(Program(1, 0.0), [1, 2])], [])
    assert [failed for _, failed in finish(store)] == [True]


class Slow:
    """A block on its way to the host until it is told to have arrived."""

    arrived = False

    def __len__(self):
        return 1

    def is_ready(self):
        return self.arrived

    def block_until_ready(self):
        assert self.arrived


def test_a_transfer_that_never_ends_is_given_up(monkeypatch):
    store = store_of(Pools(), put=lambda *_: Slow())
    store.start([offload(Program(1, 0.0), [1])], [])
    assert store.poll() == []
    monkeypatch.setattr("astraea_jax.kv_cache.offload.LIMIT_S", 0.0)
    assert [failed for _, failed in store.poll()] == [True]


def test_a_transfer_behind_others_has_all_its_time(monkeypatch):
    """Only what stands still fails: not what waits its turn, and not what arrives bit by bit."""
    now, blocks = [0.0], []
    monkeypatch.setattr("astraea_jax.kv_cache.offload.time.monotonic", lambda: now[0])

    def put(*_):
        blocks.append(Slow())
        return blocks[-1]

    store = store_of(Pools(), put=put)
    store.start([offload(Program(i, 0.0), [1, 2, 4]) for i in range(2)], [])  # two blocks each
    for block in blocks:
        now[0] += 20.0
        assert store.poll() == []
        block.arrived = True
        ended = store.poll()
        assert [failed for _, failed in ended] == [False] * len(ended)
    assert not store.busy


def test_a_lost_copy_fails_the_restore():
    program = Program(1, 0.0)
    store = store_of(Pools())
    back = restore(program, [1], [Part(HostCopy(0, 1, HostPages(1)), 0, 1)])
    store.start([back], [])
    assert finish(store) == [(back, True)]


def test_what_nobody_wants_any_more_is_not_written():
    pools, program = Pools(), Program(1, 0.0)
    store = store_of(pools)
    out = offload(program, [1, 2])
    store.start([out], [])
    finish(store)
    before = pools.content(range(PAGES))
    back = restore(program, [5, 6], out.parts)
    store.start([back], [])
    back.cancelled = True  # the pages are somebody else's by now
    assert finish(store) == [(back, False)]
    np.testing.assert_array_equal(pools.content(range(PAGES)), before)


def test_pages_sharded_by_heads_keep_their_shards():
    """On eight simulated devices, in a process of its own, because JAX counts its devices once."""
    code = """
        import jax, jax.numpy as jnp, numpy as np, sys
        from jax.sharding import NamedSharding, PartitionSpec as P
        from astraea_jax.kv_cache.offload import block_sharding
        sys.path.insert(0, sys.argv[1])
        import test_offload as t
        mesh = jax.make_mesh((8,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
        pools, program = t.Pools(), t.Program(1, 0.0)
        wide = jnp.concatenate([layer for layer in pools.pages for _ in range(2)], axis=2)  # eight heads
        sharding = NamedSharding(mesh, P(None, None, "model"))
        pools.pages = tuple(jax.device_put(wide + i, sharding) for i in range(2))
        expected = pools.content([1, 2, 3])
        store = t.store_of(pools)
        out = t.offload(program, [1, 2, 3])
        store.start([out], [])
        t.finish(store)
        ((blocks, _),) = store._copies.values()
        assert {b.sharding.memory_kind for b in blocks} == {"pinned_host"}
        assert {len(b.sharding.device_set) for b in blocks} == {8}
        assert {b.addressable_shards[0].data.shape[3] for b in blocks} == {1}
        back = t.restore(program, [7, 8, 9], out.parts)
        store.start([back], [])
        assert t.finish(store) == [(back, False)]
        assert pools.pages[0].sharding.is_equivalent_to(sharding, 5)
        np.testing.assert_array_equal(pools.content([7, 8, 9]), expected)
    """
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", textwrap.dedent(code), os.path.dirname(__file__)]
    done = subprocess.run(command, env={**os.environ, **flags}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
