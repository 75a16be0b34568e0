"""A device made of dictionaries: it keeps the token behind every KV slot, so a wrong page shows as a wrong token.

Its model is a hash: the next token depends on every token of the context, in order, and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from astraea_jax.scheduler.plan import Plan
from astraea_jax.scheduler.scheduler import Scheduler
from astraea_jax.scheduler.transfer import HostPages, Part, Transfer

VOCABULARY = 50

Content = list[int | None]
"""Tokens of a page."""


def next_token(context: list[int]) -> int:
    value = 17
    for token in context:
        value = (value * 31 + token + 1) % 1_000_003
    return value % VOCABULARY


def complete(
    prompt: list[int], max_tokens: int, stops: frozenset[int] = frozenset(), choose: Callable[[int], int] = int
) -> list[int]:
    """Return what a request must output, whatever happens around it; ``choose`` makes another token of the device's."""
    output: list[int] = []
    while len(output) < max_tokens and not (output and output[-1] in stops):
        output.append(choose(next_token([*prompt, *output])))
    return output


class Device:
    """Runs plans in order of dispatch, as the real one does."""

    def __init__(self, scheduler: Scheduler):
        self.scheduler = scheduler
        self.page_size = scheduler.config.page_size
        self.kv: dict[int, int] = {}
        self.window = scheduler.config.window
        self.window_kv: dict[int, int] = {}
        """The same for layers that see only the last tokens."""
        self.width = scheduler.config.pages_per_seq
        self.table = np.zeros((scheduler.config.max_seqs, self.width * (2 if self.window else 1)), np.int32)
        self.last: dict[int, int] = {}
        self.host: dict[HostPages, tuple[list[Content], list[Content]]] = {}
        """Contents of all host memory in use: pages and window pages."""
        self.restoring: dict[Transfer, tuple[list[Content], list[Content]]] = {}

    def begin(self, transfers: list[Transfer], dropped: list[HostPages]) -> None:
        """Start transfers: an offload reads its pages now, before anything later writes them."""
        for transfer in transfers:
            if transfer.to_host:
                (part,), (windows,) = transfer.parts, transfer.window_parts
                memory = part.copy.memory
                assert part.pages == memory.count == len(transfer.pages)
                assert windows.pages == memory.windows == len(transfer.windows) <= memory.count
                self.host[memory] = (
                    [self._read(self.kv, page) for page in transfer.pages],
                    [self._read(self.window_kv, page) for page in transfer.windows],
                )
                assert not self.window or None not in [content[0] for content in self.host[memory][1]]
            else:
                contents = self.restoring[transfer] = (
                    self._parts(transfer.parts, 0),
                    self._parts(transfer.window_parts, 1),
                )
                assert [*map(len, contents)] == [len(transfer.pages), len(transfer.windows)]
        for memory in dropped:
            del self.host[memory]

    def end(self, transfer: Transfer, now: float, *, failed: bool = False) -> None:
        """A transfer has arrived: a restore writes its pages, if they are still wanted."""
        if not transfer.to_host:
            pages, windows = self.restoring.pop(transfer)
            if not (transfer.cancelled or failed):
                self._write(self.kv, transfer.pages, pages)
                self._write(self.window_kv, transfer.windows, windows)
        self.scheduler.transferred(transfer, now, failed=failed)

    def lose(self) -> None:
        """The arrays are made anew: every page, the page table and what was sampled are gone; the host's part stays."""
        self.kv.clear()
        self.window_kv.clear()
        self.last.clear()
        self.table[:] = 0

    def _parts(self, parts: Sequence[Part], group: int) -> list[Content]:
        held = [self.host[copy.memory][group][offset : offset + pages] for copy, offset, pages in parts]
        assert [*map(len, held)] == [part.pages for part in parts]
        return [content for part in held for content in part]

    def _read(self, kv: dict[int, int], page: int) -> Content:
        return [kv.get(page * self.page_size + offset) for offset in range(self.page_size)]

    def _write(self, kv: dict[int, int], pages: Sequence[int], contents: list[Content]) -> None:
        for page, content in zip(pages, contents, strict=True):
            for offset, token in enumerate(content):
                kv[page * self.page_size + offset] = -1 if token is None else token

    def run(self, plan: Plan) -> list[int]:
        """Execute a step at dispatch: write its tokens into their pages, attend, sample."""
        slots, starts, counts = (column.tolist() for column in (plan.slots, plan.starts, plan.counts))
        assert slots == [request.slot for request in plan.requests]
        assert len(set(slots)) == len(slots) <= self.scheduler.config.max_seqs
        assert plan.tokens == sum(counts) <= self.scheduler.config.max_step_tokens
        assert counts[: plan.num_decodes] == [1] * plan.num_decodes
        assert plan.context == sum(starts) + sum(counts)
        if self.window:
            assert len(slots) <= self.scheduler.config.max_running
        for slot, first, pages in plan.changes:
            self.table[slot, first : first + len(pages)] = pages
        for request in plan.requests:
            assert self.table[request.slot, : len(request.pages)].tolist() == request.pages, "page table is stale"
        tables = self.table[slots]
        for i, (request, table) in enumerate(zip(plan.requests, tables, strict=True)):
            tokens = np.full(counts[i], -1)
            if i >= plan.num_decodes:
                request.copy_tokens(starts[i], tokens)
            for at, token in enumerate(tokens.tolist(), starts[i]):
                place = self._slot(table, at)
                assert place not in {self._slot(table, p) for p in range(at)}
                self.kv[place] = self.last[slots[i]] if token < 0 else token
                if self.window:
                    self.window_kv[self._slot(table[self.width :], at)] = self.kv[place]
        for i, table in enumerate(tables if self.window else ()):
            self._see_windows(table, starts[i], starts[i] + counts[i])
        sampled = []
        for i, table in enumerate(tables[: plan.samples]):
            context = [self.kv[self._slot(table, p)] for p in range(starts[i] + counts[i])]
            self.last[slots[i]] = next_token(context)
            sampled.append(self.last[slots[i]])
        return sampled

    def _see_windows(self, table: np.ndarray, start: int, end: int) -> None:
        """Assert that what queries at ``start … end - 1`` see in layers with a window are the tokens of their row."""
        for at in range(max(0, start - self.window.tokens + 1), end):
            token = self.window_kv[self._slot(table[self.width :], at)]
            assert token == self.kv[self._slot(table, at)], "a window page holds something else"

    def _slot(self, table: np.ndarray, position: int) -> int:
        page = int(table[position // self.page_size])
        assert page > 0, "the null page belongs to nobody"
        return page * self.page_size + position % self.page_size
