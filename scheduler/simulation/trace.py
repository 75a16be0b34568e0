"""Agent programs as recorded or generated: what they ask of the model and how long their tools take.

One JSON object per line is one program: ``{"program", "arrival_s", "source", "segments": [{"new_prompt_tokens",
"cached_prompt_tokens", "output_tokens", "tool": {"name", "seconds", "human"} | null}]}``. A segment is a request. Its
prompt is its cached plus its new tokens, where cached is what a perfect cache of the program's own tokens holds.
The last request has no tool. ``human`` may be missing; if true, a human's next message is waited for instead of a tool.
Generated programs may begin with what others have, too, and begin further ones (``sharing.py``).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ..wait import Wait

MOST_TOKENS = 2**31 - 1
"""Tokens of a context; positions have 32 bits."""
MOST_S = 1e9
"""Seconds of an arrival or a tool, beyond which a clock of 64 bits would round steps away."""


class TraceError(ValueError):
    """A trace cannot be replayed; the message names the program and the fault."""


@dataclass(frozen=True)
class TraceRequest:
    """One request of a recorded program, and the tool it led to."""

    cached: int
    """Prompt tokens that repeat the program's earlier tokens, or of a first prompt what others have begun with."""
    new: int
    output: int
    tool: str | None = None
    """The tool that ends it; None at the end of the program."""
    tool_s: float = 0.0
    human: bool = False
    """Whether it ends a job, so that the time until the next request is a human's."""
    children: tuple[TraceProgram, ...] = ()
    """Programs that begin when it ends, and whose ends its program waits for besides the tool."""

    @property
    def wait(self) -> Wait:
        """What its program waits for after it."""
        return Wait() if self.human or self.tool is None else Wait((self.tool,))

    @property
    def prompt(self) -> int:
        return self.cached + self.new

    @property
    def context(self) -> int:
        """Tokens at its end."""
        return self.prompt + self.output


@dataclass(frozen=True)
class TraceProgram:
    """A recorded program; its requests in order."""

    id: str
    requests: tuple[TraceRequest, ...]
    arrival_s: float | None = None
    """None: the experiment chooses."""
    owner: str = ""
    """Tenant whose it is."""
    lineage: tuple[tuple[int, str], ...] = ()
    """Where its text comes from if it shares the beginning: positions, ascending from 0, and the names of what goes on
    from each; the last is its own. Programs have in common what comes before the first difference. (): it shares
    nothing."""

    def __post_init__(self) -> None:
        if not self.requests:
            raise TraceError(f"program {self.id!r} has no requests")
        if self.arrival_s is not None and not 0 <= self.arrival_s <= MOST_S:
            raise TraceError(f"program {self.id!r} arrives at {self.arrival_s}; it must be from 0 to {MOST_S:g} s")
        self._check_lineage()
        held = self.shared
        for i, s in enumerate(self.requests):
            if min(s.cached, s.new - 1, s.output - 1) < 0:
                raise TraceError(
                    f"program {self.id!r}, request {i}: {s.cached} cached, {s.new} new and {s.output} output tokens; "
                    "cached may be 0, the others must be at least 1"
                )
            if s.cached > held:
                raise TraceError(f"program {self.id!r}, request {i}: {s.cached} tokens cached, but only {held} exist")
            if s.context > MOST_TOKENS:
                raise TraceError(
                    f"program {self.id!r}, request {i}: a context of {s.context} tokens; 2^31 are too many"
                )
            if not 0 <= s.tool_s <= MOST_S:
                raise TraceError(f"program {self.id!r}, request {i}: its tool takes {s.tool_s} s, not 0 to {MOST_S:g}")
            if (s.tool is None) != (i == len(self.requests) - 1):
                raise TraceError(f"program {self.id!r}, request {i}: all but the last request end in a tool")
            held = s.context

    def _check_lineage(self) -> None:
        positions = [at for at, _ in self.lineage]
        if positions and (positions[0] != 0 or positions != sorted(positions)):
            raise TraceError(f"program {self.id!r}: its lineage has the positions {positions}; they ascend from 0")
        chained = pairwise(self.requests)
        if positions and any(then.cached != s.context for s, then in chained):
            raise TraceError(f"program {self.id!r}: what shares its beginning may not replace any text later")

    @property
    def shared(self) -> int:
        """Tokens at its beginning that other programs may have, too."""
        return self.lineage[-1][0] if self.lineage else 0

    @property
    def longest(self) -> int:
        """Tokens of the longest context, of its own or of a program that it begins."""
        return max(s.context for program in everyone([self]) for s in program.requests)

    @property
    def tool_s(self) -> float:
        return sum(s.tool_s for s in self.requests)

    def scaled(
        self, tokens: float, tool_s: float = 1.0, moved: Mapping[int, int] = MappingProxyType({})
    ) -> TraceProgram:
        """Multiply all lengths and all tool times, for small models.

        No length gets below 1, and what continues the request before still does. ``moved`` has new positions of a
        parent's text.
        """
        moved = {at: round(at * tokens) for at, _ in self.lineage} | dict(moved)
        lineage = tuple((moved[at], name) for at, name in self.lineage)
        requests: list[TraceRequest] = []
        before, held = self.shared, lineage[-1][0] if lineage else 0
        for s in self.requests:
            request = replace(
                s,
                cached=held if s.cached == before else min(held, round(s.cached * tokens)),
                new=max(1, round(s.new * tokens)),
                output=max(1, round(s.output * tokens)),
                tool_s=s.tool_s * tool_s,
            )
            before, held = s.context, request.context
            children = tuple(child.scaled(tokens, tool_s, moved | {before: held}) for child in s.children)
            requests.append(replace(request, children=children))
        return replace(self, requests=tuple(requests), lineage=lineage)


