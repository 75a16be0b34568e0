"""The fields of a request's body that hold hints; what they mean stands in :mod:`.hints`.

The envelope ``kv_hints`` is vLLM's (``vllm/v1/kv_hints``), its two actions are ours; ``nvext.agent_hints`` is NVIDIA
Dynamo's, ``iat`` in it NeMo Relay's; ``cache_control`` is Anthropic's, ``prompt_cache_retention`` OpenAI's.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Discriminator, Field, Tag

from astraea_jax.engine.events import MAX_NAME
from astraea_jax.frontends.http.wire_model import WireModel, few

MAX_ACTIONS, MAX_CALLS, MAX_TOOLS = 64, 256, 256

Number = Annotated[float, Field(strict=True)]
Name = Annotated[str, Field(max_length=MAX_NAME)]


class ToolWait(WireModel):
    """The payload of ``astraea.tool_wait``: how long a session will wait for the tools that it has called."""

    session_id: Name | None = None
    tool_call_ids: list[Name] = Field(default_factory=list, max_length=MAX_CALLS, fail_fast=True)
    expected_ms: Number
    p90_ms: Number | None = None
    max_ms: Number | None = None
    """The time after which the client gives the tools up: a bound on what is expected."""


class _Action(WireModel):
    action_id: Name = ""
    action_version: Name = "1.0"


class ToolWaitAction(_Action):
    """Announces a wait."""

    action_type: Literal["astraea.tool_wait"]
    payload: ToolWait


class ToolProfileAction(_Action):
    """Says how long each tool usually takes: ``{name: milliseconds}``."""

    action_type: Literal["astraea.tool_profile"]
    payload: Annotated[dict[Name, Number], few(MAX_TOOLS)]


class UnknownAction(_Action):
    """An action of somebody else, which is skipped."""

    action_type: Name


def _type_of(action: Any) -> str:
    kind = action.get("action_type") if isinstance(action, dict) else getattr(action, "action_type", None)
    return kind if kind in ("astraea.tool_wait", "astraea.tool_profile") else "unknown"


Action = Annotated[
    Annotated[ToolWaitAction, Tag("astraea.tool_wait")]
    | Annotated[ToolProfileAction, Tag("astraea.tool_profile")]
    | Annotated[UnknownAction, Tag("unknown")],
    Discriminator(_type_of),
]


class KvHints(WireModel):
    """The envelope of actions."""

    protocol_version: Name
    message_id: Name
    actions: list[Action] = Field(max_length=MAX_ACTIONS, fail_fast=True)

    @property
    def known(self) -> bool:
        """Whether this version of the protocol is understood."""
        return self.protocol_version.partition(".")[0] in ("0", "1")


class AgentHints(WireModel):
    """Dynamo's hints, as far as they are used."""

    iat: Number | None = None
    priority: Annotated[int, Field(strict=True)] | None = None
    osl: Any = None
    strict_priority: Any = None
    speculative_prefill: Any = None
    latency_sensitivity: Any = None


class CacheControl(WireModel):
    """Anthropic's mark that what is written up to here will be used again."""

    ttl: Name | None = None


class Extensions(WireModel):
    """The field ``nvext``, as far as it is read."""

    agent_hints: AgentHints | None = None
    cache_control: CacheControl | None = None


class HintFields(BaseModel):
    """The fields of a request's body that hold hints; a part of every API's."""

    kv_hints: KvHints | None = None
    nvext: Extensions | None = None
    priority: Annotated[int, Field(strict=True)] | None = None
    cache_control: CacheControl | None = None
    prompt_cache_retention: Name | None = None
