"""What a step computes, as the scheduler hands it to whoever runs it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from .program import Segment


class Row(NamedTuple):
    """Tokens ``start … start + tokens - 1`` of a segment, and whether the step samples the one after."""

    segment: Segment
    start: int
    tokens: int
    samples: bool


@dataclass(frozen=True, slots=True)
class Plan:
    """One step."""

    rows: list[Row]
    admitted: list[Segment]
    """Segments that have got their slot since the last plan."""
    tokens: int
    context: int
    """Tokens that its rows attend to, all together."""
