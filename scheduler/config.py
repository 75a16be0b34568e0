"""Sizes of a scheduler, and its counters."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import asdict, dataclass, field

from .program import Rejected
from .transfer import HostTier
from .windows import Window

NO_HOST = HostTier()


@dataclass(frozen=True)
class SchedulerConfig:
    """Sizes and bounds of a scheduler."""

    num_pages: int
    """The null page included."""
    page_size: int
    max_seqs: int
    max_step_tokens: int
    max_context: int
    max_waiting: int = 1024
    """Requests that wait for their first start, at most; preempted ones come back beyond it."""
    max_programs: int = 8192
    """Programs remembered at once, at most; see :class:`~.registry.Registry`."""
    session_ttl_s: float = 600.0
    host: HostTier = NO_HOST
    window: Window | None = None
    """What layers with a window have; None: no layer has one."""
    kv_events: bool = False
    """Whether a log tells which blocks are cached; see :mod:`~.kv_log`."""
    tenant_weights: Mapping[Hashable, float] = field(default_factory=dict)
    """Shares of the machine by owner, in proportion; who is not named has 1. See :mod:`~.fairness`."""

    def __post_init__(self) -> None:
        if self.max_running < 1:
            raise ValueError(f"{self.window} has no room for a single request")

    @property
    def max_running(self) -> int:
        """Requests that run at once, at most: as many as have slots, and whose windows fit."""
        if self.window is None:
            return self.max_seqs
        return min(self.max_seqs, self.window.runnable(self.page_size, self.max_step_tokens))

    @property
    def pages_per_seq(self) -> int:
        return -(-self.max_context // self.page_size)

    def check_size(self, prompt: int, max_tokens: int) -> None:
        """Raise Rejected if a request of so many tokens can never run."""
        capacity = min(self.max_context, (self.num_pages - 1) * self.page_size)
        if not prompt or max_tokens < 1:
            raise Rejected(f"a prompt of {prompt} tokens and max_tokens {max_tokens}: both must be at least 1")
        if prompt + max_tokens > capacity:
            raise Rejected(f"a prompt of {prompt} tokens and max_tokens {max_tokens} exceed the {capacity} that fit")


@dataclass(frozen=True)
class SchedulerStats:
    """Counts of requests, programs and pages.

    Programs conserve: created = programs + finished + failed + expired + moved.
    """

    running: int
    """Requests with a slot."""
    waiting: int
    """Requests without: those that have not started, and those that were preempted."""
    programs: int
    """Programs that have not ended."""
    in_tool_wait: int
    """Programs without a request, other than those that wait for a human."""
    in_human_wait: int
    """Programs whose job has ended, and that a human may go on with."""
    io_intensive: int
    """Programs whose requests cost less than the average; the others are compute-intensive."""
    created: int
    finished: int
    failed: int
    expired: int
    moved: int
    """Programs that have been handed over to another replica."""
    preemptions: int
    free_pages: int
    retained_pages: int
    """Pages that only programs without a running request hold; they can be evicted at any time."""
    cached_pages: int
    """Free pages that programs whose tokens begin alike still find."""
    computed_tokens: int
    reused_tokens: int
    """Tokens of admitted requests whose KV was still there, on the device or the host."""
    recomputed_tokens: int
    """Tokens of admitted requests that are computed again because their KV was dropped."""
    dropped_pages: int
    """Pages of KV dropped under pressure: neither the device nor the host holds them any more."""
    offloaded_pages: int
    restored_pages: int
    failed_transfers: int
    decisions: dict[str, int]
    """Counts of what the residency manager did, and why: "what: why" -> count."""
    sessions: int
    """Live programs that their callers have named."""
    programs_on_host: int
    """Programs of whose KV the host holds a copy."""
    host_pages: int
    """Pages of host memory in use."""
    free_windows: int
    """Window pages that no program holds."""
    valid_windows: int
    """Those of them that programs whose tokens begin alike still find."""
    offloaded_windows: int
    restored_windows: int

    def flat(self, bytes_of: Callable[[int, int], int]) -> dict[str, int]:
        """Every field as a number: ``decisions`` as one "kv what: why" each, and what was moved in bytes as well.

        ``bytes_of`` says how many bytes so many pages and window pages have.
        """
        fields = asdict(self)
        decisions: dict[str, int] = fields.pop("decisions")
        ways = ("offloaded", "restored")
        moved = {name: bytes_of(fields[f"{name}_pages"], fields[f"{name}_windows"]) for name in ways}
        return {
            **fields,
            **{f"{name}_bytes": count for name, count in moved.items()},
            **{f"kv {what}": count for what, count in decisions.items()},
        }
