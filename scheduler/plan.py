"""What a step computes, as the scheduler hands it to whoever runs it."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .program import Request


class Plan(NamedTuple):
    """One step of R rows, as columns."""

    requests: list[Request]
    """R."""
    slots: np.ndarray
    """``[R]`` int32, each one's row of the page table on the device."""
    starts: np.ndarray
    """``[R]`` int32: its tokens ``start … start + count - 1`` are computed."""
    counts: np.ndarray
    """``[R]`` int32."""
    steady: int
    """The first so many rows feed back the one token that they sampled last."""
    samples: int
    """The first so many rows, the steady ones among them, sample the token after."""
    admitted: list[Request]
    """Requests that have got their slot since the last plan."""
    changes: list[tuple[int, int, list[int]]]
    """What the page table has got since the last plan: a slot, and from which place on it has which pages."""
    tokens: int
    """All counts together."""
    context: int
    """Tokens that its rows attend to, all together."""
