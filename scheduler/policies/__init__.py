"""Policies by name."""

from __future__ import annotations

from collections.abc import Callable

from ..policy import Policy
from ..prediction import Predictor
from .agentsched import AgentSched
from .astraea import Astraea
from .astraea_paper import AstraeaPaper
from .continuum import Continuum
from .fcfs import FCFS, ProgramFCFS
from .infercept import InferCept
from .lamps import LAMPS
from .plas import PLAS
from .shortest import HRRN, SJF, SRPT
from .thunderagent import ThunderAgent

POLICIES: dict[str, Callable[[Predictor], Policy]] = {
    "astraea": Astraea,
    "astraea-paper": AstraeaPaper,
    "fcfs": FCFS,
    "program-fcfs": ProgramFCFS,
    "sjf": SJF,
    "hrrn": HRRN,
    "plas": PLAS,
    "lamps": LAMPS,
    "infercept": InferCept,
    "continuum": Continuum,
    "agentsched": AgentSched,
    "thunderagent": ThunderAgent,
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
