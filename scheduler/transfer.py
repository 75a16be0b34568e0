"""Copies of KV in host memory, and the transfers that make and read them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from .program import Program, Request


@dataclass(frozen=True)
class HostTier:
    """Sizes of the host tier. By default there is none."""

    pages: int = 0
    """Pages that fit, each with its window page."""
    staging: int = 0
    """Pages on their way to the host at most: the device memory given to staging."""
    layers: tuple[int, int] = (1, 0)
    """Layers of a page, and of a window page: what they take of the memory."""

    @property
    def size(self) -> int:
        """Its memory, in pages of one layer."""
        return self.pages * sum(self.layers)

    def taken(self, pages: int, windows: int) -> int:
        """The memory that so many pages and window pages take, in pages of one layer."""
        return pages * self.layers[0] + windows * self.layers[1]


@dataclass(slots=True, eq=False)
class HostPages:
    """Pages of host memory written by one transfer; programs with a common history hold them together.

    Each is an object of its own and never used for anything else, so a late transfer cannot be taken for a new one:
    that is what generation numbers of host slots are for elsewhere.
    """

    count: int
    windows: int = 0
    """The last pages among them that have their window pages with them."""
    holders: int = 1
    """Copies that stand on them."""
    ready: bool = False
    """Their content has arrived."""
    tenant: int = 0
    """Number of the tenant who holds them, among those who share pages."""


@dataclass(slots=True, eq=False)
class HostCopy:
    """Consecutive pages of one program in host memory."""

    first: int
    """Index of its first page among the program's."""
    used: int
    """Pages that count, from the first on."""
    memory: HostPages
    """Where they lie, which may be more pages."""
    dropped: bool = False

    @property
    def end(self) -> int:
        return self.first + self.used

    @property
    def window_first(self) -> int:
        """Index of the first of the program's pages that have their window pages here; they go on up to the end."""
        return self.first + self.memory.count - self.memory.windows

    @property
    def ready(self) -> bool:
        """Whether the copy has arrived."""
        return self.memory.ready


class Part(NamedTuple):
    """``pages`` pages of a copy, from the ``offset``-th on."""

    copy: HostCopy
    offset: int
    pages: int


@dataclass(slots=True, eq=False)
class Transfer:
    """A copy between device and host, for whoever runs the plan; report its end to ``Scheduler.transferred``."""

    program: Program
    pages: tuple[int, ...]
    """Device pages: read by an offload before anything later is dispatched; written by a restore."""
    parts: tuple[Part, ...]
    """Host pages, as many: one whole copy that an offload makes, or the parts that a restore reads, in order."""
    to_host: bool
    began: float
    windows: tuple[int, ...] = ()
    """Window pages, read or written like the others."""
    window_parts: tuple[Part, ...] = ()
    """Window pages in host memory, as many, in order; they are counted apart from the pages there."""
    request: Request | None = None
    """The request that waits for this restore; None: an offload."""
    cancelled: bool = False
    """Set by the scheduler: a restore must write its pages no more, and the end of the transfer has no effect."""
