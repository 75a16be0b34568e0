"""Reference-counted page ids."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence


class PagePool:
    """Hands out the page ids ``1 … num_pages - 1``; page 0 is scrap, where padding is written.

    Freed pages are handed out last in, first out: the same few pages stay in use, and in cache, under light load.
    """

    def __init__(self, num_pages: int):
        if num_pages < 2:
            raise ValueError(f"a pool of {num_pages} pages has none to give: page 0 is scrap")
        self.size = num_pages - 1
        self._free = list(range(num_pages - 1, 0, -1))
        self._references = [0] * num_pages

    @property
    def free(self) -> int:
        return len(self._free)

    def allocate(self, count: int) -> list[int]:
        """``count`` pages, one reference each.

        Raises:
            MemoryError: fewer are free.
        """
        if count > len(self._free):
            raise MemoryError(f"{count} pages wanted, {len(self._free)} free")
        if count == 0:
            return []
        taken = self._free[-count:][::-1]
        del self._free[-count:]
        for page in taken:
            self._references[page] = 1
        return taken

    def share(self, pages: Iterable[int]) -> None:
        """One more reference to pages that are held."""
        for page in pages:
            if self._references[page] == 0:
                raise ValueError(f"page {page} is free and cannot be shared")
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
                self._free.append(page)

    def check(self, owners: Iterable[Sequence[int]]) -> None:
        """Raise AssertionError unless free and held pages add up and every reference has its owner."""
        held = Counter(page for pages in owners for page in pages)
        free = set(self._free)
        assert len(free) == len(self._free), "a page is in the free list twice"
        assert not free & held.keys(), f"pages both free and held: {free & held.keys()}"
        assert len(free) + len(held) == self.size, f"{self.size - len(free) - len(held)} pages are lost"
        counts = {page: count for page, count in enumerate(self._references) if count}
        assert counts == dict(held), "reference counts and owners differ"
