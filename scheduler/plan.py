"""The plan of a step, which the scheduler hands to the runner."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .program import Request


class Plan(NamedTuple):
    """One step of R rows, as columns: rows that decode come first, then others that sample, then the rest."""

    requests: list[Request]
    """R."""
    slots: np.ndarray
    """``[R]`` int32: each request's row of the page table on the device."""
    starts: np.ndarray
    """``[R]`` int32: tokens ``start … start + count - 1`` of each request are computed."""
    counts: np.ndarray
    """``[R]`` int32."""
    num_decodes: int
    """Leading rows that feed back the one token that they sampled last."""
    samples: int
    """Leading rows that sample the token after theirs, those that decode among them."""
    admitted: list[Request]
    """Requests that have got their slot since the last plan."""
    changes: list[tuple[int, int, list[int]]]
    """Page-table updates since the last plan: (slot, index of the first page, page ids)."""
    tokens: int
    """Sum of all counts."""
    context: int
    """Tokens that all rows together attend to."""
    outputs: list[list[int]]
    """The outputs of the requests of the rows that sample, to which commit appends."""
    last: list[int]
    """Rows that sample the last token that their requests may generate, in order."""
    ended: list[Request]
    """Requests that have ended since, with a token under way. Written by Scheduler."""
