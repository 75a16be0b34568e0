"""Policies by name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from ..policy import Policy
from ..prediction import Predictor
from ..strategies import make_strategy
from .agentsched import AgentSched
from .astraea import Astraea, Terms
from .astraea_mlfq import AstraeaMLFQ
from .astraea_paper import AstraeaPaper, BatchedFCFS
from .cachettl import CacheTTL
from .fcfs import FCFS, ProgramFCFS
from .infercept import InferCept
from .lamps import LAMPS
from .mori import MORI
from .plas import PLAS
from .shortest import HRRN, SJF, SRPT
from .thunderagent import ThunderAgent

POLICIES: dict[str, Callable[[Predictor], Policy]] = {
    "fcfs": FCFS,
    "program-fcfs": ProgramFCFS,
    "sjf": SJF,
    "hrrn": HRRN,
    "plas": PLAS,
    "lamps": LAMPS,
    "infercept": InferCept,
    "cachettl": CacheTTL,
    "mori": MORI,
    "agentsched": AgentSched,
    "thunderagent": ThunderAgent,
    "astraea-paper": AstraeaPaper,
    "astraea-mlfq": AstraeaMLFQ,
    "astraea": Astraea,
    "srpt-clairvoyant": SRPT,
}
SERVING = [name for name in POLICIES if name != "srpt-clairvoyant"]
"""Policies that need no oracle."""
ABLATION: dict[str, Callable[[Predictor], Policy]] = {
    "astraea": Astraea,
    "astraea-turns": partial(Astraea, terms=Terms(turns=False)),
    "astraea-kinds": partial(Astraea, terms=Terms(kinds=False)),
    "astraea-memory": partial(Astraea, terms=Terms(memory=False)),
    "astraea-resident": partial(Astraea, terms=Terms(resident=0.0)),
    "astraea-wait": partial(Astraea, terms=Terms(wait=False)),
    "astraea-typical": partial(Astraea, terms=Terms(typical=0.01)),
    "astraea-exponent": partial(Astraea, terms=Terms(exponent=1.0)),
    "astraea-backfill": partial(Astraea, terms=Terms(backfill=0)),
    "astraea-costs": partial(Astraea, terms=Terms(costs=False)),
    "astraea-gate": partial(Astraea, terms=Terms(gate=False)),
    "fcfs-batches": BatchedFCFS,
}
"""``astraea`` with one term left out, and the paper's batches without its order; for studies."""


def make_policy(name: str, predictor: Predictor | None = None, strategy: str | None = None) -> Policy:
    """The policy of that name; its residency strategy by name, or else the one that belongs to it.

    Raises:
        ValueError: there is none; the message lists them.
    """
    make = POLICIES.get(name) or ABLATION.get(name)
    if make is None:
        raise ValueError(f"no policy is called {name!r}; there are {', '.join(POLICIES)}")
    policy = make(predictor or Predictor())
    if strategy is not None:
        policy.strategy = make_strategy(strategy, policy.predict)
    return policy
