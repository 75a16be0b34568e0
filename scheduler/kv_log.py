"""The log of cached blocks: which full pages the device and the host hold, told as it changes.

A *block* is a full page of tokens, named by its block hash. The device has it while the prefix cache finds it there;
the host has it while a program has a copy of it that has arrived. Pages that are not full, and pages of programs that
share with nobody, have no hash and are not told; neither are window pages.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Iterator, Sequence, Set
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from .program import Program, Request
from .transfer import HostCopy
from .wait import DEVICE, HOST


class Block(NamedTuple):
    """A full page of tokens."""

    hash: bytes
    parent: bytes | None
    """Hash of the block before it; None: it begins a prompt."""
    tokens: bytes
    """Its token ids, int32."""
    salt: bytes
    """Salted start of its chain."""
    session: Hashable | None
    """Key of the program that has computed or copied it; None: that has none."""


@dataclass(slots=True)
class Stored:
    """Blocks that a tier has from now on; each continues the one before it."""

    tier: str
    blocks: list[Block]

    def __len__(self) -> int:
        return len(self.blocks)


@dataclass(slots=True)
class Removed:
    """Blocks that a tier has no more."""

    tier: str
    hashes: list[bytes]

    def __len__(self) -> int:
        return len(self.hashes)


@dataclass(slots=True)
class Cleared:
    """No tier has anything; what they do have follows."""

    def __len__(self) -> int:
        return 1


Record = Stored | Removed | Cleared


class KVLog:
    """Notes which blocks come and go. Whoever listens takes the records, and often enough, since nothing bounds them.

    Args:
        page_size: tokens of a block.
    """

    def __init__(self, page_size: int):
        self._size = page_size
        self._records: list[Record] = []
        # Fields of blocks by hash. Plain tuples of bytes are no work for the garbage collector, however many they are.
        self._blocks: dict[str, dict[bytes, tuple[Any, ...]]] = {DEVICE: {}, HOST: {}}
        self._copies: Counter[bytes] = Counter()  # on the host, by block
        self._arriving: dict[HostCopy, list[Block]] = {}
        self._arrived: dict[HostCopy, list[bytes]] = {}

    def take(self) -> list[Record]:
        """Return what has happened since the last call, in order."""
        records, self._records = self._records, []
        return records

    def retell(self) -> None:
        """Forget what has not been taken, and tell everything that there is anew."""
        self._records = [Cleared()]
        for tier, blocks in self._blocks.items():
            self._tell(tier, _parents_first(blocks))

    def hashes(self, tier: str) -> Set[bytes]:
        """The blocks that a tier has."""
        return self._blocks[tier].keys()

    # -- the device ------------------------------------------------------------------------------------------------

    def cached(self, request: Request, indices: Sequence[int]) -> None:
        """The prefix cache has got pages of a request, by rising index."""
        if indices:
            self._add(DEVICE, self._read(request, indices, request.program.key))

    def uncached(self, block_hash: bytes) -> None:
        """The prefix cache has lost a page."""
        self._remove(DEVICE, block_hash)

    # -- the host --------------------------------------------------------------------------------------------------

    def copying(self, program: Program, copy: HostCopy) -> None:
        """A program's last request is being copied to the host."""
        assert program.last is not None
        full = min(copy.end, program.kept // self._size, len(program.last.block_hashes))
        indices = range(copy.first, full)
        self._arriving[copy] = self._read(program.last, indices, program.key) if indices else []

    def arrived(self, copy: HostCopy) -> None:
        """A copy can be used from now on, unless it was dropped on its way."""
        if copy in self._arriving:
            blocks = self._arriving.pop(copy)
            self._add(HOST, [block for block in blocks if block.hash not in self._copies])
            self._hold(copy, [block.hash for block in blocks])

    def shared(self, copy: HostCopy, other: HostCopy) -> None:
        """Another program holds what a copy has, too."""
        self._hold(other, [*self._arrived[copy]])

    def cut(self, copy: HostCopy) -> None:
        """A copy has been dropped, or has fewer pages than before that count."""
        keep = 0 if copy.dropped else copy.used
        if copy in self._arriving:
            del self._arriving[copy][keep:]
        for block_hash in self._arrived.get(copy, [])[keep:]:
            self._copies[block_hash] -= 1
            if not self._copies[block_hash]:
                del self._copies[block_hash]
                self._remove(HOST, block_hash)
        if copy in self._arrived:
            del self._arrived[copy][keep:]
        if copy.dropped:
            self._arriving.pop(copy, None)
            self._arrived.pop(copy, None)

    def _hold(self, copy: HostCopy, hashes: list[bytes]) -> None:
        self._arrived[copy] = hashes
        self._copies.update(hashes)

    # -- records ---------------------------------------------------------------------------------------------------

    def _read(self, request: Request, indices: Sequence[int], session: Hashable | None) -> list[Block]:
        """Make blocks of full pages of a request."""
        first, size, hashes, salt = indices[0], 4 * self._size, request.block_hashes, request.program.salt or b""
        tokens = np.empty((indices[-1] + 1 - first) * self._size, np.int32)
        request.copy_tokens(first * self._size, tokens)
        content = tokens.tobytes()
        return [
            Block(hashes[i], hashes[i - 1] if i else None, content[at : at + size], salt, session)
            for i in indices
            for at in ((i - first) * size,)
        ]

    def _add(self, tier: str, blocks: list[Block]) -> None:
        held = self._blocks[tier]
        for block in blocks:
            held[block[0]] = (*block,)
        self._tell(tier, blocks)

    def _tell(self, tier: str, blocks: Iterable[Block]) -> None:
        last = self._records[-1] if self._records else None
        run = last.blocks if isinstance(last, Stored) and last.tier == tier else None
        for block in blocks:
            if run and block.parent == run[-1].hash and block.session == run[-1].session:
                run.append(block)
            else:
                run = [block]
                self._records.append(Stored(tier, run))

    def _remove(self, tier: str, block_hash: bytes) -> None:
        del self._blocks[tier][block_hash]
        last = self._records[-1] if self._records else None
        if isinstance(last, Removed) and last.tier == tier:
            last.hashes.append(block_hash)
        else:
            self._records.append(Removed(tier, [block_hash]))

    def check(self, copies: Sequence[HostCopy]) -> None:
        """Raise AssertionError unless all that is noted of ``copies``, the live ones, adds up (for tests)."""
        assert self._arrived.keys() == {copy for copy in copies if copy.ready}
        assert self._arriving.keys() == {copy for copy in copies if not copy.ready}
        assert self._copies == Counter(block_hash for hashes in self._arrived.values() for block_hash in hashes)
        assert self._blocks[HOST].keys() == self._copies.keys()


def _parents_first(blocks: dict[bytes, tuple[Any, ...]]) -> Iterator[Block]:
    """Go through blocks so that each comes after its parent, if that is one of them, and chains stay together."""
    children = defaultdict(list)
    for block in map(Block._make, blocks.values()):
        children[block.parent if block.parent in blocks else None].append(block)
    ahead = children[None]
    while ahead:
        block = ahead.pop()
        yield block
        ahead += children.get(block.hash, ())
