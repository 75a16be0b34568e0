"""Hints of clients about what comes next: read from several peers' shapes, bounded, and each with an outcome.

A hint never changes a result. It says how long the wait after a turn will be, for how long KV is worth keeping, or that
a request is less urgent. A value that cannot be is ignored or clipped, and its outcome says so; only a shape that is
none of these is an error (:mod:`.hint_fields`). Top-level ``priority`` is vLLM's, where lower numbers come first;
Dynamo's, in ``nvext``, has the opposite polarity.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from astraea_jax.frontends.hint_fields import (
    HintFields,
    KvHints,
    ToolProfileAction,
    ToolWait,
    ToolWaitAction,
    UnknownAction,
)
from astraea_jax.scheduler.wait import ACCEPTED, CLIPPED, MAX_HINT_S, BoundedWait, Wait

LOWEST_PRIORITY = 2**31 - 1
Result = Literal["accepted", "clipped", "ignored"]
TTLS = {"5m": 300.0, "1h": 3_600.0}
"""Values of ``cache_control.ttl`` in seconds."""
RETENTIONS = {"24h": 86_400.0, "in_memory": None, "in-memory": None}
"""Values of ``prompt_cache_retention`` in seconds; None is what is done without it."""
UNUSED = ("osl", "strict_priority", "speculative_prefill", "latency_sensitivity")
"""Fields of ``nvext.agent_hints`` that are known and change nothing here."""


@dataclass(frozen=True)
class Outcome:
    """What has become of one hint."""

    hint: str
    """Where it stands: a field, or the id of an action."""
    outcome: Result
    why: str = ""

    def plain(self) -> dict[str, str]:
        """Return it as JSON."""
        return {"hint": self.hint, "outcome": self.outcome} | ({"why": self.why} if self.why else {})


@dataclass(frozen=True)
class Hints:
    """What a request says about what comes next. Times in seconds."""

    expected_s: float | None = None
    """Until the next request of the program, whatever the program waits for."""
    tools_s: float | None = None
    """Until then, if the turn calls tools."""
    profile: Mapping[str, float] = field(default_factory=dict)
    """How long each tool usually takes."""
    keep_s: float | None = None
    """For how long KV is worth keeping."""
    priority: int = 0
    """As vLLM has it: 0 is what everybody has, and higher numbers come later."""
    outcomes: tuple[Outcome, ...] = ()

    def expected_of(self, tools: Sequence[str]) -> float | None:
        """Return how long the wait after a turn that calls these tools will be; None: nothing was said of it."""
        if not tools:
            return self.expected_s
        if self.tools_s is not None:
            return self.tools_s
        known = [self.profile[tool] for tool in tools if tool in self.profile]
        return max(known) if len(known) == len(tools) else self.expected_s


NO_HINTS = Hints()


def read_hints(body: HintFields, ttls: Iterable[str] = ()) -> Hints:
    """Read the hints of a request.

    Args:
        body: the request's.
        ttls: lifetimes that stand at parts of the prompt, in Anthropic's API.
    """
    reader = _Reader()
    agent = body.nvext.agent_hints if body.nvext else None
    expected = tools = None
    profile: dict[str, float] = {}
    if agent is not None:
        expected = reader.seconds("nvext.agent_hints.iat", agent.iat)
        for name in UNUSED:
            if getattr(agent, name) is not None:
                reader.say(f"nvext.agent_hints.{name}", "ignored", "it changes nothing here")
    if body.kv_hints is not None:
        for where, action in named_actions(body.kv_hints):
            match action:
                case ToolWaitAction(payload=payload) if body.kv_hints.known:
                    tools = reader.expected(where, payload)
                case ToolProfileAction(payload=times) if body.kv_hints.known:
                    profile |= reader.profile(where, times)
                case _:
                    reader.say(where, "ignored", unknown(body.kv_hints))
    keep = reader.keep(body, ttls)
    return Hints(expected, tools, profile, keep, reader.priority(body), tuple(reader.outcomes))


def read_tool_wait(where: str, wait: ToolWait) -> tuple[float | None, Outcome]:
    """Return the time that an announced wait will take, and the outcome of its announcement."""
    reader = _Reader()
    expected = reader.expected(where, wait)
    return expected, reader.outcomes[0]


def named_actions(envelope: KvHints) -> list[tuple[str, ToolWaitAction | ToolProfileAction | UnknownAction]]:
    """Return the actions, each with its id, or its place if it has none."""
    return [(action.action_id or f"kv_hints.actions.{i}", action) for i, action in enumerate(envelope.actions)]


def unknown(envelope: KvHints) -> str:
    """Return why an action of this envelope is skipped."""
    return "unknown action" if envelope.known else "unknown protocol_version"


class _Reader:
    """Bounds values, and notes the outcome of each."""

    def __init__(self) -> None:
        self.outcomes: list[Outcome] = []

    def say(self, where: str, outcome: Result, why: str = "") -> None:
        self.outcomes.append(Outcome(where, outcome, why))

    def seconds(self, where: str, ms: float | None) -> float | None:
        """A time of milliseconds, which the outcome is noted of."""
        if ms is None:
            return None
        value, outcome = _bounded(ms / 1000)
        self.say(where, *outcome)
        return value

    def expected(self, where: str, wait: ToolWait) -> float | None:
        ms = wait.expected_ms
        if wait.max_ms is None or wait.max_ms < 0 or not ms > wait.max_ms:
            return self.seconds(where, ms)
        value, (outcome, _) = _bounded(wait.max_ms / 1000)
        self.say(where, "clipped" if outcome == "accepted" else outcome, "expected_ms is above max_ms")
        return value

    def profile(self, where: str, times: Mapping[str, float]) -> dict[str, float]:
        read = {tool: _bounded(ms / 1000) for tool, ms in times.items()}
        kept = {tool: value for tool, (value, _) in read.items() if value is not None}
        worst = [outcome for _, outcome in read.values() if outcome[0] != "accepted"]
        self.say(where, *(worst[0] if worst else ("accepted", "") if read else ("ignored", "it names no tool")))
        return kept

    def keep(self, body: HintFields, ttls: Iterable[str]) -> float | None:
        given = [("cache_control.ttl", ttl, TTLS) for ttl in dict.fromkeys(ttls)]
        if body.cache_control is not None and body.cache_control.ttl is not None:
            given.append(("cache_control.ttl", body.cache_control.ttl, TTLS))
        if body.nvext is not None and body.nvext.cache_control is not None and body.nvext.cache_control.ttl is not None:
            given.append(("nvext.cache_control.ttl", body.nvext.cache_control.ttl, TTLS))
        times = [self._keep(where, word, known) for where, word, known in given]
        if body.prompt_cache_retention is not None:
            times.append(self._keep("prompt_cache_retention", body.prompt_cache_retention, RETENTIONS))
        return max((time for time in times if time is not None), default=None)

    def _keep(self, where: str, word: str, known: Mapping[str, float | None]) -> float | None:
        if word not in known:
            self.say(where, "ignored", f"it must be one of {', '.join(known)}")
            return None
        seconds = known[word]
        clipped = seconds is not None and seconds > MAX_HINT_S
        self.say(where, *(("clipped", f"at most {MAX_HINT_S:.0f} s") if clipped else ("accepted",)))
        return min(seconds, MAX_HINT_S) if seconds is not None else None

    def priority(self, body: HintFields) -> int:
        agent = body.nvext.agent_hints if body.nvext else None
        if agent is not None and agent.priority is not None and body.priority is not None:
            self.say("nvext.agent_hints.priority", "ignored", "priority counts")
        elif agent is not None and agent.priority is not None:
            return self._priority("nvext.agent_hints.priority", -agent.priority)
        return 0 if body.priority is None else self._priority("priority", body.priority)

    def _priority(self, where: str, value: int) -> int:
        if value < 0:
            self.say(where, "clipped", "a client may only lower its own priority")
        elif value > LOWEST_PRIORITY:
            self.say(where, "clipped", f"at most {LOWEST_PRIORITY}")
        else:
            self.say(where, "accepted")
        return min(max(value, 0), LOWEST_PRIORITY)


def _bounded(seconds: float) -> tuple[float | None, tuple[Result, str]]:
    """Return the time as the scheduler will take it, and what becomes of it."""
    bounded = BoundedWait.of(Wait(expected_s=seconds))
    if bounded.hinted == ACCEPTED:
        return seconds, ("accepted", "")
    if bounded.hinted == CLIPPED:
        return bounded.wait.expected_s, ("clipped", f"at most {MAX_HINT_S:.0f} s")
    return None, ("ignored", "it is no time")
