"""InferCept (arXiv 2402.01869): arrival order kept over interceptions, evicted by least waste.

The waste is weighed in :class:`~..strategies.MinWaste`.
"""

from __future__ import annotations

from .fcfs import ProgramFCFS


class InferCept(ProgramFCFS):
    residency = "infercept"
