"""Sizes of a scheduler, and its counts."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from .transfer import HostTier

NO_HOST = HostTier()


@dataclass(frozen=True)
class SchedulerConfig:
    num_pages: int
    """Scrap page included."""
    page_size: int
    max_seqs: int
    max_step_tokens: int
    max_context: int
    max_waiting: int = 1024
    """Requests that wait for their first start, at most; preempted ones come back beyond it."""
    max_programs: int = 8192
    session_ttl_s: float = 600.0
    host: HostTier = NO_HOST

    @property
    def pages_per_seq(self) -> int:
        return -(-self.max_context // self.page_size)


@dataclass(frozen=True)
class SchedulerStats:
    """Programs conserve: created = live + finished + failed + expired."""

    running: int
    waiting: int
    programs: int
    in_tool_wait: int
    io_intensive: int
    """Live programs of that class; the others are compute-intensive."""
    created: int
    finished: int
    failed: int
    expired: int
    preemptions: int
    free_pages: int
    retained_pages: int
    """Held by programs without a running request; can be had at any time."""
    cached_pages: int
    """Free, and still found by programs whose tokens begin alike."""
    computed_tokens: int
    reused_tokens: int
    """Tokens of admitted requests whose KV was still there, on the device or the host."""
    recomputed_tokens: int
    """Tokens computed again because their KV had been dropped."""
    reclaimed_pages: int
    """Dropped under pressure."""
    offloaded_pages: int
    restored_pages: int
    failed_transfers: int
    decisions: dict[str, int]
    """Of the residency manager: "what: why", and how often."""

    def flat(self, page_bytes: int) -> dict[str, int]:
        """Each field as a number; ``decisions`` by what and why, and of pages that were moved the bytes, too."""
        fields = asdict(self)
        decisions: dict[str, int] = fields.pop("decisions")
        moved = {name: fields[f"{name}_pages"] * page_bytes for name in ("offloaded", "restored")}
        return {
            **fields,
            **{f"{name}_bytes": count for name, count in moved.items()},
            **{f"kv {what}": count for what, count in decisions.items()},
        }
