"""Policies by name."""

from __future__ import annotations

from collections.abc import Callable

from ..policy import Policy
from ..prediction import Predictor
from .fcfs import FCFS, ProgramFCFS
from .shortest import HRRN, SJF, SRPT

POLICIES: dict[str, Callable[[Predictor], Policy]] = {
    "fcfs": FCFS,
    "program-fcfs": ProgramFCFS,
    "sjf": SJF,
    "hrrn": HRRN,
    "srpt-clairvoyant": SRPT,
}


def make_policy(name: str, predictor: Predictor | None = None) -> Policy:
    """The policy of that name.

    Raises:
        ValueError: there is none; the message lists them.
    """
    if name not in POLICIES:
        raise ValueError(f"no policy is called {name!r}; there are {', '.join(POLICIES)}")
    return POLICIES[name](predictor or Predictor())
