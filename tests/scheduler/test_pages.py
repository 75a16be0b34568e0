"""The pool of pages: what it gives, and what it notices."""

from __future__ import annotations

import pytest

from astraea_jax.scheduler.pages import PagePool


def test_the_smallest_pool_has_one_page_to_give():
    assert PagePool(2).allocate(1) == [1]
    with pytest.raises(ValueError, match="a pool of 1 pages"):
        PagePool(1)


def test_pages_come_in_order_and_the_last_freed_first():
    pool = PagePool(9)
    assert pool.allocate(3) == [1, 2, 3]
    pool.release([1, 2])
    assert pool.allocate(3) == [1, 2, 4]
    with pytest.raises(MemoryError, match="5 pages wanted, 4 free"):
        pool.allocate(5)


def test_lost_and_double_pages_are_noticed():
    pool = PagePool(5)
    held = pool.allocate(2)
    pool.check([held])
    with pytest.raises(AssertionError, match=r"^1 pages are lost"):
        pool.check([held[:1]])
    with pytest.raises(AssertionError, match=r"both free and held: \{3\}"):
        pool.check([held, [3]])
    with pytest.raises(AssertionError, match="owners differ"):
        pool.check([held, held])
    pool.share(held)
    pool.check([held, held])
    pool.release(held)
    pool.release(held)
    with pytest.raises(ValueError, match="released twice"):
        pool.release(held)
