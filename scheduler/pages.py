"""Reference-counted page ids; a full page can be found again by the hash of its content."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import islice, repeat

from .kv_log import KVLog
from .page_shares import ON_DEVICE, PageShares
from .wait import DEVICE
from .windows import WindowPages


class PagePool:
    """Hands out the page ids ``1 … num_pages - 1``; page 0 is the null page, where padding is written.

    A full page may be *cached* under a block hash, which names its content and everything before it. Once freed it
    keeps that hash until it is handed out again, so it can be shared as long as nobody needs the memory.

    Free pages without a hash go out first, last in, first out: under light load the same few pages stay in use, and in
    the processor's caches. Cached ones follow, first in, first out; of pages released together the last ones first.
    Where several tenants hold pages, who needs some says first whose cached ones to :meth:`give_up`.

    Args:
        num_pages: the null page included.
        windows: the window pages that hang on these pages; None: there are none.
        log: is told what the prefix cache loses; None: nobody listens.
        shares: counts what tenants hold; None: there is one tenant.
    """

    def __init__(
        self,
        num_pages: int,
        windows: WindowPages | None = None,
        log: KVLog | None = None,
        shares: PageShares | None = None,
    ):
        if num_pages < 2:
            raise ValueError(f"a pool of {num_pages} pages has none to give: page 0 is the null page")
        self.size = num_pages - 1
        self.windows = windows or WindowPages(None, num_pages, 1)
        self.log = log
        self.shares = shares or PageShares((self.size, 0))
        self._free = list(range(num_pages - 1, 0, -1))
        self._cached: dict[int, dict[int, None]] = {}  # by tenant: free, but with a hash; oldest first
        self._num_cached = 0
        self._of = [0] * num_pages  # the tenant that holds each page
        self._references = [0] * num_pages
        self._pins = [0] * num_pages
        self._pinned = 0
        self._page_of: dict[bytes, int] = {}
        self._hash_of: dict[int, bytes] = {}

    @property
    def free(self) -> int:
        return len(self._free) + self._num_cached

    def at_hand(self, giver: int | None = None) -> int:
        """Free pages that anybody may have: those without a hash, and cached ones of ``giver`` or of a sole tenant."""
        if not self.shares.several:
            return self.free
        return len(self._free) + (len(self._cached.get(giver, ())) if giver is not None else 0)

    @property
    def cached(self) -> int:
        """Free pages that can still be found by their hash."""
        return self._num_cached

    @property
    def caching(self) -> Iterable[int]:
        """Tenants that hold cached pages."""
        return self._cached

    @property
    def obtainable(self) -> int:
        """Pages that no running request uses."""
        return self.size - self._pinned

    def allocate(self, count: int, tenant: int = 0) -> list[int]:
        """``count`` pages for a tenant, one reference each.

        Raises:
            MemoryError: fewer are free.
        """
        if count > self.free:
            raise MemoryError(f"{count} pages wanted, {self.free} free")
        if count == 0:
            return []
        taken = self._free[-count:][::-1]
        del self._free[-count:]
        while (missing := count - len(taken)) > 0:
            taken += self._take_oldest(next(iter(self._cached)), missing)
        for page in taken:
            self._references[page] = 1
            self._of[page] = tenant
        self.shares.hold(ON_DEVICE, tenant, count)
        return taken

    def hand(self, pages: Iterable[int], tenants: Iterable[int]) -> None:
        """Let each of ``pages`` be held by the tenant beside it."""
        for page, tenant in zip(pages, tenants, strict=True):
            if (before := self._of[page]) != tenant:
                self._of[page] = tenant
                self.shares.hold(ON_DEVICE, tenant, 1)
                self.shares.hold(ON_DEVICE, before, -1)

    def share(self, pages: Sequence[int], tenant: int = 0) -> None:
        """Add a reference to each of ``pages``, which are held, or free but cached; the latter a tenant takes up."""
        references = self._references
        for page in pages:
            if references[page] == 0:
                if page not in self._cached.get(self._of[page], ()):
                    raise ValueError(f"page {page} is free and cannot be shared")
                self._take_cached(page)
                self.hand((page,), (tenant,))
            references[page] += 1

    def release(self, pages: Sequence[int], tenant: int = 0) -> None:
        """Remove a tenant's reference from each of ``pages``; without any a page is free.

        Raises:
            ValueError: a page is free already.
        """
        references, hashes, windows = self._references, self._hash_of, self.windows
        kept: list[int] = []
        gone: list[int] = []
        for page in reversed(pages):
            left = references[page] - 1
            if left < 0:
                raise ValueError(f"page {page} is released twice")
            references[page] = left
            if left == 0:
                if page in hashes:
                    kept.append(page)
                else:
                    if windows.size:
                        windows.forget(page)
                    gone.append(page)
        if kept:
            self._keep(kept, tenant)
        if gone:
            self._free += gone
            self._held_no_more(gone)

    def _keep(self, pages: list[int], tenant: int) -> None:
        """Cache free pages, which a tenant has used last."""
        if self.shares.several:
            self.hand(pages, repeat(tenant, len(pages)))
        self._cached.setdefault(self._of[pages[0]], {}).update(dict.fromkeys(pages))
        self._num_cached += len(pages)

    def _take_cached(self, page: int) -> None:
        """Take a page out of the free, cached ones."""
        cached = self._cached[self._of[page]]
        del cached[page]
        self._num_cached -= 1
        if not cached:
            del self._cached[self._of[page]]

    def _held_no_more(self, pages: list[int]) -> None:
        if not self.shares.several:
            self.shares.hold(ON_DEVICE, self._of[pages[0]], -len(pages))
            return
        for tenant, count in Counter(map(self._of.__getitem__, pages)).items():
            self.shares.hold(ON_DEVICE, tenant, -count)

    def shared(self, page: int) -> bool:
        """Whether a page has more than one reference."""
        return self._references[page] > 1

    # -- pins: pages that running requests use --------------------------------------------------------------------

    def pin(self, pages: Iterable[int]) -> None:
        pins, new = self._pins, 0
        for page in pages:
            new += not pins[page]
            pins[page] += 1
        self._pinned += new

    def unpin(self, pages: Iterable[int]) -> None:
        pins, gone = self._pins, 0
        for page in pages:
            left = pins[page] = pins[page] - 1
            gone += not left
        self._pinned -= gone

    def unpinned(self, pages: Iterable[int]) -> int:
        """Count those of ``pages`` that no running request uses."""
        return sum(self._pins[page] == 0 for page in pages)

    # -- the prefix cache ------------------------------------------------------------------------------------------

    def cache(self, page: int, block_hash: bytes) -> bool:
        """Add a held page to the prefix cache; of several pages with equal hashes the first one stays in it.

        Returns whether it was added now.
        """
        if page in self._hash_of or block_hash in self._page_of:
            return False
        self._page_of[block_hash] = page
        self._hash_of[page] = block_hash
        return True

    def uncache(self, page: int) -> None:
        """Remove a page from the prefix cache, because something else will be written there."""
        block_hash = self._hash_of.pop(page, None)
        if block_hash is not None:
            del self._page_of[block_hash]
            if self.log is not None:
                self.log.uncached(block_hash)
        if page in self._cached.get(self._of[page], ()):
            self._take_cached(page)
            self.windows.forget(page)
            self._free.append(page)
            self._held_no_more([page])

    def give_up(self, tenant: int, count: int) -> None:
        """Remove a tenant's ``count`` oldest cached pages that are free, or all, so that anybody may have them."""
        if tenant in self._cached:
            self._free += self._take_oldest(tenant, count)

    def _take_oldest(self, tenant: int, count: int) -> list[int]:
        """Take up to ``count`` cached pages of a tenant, the oldest, out of the prefix cache."""
        cached = self._cached[tenant]
        taken = [*islice(cached, count)]
        for page in taken:
            del cached[page]
            self.windows.forget(page)
            self.uncache(page)
        self._num_cached -= len(taken)
        if not cached:
            del self._cached[tenant]
        self.shares.hold(ON_DEVICE, tenant, -len(taken))
        return taken

    def uncache_all(self) -> None:
        """Empty the prefix cache."""
        for page in list(self._hash_of):
            self.uncache(page)

    def find(self, block_hashes: Iterable[bytes]) -> list[int]:
        """Pages of the longest prefix of ``block_hashes`` that is cached; no reference is taken."""
        found = []
        for block_hash in block_hashes:
            page = self._page_of.get(block_hash)
            if page is None:
                break
            found.append(page)
        return found

    def check(self, owners: Iterable[Sequence[int]], pinning: Iterable[Sequence[int]] = ()) -> None:
        """Raise AssertionError unless free and held pages add up and every reference and pin has its owner."""
        held = Counter(page for pages in owners for page in pages)
        cached = {page for pages in self._cached.values() for page in pages}
        free = {*self._free, *cached}
        assert len(free) == self.free == len(self._free) + len(cached), "a page is in the free lists twice"
        assert not free & held.keys(), f"pages both free and held: {free & held.keys()}"
        assert len(free) + len(held) == self.size, f"{self.size - len(free) - len(held)} pages are lost"
        counts = {page: count for page, count in enumerate(self._references) if count}
        assert counts == dict(held), "reference counts and owners differ"
        pins = {page: count for page, count in enumerate(self._pins) if count}
        assert pins == dict(Counter(page for pages in pinning for page in pages)), "pins and their owners differ"
        assert self._pinned == len(pins)
        assert self._page_of == {block_hash: page for page, block_hash in self._hash_of.items()}, "hashes differ"
        assert cached <= self._hash_of.keys()
        assert all(self._of[page] == tenant for tenant, pages in self._cached.items() for page in pages)
        assert all(self._cached.values()), "a tenant of no cached pages is remembered"
        assert self.log is None or self.log.hashes(DEVICE) == self._page_of.keys(), "the log knows other blocks"

    def held(self) -> Counter[int]:
        """Count the pages that each tenant holds (for tests; O(everything))."""
        return Counter(
            tenant
            for page, tenant in enumerate(self._of)
            if self._references[page] or page in self._cached.get(tenant, ())
        )
