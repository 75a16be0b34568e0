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


def test_cached_pages_are_found_until_they_are_handed_out_again():
    pool = PagePool(6)
    pages = pool.allocate(3)
    for page, block_hash in zip(pages, (b"a", b"b", b"c"), strict=True):
        pool.cache(page, block_hash)
    assert pool.find([b"a", b"b", b"c", b"d"]) == pages
    assert pool.find([b"x", b"a"]) == []
    pool.release(pages)
    assert (pool.free, pool.cached) == (5, 3)
    assert pool.allocate(2) == [4, 5]  # what nobody can ask for goes first
    assert pool.allocate(1) == [3]  # then the last page of those released together
    assert pool.find([b"a", b"b", b"c"]) == pages[:2]
    pool.share(pages[:2])
    pool.check([[3, 4, 5], pages[:2]])
    with pytest.raises(MemoryError):
        pool.allocate(1)


def test_the_first_page_of_a_hash_is_the_one_that_is_found():
    pool = PagePool(4)
    first, second = pool.allocate(2)
    pool.cache(first, b"k")
    pool.cache(second, b"k")
    pool.cache(first, b"other")
    assert pool.find([b"k"]) == [first]
    assert pool.find([b"other"]) == []
    pool.release([first, second])
    assert pool.cached == 1
    pool.uncache(first)
    assert (pool.cached, pool.free) == (0, 3)
    assert pool.find([b"k"]) == []
    pool.check([])
    with pytest.raises(ValueError, match="is free and cannot be shared"):
        pool.share([first])


def test_pinned_pages_cannot_be_had():
    pool = PagePool(6)
    pages = pool.allocate(2)
    pool.share(pages)
    pool.pin(pages)
    pool.pin(pages[:1])
    assert pool.obtainable == 3
    pool.unpin(pages)
    assert pool.obtainable == 4
    assert pool.unpinned(pages) == 1
    pool.check([pages, pages], [pages[:1]])
    with pytest.raises(AssertionError, match="pins and their owners differ"):
        pool.check([pages, pages], [pages])
