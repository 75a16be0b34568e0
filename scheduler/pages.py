"""Reference-counted page ids, found again by what is written on them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence


class PagePool:
    """Hands out the page ids ``1 … num_pages - 1``; page 0 is scrap, where padding is written.

    A full page may be published under a key that names its content and everything before it. Freed, it keeps its key
    until it is handed out again, so that it can be shared as long as nobody needs the memory.

    Pages that nobody can ask for go out first, last in, first out: the same few pages stay in use, and in cache, under
    light load. Then go published ones, first in, first out; of pages released together the last ones first.
    """

    def __init__(self, num_pages: int):
        if num_pages < 2:
            raise ValueError(f"a pool of {num_pages} pages has none to give: page 0 is scrap")
        self.size = num_pages - 1
        self._free = list(range(num_pages - 1, 0, -1))
        self._cached: dict[int, None] = {}  # free but published, oldest first
        self._references = [0] * num_pages
        self._pins = [0] * num_pages
        self._pinned = 0
        self._page_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}

    @property
    def free(self) -> int:
        return len(self._free) + len(self._cached)

    @property
    def cached(self) -> int:
        """Free pages that can still be found by their key."""
        return len(self._cached)

    @property
    def obtainable(self) -> int:
        """Pages that no pin holds."""
        return self.size - self._pinned

    def allocate(self, count: int) -> list[int]:
        """``count`` pages, one reference each.

        Raises:
            MemoryError: fewer are free.
        """
        if count > self.free:
            raise MemoryError(f"{count} pages wanted, {self.free} free")
        if count == 0:
            return []
        taken = self._free[-count:][::-1]
        del self._free[-count:]
        while len(taken) < count:
            page = next(iter(self._cached))
            del self._cached[page]
            self.withdraw(page)
            taken.append(page)
        for page in taken:
            self._references[page] = 1
        return taken

    def share(self, pages: Iterable[int]) -> None:
        """One more reference to pages that are held, or free but published."""
        for page in pages:
            if self._references[page] == 0:
                if page not in self._cached:
                    raise ValueError(f"page {page} is free and cannot be shared")
                del self._cached[page]
            self._references[page] += 1

    def release(self, pages: Sequence[int]) -> None:
        """One reference less; pages without any are free.

        Raises:
            ValueError: a page is free already.
        """
        for page in reversed(pages):
            if self._references[page] == 0:
                raise ValueError(f"page {page} is released twice")
            self._references[page] -= 1
            if self._references[page] == 0:
                if page in self._key_of:
                    self._cached[page] = None
                else:
                    self._free.append(page)

    def shared(self, page: int) -> bool:
        """Whether it has more than one reference."""
        return self._references[page] > 1

    # -- pins: what running requests and transfers use ----------------------------------------------------------

    def pin(self, pages: Iterable[int]) -> None:
        for page in pages:
            self._pinned += self._pins[page] == 0
            self._pins[page] += 1

    def unpin(self, pages: Iterable[int]) -> None:
        for page in pages:
            self._pins[page] -= 1
            self._pinned -= self._pins[page] == 0

    def unpinned(self, pages: Iterable[int]) -> int:
        """How many of ``pages`` have no pin."""
        return sum(self._pins[page] == 0 for page in pages)

    # -- keys --------------------------------------------------------------------------------------------------

    def publish(self, page: int, key: bytes) -> None:
        """Let a held page be found by ``key``; the first page of a key stays the one that is found."""
        if page not in self._key_of and key not in self._page_of:
            self._page_of[key] = page
            self._key_of[page] = key

    def withdraw(self, page: int) -> None:
        """Let it be found no more, because something else will be written on it."""
        key = self._key_of.pop(page, None)
        if key is not None:
            del self._page_of[key]
        if page in self._cached:
            del self._cached[page]
            self._free.append(page)

    def withdraw_all(self) -> None:
        """Let no page be found any more."""
        for page in list(self._key_of):
            self.withdraw(page)

    def find(self, keys: Iterable[bytes]) -> list[int]:
        """The pages of the first keys that are known; not yet shared."""
        found = []
        for key in keys:
            page = self._page_of.get(key)
            if page is None:
                break
            found.append(page)
        return found

    def check(self, owners: Iterable[Sequence[int]], pinning: Iterable[Sequence[int]] = ()) -> None:
        """Raise AssertionError unless free and held pages add up and every reference and pin has its owner."""
        held = Counter(page for pages in owners for page in pages)
        free = {*self._free, *self._cached}
        assert len(free) == len(self._free) + len(self._cached), "a page is in the free lists twice"
        assert not free & held.keys(), f"pages both free and held: {free & held.keys()}"
        assert len(free) + len(held) == self.size, f"{self.size - len(free) - len(held)} pages are lost"
        counts = {page: count for page, count in enumerate(self._references) if count}
        assert counts == dict(held), "reference counts and owners differ"
        pins = {page: count for page, count in enumerate(self._pins) if count}
        assert pins == dict(Counter(page for pages in pinning for page in pages)), "pins and their owners differ"
        assert self._pinned == len(pins)
        assert self._page_of == {key: page for page, key in self._key_of.items()}, "keys and pages differ"
        assert self._cached.keys() <= self._key_of.keys()
