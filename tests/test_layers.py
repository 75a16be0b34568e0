"""Imports run downwards only (ARCHITECTURE.md): a module sees the floors below its own."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

FLOORS = (
    {"errors"},
    {"models", "scheduler", "folders"},
    {"kernels"},
    {"kv_cache"},
    {"engine"},
    {"agents"},
    {"frontends"},
    {"lab"},
    {"__init__"},
)
"""Rooms of ``astraea_jax/`` from the ground up. A room is free inside."""

SCHEDULER_FLOORS = (
    {"distribution", "hazards", "handover", "histogram", "page_shares", "placement", "prefix", "wait"},
    {"program", "rival_placements", "router", "transfer"},
    {"context_tree", "contexts", "eviction", "kv_log", "offer", "plan", "view", "windows"},
    {"config", "decode_batch", "pages", "start_waits"},
    {"copies", "costs", "fairness", "leases", "registry", "wait_times"},
    {"prediction", "retained", "running"},
    {"load", "strategy", "rival_strategies", "strategies"},
    {"evictor", "policy"},
    {"residency"},
    {"admission", "policies", "waits"},
    {"preparation"},
    {"planner"},
    {"branches"},
    {"scheduler"},
    {"simulation"},
)
"""Modules of ``scheduler/`` from the ground up; those of one floor may see each other."""
MAY_SIMULATE = {"lab", "scheduler"}
"""Rooms that may import the simulation. Nothing that serves does."""

HEIGHT = {room: height for height, floor in enumerate(FLOORS) for room in floor}
SCHEDULER_HEIGHT = {module: height for height, floor in enumerate(SCHEDULER_FLOORS) for module in floor}
SCHEDULER_MAY_USE = {*sys.stdlib_module_names, "numpy"}

MODULES = sorted(
    path.relative_to(ROOT) for room in ("astraea_jax", "models", "scheduler") for path in (ROOT / room).rglob("*.py")
)


def imports(source: str, package: str) -> Iterator[str]:
    """Absolute dotted names of everything ``source`` imports; ``package`` resolves its relative imports."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: 1 - node.level or None] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def misplaced(path: Path, source: str) -> list[str]:
    """Imports that the module at ``path`` (relative to the root, not through a link) must not make."""
    parts = path.with_suffix("").parts
    if parts[0] != "astraea_jax":
        parts = ("astraea_jax", *parts)
    room = parts[1]
    if room == "scheduler" and parts[2] != "__init__":
        assert parts[2] in SCHEDULER_HEIGHT, f"{path}: give the new module {parts[2]!r} its floor in SCHEDULER_FLOORS"
    assert room in HEIGHT, f"{path}: give the new room {room!r} its floor in FLOORS and in ARCHITECTURE.md"
    found = []
    for name in imports(source, ".".join(parts[:-1])):
        top, _, rest = name.partition(".")
        other, _, inside = rest.partition(".")
        module = inside.partition(".")[0]
        if other == "scheduler" and module == "simulation" and room not in MAY_SIMULATE:
            found.append(name)
        if top != "astraea_jax":
            if room == "scheduler" and top not in SCHEDULER_MAY_USE:
                found.append(name)
        elif room in ("models", "scheduler"):
            if other != room or (room == "scheduler" and SCHEDULER_HEIGHT[module] > SCHEDULER_HEIGHT[parts[2]]):
                found.append(name)
        elif other != room and HEIGHT.get(other, len(FLOORS)) >= HEIGHT[room]:
            found.append(name)
    return found


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_imports_run_downwards(path: Path) -> None:
    assert misplaced(path, (ROOT / path).read_text()) == []


@pytest.mark.parametrize(
    ("path", "source", "bad"),
    [
        ("scheduler/pages.py", "import jax.numpy as jnp", ["jax.numpy"]),
        ("scheduler/pages.py", "import numpy as np\nfrom .program import Program", []),
        ("scheduler/pages.py", "from ..errors import Overloaded", ["astraea_jax.errors.Overloaded"]),
        ("scheduler/running.py", "from .scheduler import Scheduler", ["astraea_jax.scheduler.scheduler.Scheduler"]),
        ("scheduler/policies/plas.py", "from ..policy import Policy\nfrom .fcfs import FCFS", []),
        ("scheduler/policy.py", "from .policies import POLICIES", ["astraea_jax.scheduler.policies.POLICIES"]),
        ("scheduler/scheduler.py", "from .simulation import Oracle", ["astraea_jax.scheduler.simulation.Oracle"]),
        ("scheduler/simulation/oracle.py", "from ..prediction import Predictor", []),
        (
            "astraea_jax/engine/engine.py",
            "from astraea_jax.scheduler.simulation.oracle import Oracle",
            ["astraea_jax.scheduler.simulation.oracle.Oracle"],
        ),
        ("astraea_jax/lab/replay.py", "from astraea_jax.scheduler.simulation.oracle import Oracle", []),
        ("models/decoder.py", "import jax\nfrom .config import ModelConfig", []),
        ("models/decoder.py", "from .. import kernels", ["astraea_jax.kernels"]),
        ("models/decoder.py", "from astraea_jax.scheduler import pages", ["astraea_jax.scheduler.pages"]),
        ("astraea_jax/engine/engine.py", "from ..frontends import llm", ["astraea_jax.frontends.llm"]),
        ("astraea_jax/engine/engine.py", "def late():\n    from ..agents import go", ["astraea_jax.agents.go"]),
        ("astraea_jax/frontends/rpc/server.py", "from .wire import POOL\nfrom ...engine import Engine", []),
        ("astraea_jax/frontends/rpc/server.py", "import astraea_jax", ["astraea_jax"]),
    ],
)
def test_the_check_itself(path: str, source: str, bad: list[str]) -> None:
    assert misplaced(Path(path), source) == bad


@pytest.mark.parametrize("path", [path for path in MODULES if path.parent.name != "policies"], ids=str)
def test_architecture_names_every_module(path: Path) -> None:
    assert path.name == "__init__.py" or f"{path.name}`" in (ROOT / "ARCHITECTURE.md").read_text()


def test_links_are_relative() -> None:
    """An absolute link would work on one machine only."""
    for room in ("models", "scheduler"):
        assert (ROOT / "astraea_jax" / room).readlink() == Path("..") / room
