"""The host tier: copies of KV pages in pinned host memory, made and read while steps go on.

To the host: the runner gathers pages into one contiguous block on the device (from then on the pages may be written
again, because the device works in the order of dispatch), and the block is copied to ``pinned_host`` memory. Back: the
block is copied to the device, and when it has arrived the runner scatters it into the pools. Nothing here waits: what
has arrived is asked for once per turn of the serving loop, by the one thread that dispatches.

Blocks have as many pages as a power of two, so a few compiled shapes serve every transfer and no host memory is padded.
Never ``unpinned_host``: pageable copies are slow on GPUs, and came back with the wrong stride on TPUs.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import jax
import numpy as np

from astraea_jax.scheduler.transfer import HostCopy, Transfer

log = logging.getLogger(__name__)

PINNED = "pinned_host"
LARGEST_BLOCK = 64
"""Pages."""
NOWHERE = 2**30
"""Page ids from here on are beyond every pool."""
LIMIT_S = 30.0
"""A transfer that takes longer is given up, and its KV computed again."""

Put = Callable[[jax.Array, jax.sharding.Sharding], jax.Array]


class Pools(Protocol):
    """Who owns the paged arrays."""

    def gather(self, pages: Sequence[int]) -> jax.Array:
        """A block ``[n, L, …]`` of pages, on the device."""

    def scatter(self, block: jax.Array, pages: np.ndarray) -> None:
        """Write a block to ``pages [n]`` int32; ids beyond the pool are passed over."""


def block_sizes(largest: int) -> list[int]:
    """Pages of the blocks that transfers are cut into, falling powers of two."""
    return [1 << i for i in range(min(largest, LARGEST_BLOCK).bit_length() - 1, -1, -1)]


def block_sharding(pages: jax.Array | jax.ShapeDtypeStruct) -> jax.sharding.Sharding:
    """Where a block of pages like ``pages [P, …]`` lies on the device."""
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
    """A transfer on its way."""

    transfer: Transfer
    began: float
    waiting: deque[tuple[jax.Array, np.ndarray]] = field(default_factory=deque)
    """Of a restore: blocks on the host and the pages to write them to, not yet begun."""
    arriving: deque[tuple[jax.Array, np.ndarray]] = field(default_factory=deque)
    """Blocks on their way, and of a restore the pages to write them to."""
    failed: str | None = None


class HostStore:
    """Holds the host copies that the scheduler has asked for. Used by the thread that dispatches steps.

    Args:
        pools: who owns the paged arrays.
        sharding: of a block on the device; see :func:`block_sharding`.
        staging: pages of device memory for blocks on their way back, at most. (What is on its way to the host, the
            scheduler bounds.)
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
        self._copies: dict[HostCopy, list[jax.Array]] = {}
        self._moving: list[_Moving] = []

    @property
    def busy(self) -> bool:
        """Something is on its way."""
        return bool(self._moving)

    @property
    def pages(self) -> int:
        """Pages of host memory in use."""
        return sum(len(block) for blocks in self._copies.values() for block in blocks)

    def start(self, transfers: Sequence[Transfer], dropped: Sequence[HostCopy]) -> None:
        """Begin transfers, then forget copies."""
        for transfer in transfers:
            moving = _Moving(transfer, time.monotonic())
            self._moving.append(moving)
            try:
                (self._offload if transfer.to_host else self._restore)(moving)
            except Exception as error:  # of one transfer; what fails on the device itself shows in the next step
                moving.failed = str(error) or type(error).__name__
        for copy in dropped:
            self._copies.pop(copy, None)

    def poll(self) -> list[tuple[Transfer, bool]]:
        """Transfers that have ended since the last call, and whether each failed."""
        ended, still = [], []
        for moving in self._moving:
            if self._over(moving):
                self._staged -= 0 if moving.transfer.to_host else sum(len(pages) for _, pages in moving.arriving)
                ended.append((moving.transfer, moving.failed is not None))
                if moving.failed is not None:
                    log.warning("a KV transfer failed, what it moved is computed again: %s", moving.failed)
            else:
                still.append(moving)
        self._moving = still
        return ended

    def abandon(self, dropped: Sequence[HostCopy]) -> None:
        """Forget everything on its way, and these copies: the device's arrays are made anew."""
        self._moving, self._staged = [], 0
        for copy in dropped:
            self._copies.pop(copy, None)

    def _offload(self, moving: _Moving) -> None:
        (part,) = moving.transfer.parts
        blocks = self._copies[part.copy] = []
        at = 0
        for size in self._cut(len(moving.transfer.pages)):
            block = self._put(self._pools.gather(moving.transfer.pages[at : at + size]), self._host)
            blocks.append(block)
            moving.arriving.append((block, np.empty(0, np.int32)))
            at += size

    def _restore(self, moving: _Moving) -> None:
        at = 0
        for copy, offset, count in moving.transfer.parts:
            if copy not in self._copies:
                raise LookupError("a host copy is lost")
            first = 0
            for block in self._copies[copy]:
                low, high = max(offset, first), min(offset + count, first + len(block))
                if low < high:
                    pages = np.arange(NOWHERE, NOWHERE + len(block), dtype=np.int32)
                    pages[low - first : high - first] = moving.transfer.pages[at : at + high - low]
                    moving.waiting.append((block, pages))
                    at += high - low
                first += len(block)

    def _over(self, moving: _Moving) -> bool:
        """Take in what has arrived and begin what has room; whether the transfer has ended."""
        back = not moving.transfer.to_host
        if moving.failed is None and time.monotonic() - moving.began > LIMIT_S:
            moving.failed = f"it took longer than {LIMIT_S:.0f} s"
        if moving.failed is not None or moving.transfer.cancelled:
            return True
        try:
            while moving.arriving and moving.arriving[0][0].is_ready():  # type: ignore[attr-defined]
                block, pages = moving.arriving.popleft()
                self._staged -= len(pages)
                block.block_until_ready()  # raises if the copy went wrong
                if back:
                    self._pools.scatter(block, pages)
            while moving.waiting and (not self._staged or self._staged + len(moving.waiting[0][1]) <= self._staging):
                block, pages = moving.waiting.popleft()
                moving.arriving.append((self._put(block, self._device), pages))
                self._staged += len(pages)
        except Exception as error:
            moving.failed = str(error) or type(error).__name__
        return moving.failed is not None or not (moving.arriving or moving.waiting)

    def _cut(self, count: int) -> list[int]:
        """Block sizes that add up to ``count``."""
        sizes = []
        for size in self._sizes:
            sizes += [size] * (count // size)
            count %= size
        return sizes