def everyone(programs: Iterable[TraceProgram]) -> Iterator[TraceProgram]:
    """Programs, each with those that it begins."""
    for program in programs:
        yield program
        for request in program.requests:
            yield from everyone(request.children)


def chain(new: Sequence[int], outputs: Sequence[int], tools: Sequence[tuple[str, float]]) -> tuple[TraceRequest, ...]:
    """Make requests each of which continues the one before.

    Args:
        new: prompt tokens that each adds.
        outputs: tokens that each outputs.
        tools: name and seconds of the tool that each but the last leads to.
    """
    requests: list[TraceRequest] = []
    ends: list[tuple[str | None, float]] = [*tools, (None, 0.0)]
    held = 0
    for fresh, output, (tool, seconds) in zip(new, outputs, ends, strict=True):
        requests.append(TraceRequest(held, fresh, output, tool, seconds))
        held += fresh + output
    return tuple(requests)


def load_trace(path: Path) -> list[TraceProgram]:
    """Read a trace file.

    Raises:
        TraceError: it cannot be read, it is empty, a line is not such a program, or arrivals run backwards; the message
            names the file and the line.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TraceError(f"{path}: {error}") from error
    programs = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                programs.append(_program(json.loads(line)))
            except (KeyError, TypeError, AttributeError, ValueError, OverflowError, RecursionError) as error:
                raise TraceError(f"{path}, line {number}: {error!r}") from error
    if not programs:
        raise TraceError(f"{path} holds no programs")
    arrivals = [p.arrival_s for p in programs if p.arrival_s is not None]
    if arrivals != sorted(arrivals):
        raise TraceError(f"{path}: arrivals run backwards")
    if len({p.id for p in programs}) < len(programs):
        raise TraceError(f"{path}: two programs have the same name")
    return programs


def _program(record: dict[str, Any]) -> TraceProgram:
    requests = []
    for entry in record["segments"]:
        tool = entry["tool"]
        requests.append(
            TraceRequest(
                cached=int(entry["cached_prompt_tokens"]),
                new=int(entry["new_prompt_tokens"]),
                output=int(entry["output_tokens"]),
                tool=None if tool is None else str(tool["name"]),
                tool_s=0.0 if tool is None else float(tool["seconds"]),
                human=tool is not None and bool(tool.get("human", False)),
            )
        )
    arrival = record.get("arrival_s")
    return TraceProgram(str(record["program"]), tuple(requests), None if arrival is None else float(arrival))
