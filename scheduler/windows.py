"""Window pages: the KV of layers whose queries see only so many tokens, their own included.

Such layers have pages of their own. A *window page* hangs on a page, holds the same tokens, and is shared, found and
offloaded with it, but only as long as somebody needs it. A program *holds* the window pages that its next token will
look at: those of its last tokens. What nobody holds stays valid until its memory is needed, the longest unused first,
so that another program can still go on from the end of a shared beginning.

A program can go on after n tokens only if the window pages before n are there. Whatever is kept of a program satisfies
this (:func:`resumable`); what does not is computed again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

from .program import NO_WINDOW, Program


@dataclass(frozen=True)
class Window:
    """What a scheduler knows of a model's layers with a window."""

    tokens: int
    """Tokens that a query of these layers sees, its own included; the most, if they differ."""
    num_pages: int
    """Window pages, the null page included."""

    def span(self, page_size: int) -> int:
        """Pages before that of a token in which its window may begin."""
        return -(-(self.tokens - 1) // page_size)

    def runnable(self, page_size: int, max_step_tokens: int) -> int:
        """Requests whose windows fit beside each other, whatever a step computes.

        Each has a page at both ends of its window that counts only in part, and a step writes its tokens on others.
        """
        return (self.num_pages - 1 - -(-max_step_tokens // page_size)) // (self.span(page_size) + 2)


class WindowPages:
    """Hands out window pages ``1 … num_pages - 1``; window page 0 is the null page.

    Args:
        window: of the model's layers; None: no layer has one, there are no window pages, and nobody holds any.
        num_pages: pages that window pages may hang on, the null page included.
        page_size: tokens of a page.
    """

    def __init__(self, window: Window | None, num_pages: int, page_size: int):
        self.size = 0 if window is None else window.num_pages - 1
        self.of = [0] * num_pages
        """The window page that hangs on each page; 0: none."""
        self._holders = [0] * num_pages if window else []  # programs, by page
        self._free = list(range(self.size, 0, -1))
        self._unheld: dict[int, None] = {}  # pages whose window pages nobody holds, longest unused first
        self._span, self._page_size = (-NO_WINDOW.start if window is None else window.span(page_size)), page_size
        self._changed: dict[Program, int] = {}

    @property
    def available(self) -> int:
        """Window pages that nobody holds."""
        return len(self._free) + len(self._unheld)

    def has(self, count: int) -> bool:
        """Whether so many are available, or no page has a window page."""
        return count <= self.available or not self.size

    @property
    def valid(self) -> int:
        """Those of them whose content can still be used."""
        return len(self._unheld)

    def first(self, tokens: int) -> int:
        """Index of the first page whose window page is needed to go on after so many tokens."""
        return max(0, tokens // self._page_size - self._span)

    def wanted(self, pages: Iterable[int], new: int) -> int:
        """Count the window pages that become unavailable when somebody holds those of ``pages``, and ``new`` ones."""
        return sum(not self._holders[page] for page in pages) + new if self.size else 0

    def hold(self, program: Program, pages: Sequence[int], first: int, end: int) -> None:
        """Let a program hold the window pages of ``pages[first:end]``, its own, instead of those that it has held.

        Pages without a window page get one, whose content is still to be written.

        Raises:
            MemoryError: too few are available.
        """
        if not self.size:
            return
        before = program.window
        now = program.window = range(first, max(first, end))
        for i in _without(before, now):
            self._let_go(pages[i])
        missing = []
        for i in _without(now, before):
            page = pages[i]
            if not self.of[page]:
                missing.append(page)
            else:
                self._unheld.pop(page, None)
                self._holders[page] += 1
            self._changed[program] = min(i, self._changed.get(program, i))
        for page in missing:  # after all others are held, or else it could be theirs
            self.of[page] = self._take()
            self._holders[page] = 1

    def forget(self, page: int) -> None:
        """Give up the window page of a page whose content nobody can find any more."""
        if self.size and self.of[page]:
            del self._unheld[page]
            self._free.append(self.of[page])
            self.of[page] = 0

    def announce(self, program: Program) -> None:
        """Have :meth:`take_changed` name all that a program holds."""
        if self.size:
            self._changed[program] = 0

    def take_changed(self) -> Iterator[tuple[Program, int]]:
        """Programs that hold other window pages than when this was last called, and the index of the first of these."""
        changed, self._changed = self._changed, {}
        for program, first in changed.items():
            if (first := max(first, program.window.start)) < program.window.stop:
                yield program, first

    def _take(self) -> int:
        if self._free:
            return self._free.pop()
        if not self._unheld:
            raise MemoryError("every window page is held")
        page = next(iter(self._unheld))
        del self._unheld[page]
        taken, self.of[page] = self.of[page], 0
        return taken

    def _let_go(self, page: int) -> None:
        self._holders[page] -= 1
        if not self._holders[page]:
            self._unheld[page] = None

    def check(self, held: Iterable[tuple[Program, Sequence[int]]]) -> None:
        """Raise AssertionError unless window pages conserve (for tests; O(everything)).

        ``held`` names every program with its pages.
        """
        if not self.size:
            return
        holders = [0] * len(self.of)
        for program, pages in held:
            for i in program.window:
                holders[pages[i]] += 1
        assert holders == self._holders, "a window page is held by others than say so"
        hanging = {page: window for page, window in enumerate(self.of) if window}
        assert sorted([*hanging.values(), *self._free]) == list(range(1, self.size + 1)), "window pages are lost"
        assert self._unheld.keys() == {page for page in hanging if not holders[page]}
        assert all(self.of[page] for page, count in enumerate(holders) if count)


def resumable(
    windows: WindowPages,
    tokens: int,
    page_size: int,
    on_device: Callable[[int], object],
    on_host: Callable[[int], object] = lambda i: False,
) -> int:
    """The most of the first ``tokens`` tokens after which a program can go on.

    ``on_device(i)`` says whether the device has the window page of its i-th page, ``on_host(i)`` whether the host has
    both. What is restored from the host comes after all that is used on the device.
    """
    end = at = only_device = -(-tokens // page_size)  # the last one: the lowest page so far that the host has not
    while at > windows.first(min(tokens, end * page_size)):
        at -= 1
        here, there = on_device(at), on_host(at)
        if here and not there:
            only_device = at
        elif there and not here and only_device < end:
            end = only_device
        elif not here and not there:
            end = only_device = at
    return min(tokens, end * page_size)


def _without(a: range, b: range) -> Iterable[int]:
    """Numbers of ``a`` that are not in ``b``."""
    return chain(range(a.start, min(a.stop, b.start)), range(max(a.start, b.stop), a.stop))
