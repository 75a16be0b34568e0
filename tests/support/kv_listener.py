"""A listener to a scheduler's log: it rebuilds what is cached from the records, and compares with where things lie."""

from __future__ import annotations

import numpy as np

from astraea_jax.scheduler.kv_log import Cleared, Stored
from astraea_jax.scheduler.prefix import hash_blocks
from astraea_jax.scheduler.scheduler import Scheduler
from astraea_jax.scheduler.transfer import HostPages, Transfer
from astraea_jax.scheduler.wait import DEVICE, HOST


class Listener:
    """Keeps the blocks of both tiers, from the records alone."""

    def __init__(self) -> None:
        self.tiers: dict[str, set[bytes]] = {}
        self.clear()

    def clear(self) -> None:
        self.tiers = {DEVICE: set(), HOST: set()}

    def hear(self, records) -> None:
        for record in records:
            if isinstance(record, Cleared):
                self.clear()
            elif isinstance(record, Stored):
                new = [block.hash for block in record.blocks]
                assert not self.tiers[record.tier] & {*new}, "a block is stored twice"
                self.tiers[record.tier].update(new)
                for block in record.blocks:
                    tokens = np.frombuffer(block.tokens, np.int32)
                    assert hash_blocks(tokens, len(tokens), block.parent or block.salt) == [block.hash]
                assert [block.parent for block in record.blocks[1:]] == new[:-1]
            else:
                gone = {*record.hashes}
                assert len(gone) == len(record.hashes)
                assert gone <= self.tiers[record.tier], "a block goes that was not there"
                self.tiers[record.tier] -= gone


class Truth:
    """What the tiers really hold, found without the log.

    The device holds what the pool finds by hash. What host memory holds is noted when it is written.
    """

    def __init__(self, scheduler: Scheduler):
        self._scheduler = scheduler
        self._written: dict[HostPages, list[bytes]] = {}
        copies = scheduler._residency._copies
        self._begin, copies._begin = copies._begin, self.begin

    def begin(self, transfer: Transfer) -> None:
        """Note what a transfer writes that begins."""
        if transfer.to_host:
            (part,), program = transfer.parts, transfer.program
            full = program.kept // self._scheduler.config.page_size
            first, end = part.copy.first, part.copy.first + part.pages
            self._written[part.copy.memory] = program.last.block_hashes[first : min(end, full)]
        self._begin(transfer)

    def tiers(self) -> dict[str, set[bytes]]:
        copies = [copy for p in self._scheduler._programs.programs() for copy in p.copies if copy.ready]
        on_host = {h for copy in copies for h in self._written[copy.memory][: copy.used]}
        return {DEVICE: {*self._scheduler._pool._page_of}, HOST: on_host}
