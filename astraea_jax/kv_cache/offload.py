"""The host tier: copies of KV pages in pinned host memory, transferred while steps go on.

Offload: the runner gathers pages into one contiguous block on the device, after which the pages may be written again
(the device works in the order of dispatch), and the block is copied to ``pinned_host`` memory. Restore: the block is
copied to the device, and once it has arrived the runner scatters it into the paged arrays. All blocks that have arrived
by the same poll, of whatever transfers, are scattered at once, because a scatter costs a launch per layer. Nothing here
blocks: the loop thread polls transfers once per iteration.

The size of a block is a power of two, so a few compiled shapes serve every transfer and no host memory is padded.
``unpinned_host`` is never used: pageable copies are slow on GPUs, and came back with the wrong stride on TPUs.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from astraea_jax.scheduler.transfer import HostPages, Transfer

log = logging.getLogger(__name__)

PINNED = "pinned_host"
LARGEST_BLOCK = 64
"""Most pages of a block."""
LEAST_BATCH = 4
"""Least pages that a scatter is compiled for: one page would be two launches per layer on a GPU."""
NOWHERE = 2**30
"""Page ids from here on are beyond every pool; writes to them are dropped."""
LIMIT_S = 30.0
"""A transfer of which no block arrives for so long fails, and its KV is recomputed."""

Block = Any
"""Pages in one array ``[n, L, …]``, on the device or the host; in multi-process serving a wrapper of that array."""
Put = Callable[[Block, jax.sharding.Sharding], Block]


class Pools(Protocol):
    """The owner of the paged arrays."""

    @property
    def groups(self) -> Sequence[int]:
        """Groups of layers that have pages: 0, whose pages a transfer names, and 1, whose window pages it names."""

    def gather(self, pages: Sequence[int], group: int) -> Block:
        """Copy a group's pages into a block ``[n, L, …]`` on the device."""

    def scatter(self, blocks: Sequence[Block], pages: np.ndarray, group: int) -> None:
        """Write blocks, together no larger than the largest, to a group's ``pages [n]`` int32, but to none beyond."""


def block_sizes(largest: int) -> list[int]:
    """Sizes of the blocks that transfers are cut into: falling powers of two."""
    return [1 << i for i in range(min(largest, LARGEST_BLOCK).bit_length() - 1, -1, -1)]


def cut(count: int, sizes: Sequence[int]) -> list[int]:
    """Cut ``count`` pages into blocks of falling ``sizes``."""
    blocks = []
    for size in sizes:
        blocks += [size] * (count // size)
        count %= size
    return blocks


def batch_sizes(largest: int) -> list[int]:
    """Numbers of pages that are scattered at once, falling."""
    sizes = block_sizes(largest)
    return sizes[:1] + [size for size in sizes[2::2] if size >= LEAST_BATCH]


def block_sharding(pages: jax.Array | jax.ShapeDtypeStruct) -> jax.sharding.Sharding:
    """Sharding of a block of pages on the device, for paged arrays like ``pages [P, …]``."""
    sharding = pages.sharding
    if isinstance(sharding, jax.sharding.NamedSharding):
        axes: list[Any] = [*sharding.spec, *[None] * (pages.ndim - len(sharding.spec))]
        return jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec(axes[0], None, *axes[1:]))
    return sharding


def has_pinned_host() -> bool:
    """Whether this backend can pin host memory."""
    return any(memory.kind == PINNED for memory in jax.local_devices()[0].addressable_memories())


@dataclass
class _Moving:
    """A transfer in flight."""

    transfer: Transfer
    since: float
    """Time at which its last block arrived, or it became first of its direction: waiting for others does not count."""
    waiting: deque[tuple[Block, np.ndarray, int]] = field(default_factory=deque)
    """Blocks on the host still to be restored, the pages to write them to, and their group."""
    arriving: deque[tuple[Block, np.ndarray, int]] = field(default_factory=deque)
    """Blocks being copied, for a restore the pages to write them to, and their group."""
    failed: str | None = None


class _Arrived(NamedTuple):
    """A block of a restore that has come, and where it goes."""

    moving: _Moving
    block: Block
    pages: np.ndarray
    group: int


class HostStore:
    """Holds the host copies that the scheduler has asked for; used by the loop thread only.

    Args:
        pools: the owner of the paged arrays.
        sharding: sharding of a block on the device; see :func:`block_sharding`.
        staging: most pages of device memory for blocks being restored. (The scheduler bounds those being offloaded.)
        put: copies a block to a sharding, asynchronously.
    """

    def __init__(self, pools: Pools, sharding: jax.sharding.Sharding, staging: int, put: Put = jax.device_put):
        self._pools = pools
        self._device = sharding
        self._host = sharding.with_memory_kind(PINNED)
        self._staging = staging
        self._staged = 0
        self._sizes = block_sizes(staging)
        self._put = put
        self._copies: dict[HostPages, tuple[list[Block], list[Block]]] = {}  # of both groups
        self._moving: list[_Moving] = []

    @property
    def busy(self) -> bool:
        """Whether a transfer is in flight."""
        return bool(self._moving)

    def start(self, transfers: Sequence[Transfer], dropped: Sequence[HostPages]) -> None:
        """Begin transfers, then free host memory."""
        for transfer in transfers:
            moving = _Moving(transfer, time.monotonic())
            self._moving.append(moving)
            try:
                (self._offload if transfer.to_host else self._restore)(moving)
                self._begin(moving)
            except Exception as error:  # fails this transfer only; a fault of the device shows in the next step
                moving.failed = str(error) or type(error).__name__
        for memory in dropped:
            self._copies.pop(memory, None)

    def poll(self) -> list[tuple[Transfer, bool]]:
        """Transfers that have ended since the last call, and whether each failed."""
        ended: list[tuple[Transfer, bool]] = []
        still: list[_Moving] = []
        now, ahead = time.monotonic(), set[bool]()
        arrived = [each for moving in self._moving for each in self._arrived(moving, now)]
        for group in self._pools.groups:
            self._write([each for each in arrived if each.group == group], group)
        for moving in self._moving:
            if moving.transfer.to_host in ahead:
                moving.since = now
            if self._over(moving, now):
                self._staged -= 0 if moving.transfer.to_host else sum(len(pages) for _, pages, _ in moving.arriving)
                ended.append((moving.transfer, moving.failed is not None))
                if moving.failed is not None:
                    log.warning("a KV transfer failed, its KV is recomputed: %s", moving.failed)
            else:
                still.append(moving)
                ahead.add(moving.transfer.to_host)
        self._moving = still
        return ended

    def abandon(self, dropped: Sequence[HostPages]) -> None:
        """Forget everything on its way, and free this host memory: the device's arrays are made anew."""
        self._moving, self._staged = [], 0
        for memory in dropped:
            self._copies.pop(memory, None)

    def _offload(self, moving: _Moving) -> None:
        (part,) = moving.transfer.parts
        copies = self._copies[part.copy.memory] = [], []
        for group in self._pools.groups:
            pages, at = (moving.transfer.pages, moving.transfer.windows)[group], 0
            for size in cut(len(pages), self._sizes):
                block = self._put(self._pools.gather(pages[at : at + size], group), self._host)
                copies[group].append(block)
                moving.arriving.append((block, np.empty(0, np.int32), group))
                at += size

    def _restore(self, moving: _Moving) -> None:
        transfer = moving.transfer
        for group in self._pools.groups:
            targets, at = (transfer.pages, transfer.windows)[group], 0
            for copy, offset, count in (transfer.parts, transfer.window_parts)[group]:
                if copy.memory not in self._copies:
                    raise LookupError("the host copy is missing")
                first = 0
                for block in self._copies[copy.memory][group]:
                    low, high = max(offset, first), min(offset + count, first + len(block))
                    if low < high:
                        pages = np.arange(NOWHERE, NOWHERE + len(block), dtype=np.int32)
                        pages[low - first : high - first] = targets[at : at + high - low]
                        moving.waiting.append((block, pages, group))
                        at += high - low
                    first += len(block)

    def _arrived(self, moving: _Moving, now: float) -> list[_Arrived]:
        """Take the blocks of a transfer that have arrived; only the first that has not is asked."""
        taken: list[_Arrived] = []
        if moving.failed is not None or moving.transfer.cancelled:
            return taken
        try:
            while moving.arriving and moving.arriving[0][0].is_ready():
                block, pages, group = moving.arriving.popleft()
                moving.since = now
                self._staged -= len(pages)
                block.block_until_ready()  # raises if the copy failed
                if not moving.transfer.to_host:
                    taken.append(_Arrived(moving, block, pages, group))
        except Exception as error:
            moving.failed = str(error) or type(error).__name__
        return taken

    def _write(self, arrived: list[_Arrived], group: int) -> None:
        """Scatter a group's restored blocks, in batches of no more pages than the largest block has."""
        batches: list[list[_Arrived]] = []
        room = 0
        for each in sorted(arrived, key=lambda each: -len(each.pages)):  # falling powers of two leave no gap
            if not room:
                batches.append([])
                room = self._sizes[0]
            batches[-1].append(each)
            room -= len(each.pages)
        for batch in batches:
            try:
                pages = np.concatenate([each.pages for each in batch])
                self._pools.scatter([each.block for each in batch], pages, group)
            except Exception as error:
                for each in batch:
                    each.moving.failed = str(error) or type(error).__name__

    def _begin(self, moving: _Moving) -> None:
        """Begin to copy the blocks of a restore that have room."""
        while moving.waiting and (not self._staged or self._staged + len(moving.waiting[0][1]) <= self._staging):
            block, pages, group = moving.waiting.popleft()
            moving.arriving.append((self._put(block, self._device), pages, group))
            self._staged += len(pages)

    def _over(self, moving: _Moving, now: float) -> bool:
        """Go on with a transfer, and return whether it has ended."""
        if moving.failed is not None or moving.transfer.cancelled:
            return True
        try:
            self._begin(moving)
        except Exception as error:
            moving.failed = str(error) or type(error).__name__
        if moving.arriving and now - moving.since > LIMIT_S:
            moving.failed = f"nothing of it has arrived for {LIMIT_S:.0f} s"
        return moving.failed is not None or not (moving.arriving or moving.waiting)
