"""Names of sessions, as clients already send them: one table for headers of HTTP and metadata of gRPC.

Precedence is that of NVIDIA Dynamo: what is meant for any server counts before what a harness sends by itself, and
both before fields that group requests for another purpose. The parent comes from the same client as the name.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass

from astraea_jax.engine.events import MAX_NAME
from astraea_jax.errors import RequestError


@dataclass(frozen=True)
class Naming:
    """The headers by which one kind of client names a session."""

    session: str
    parent: str | None = None
    """Header of the session that this one is a child of."""
    child: str | None = None
    """Header of a part of the session that is a session of its own; what ``parent`` names is then such a part, too."""


NAMINGS = (
    # vLLM's body field has this header (vllm-project/vllm#48048); OpenCode sends both
    Naming("x-session-id", "x-parent-session-id"),
    # https://docs.nvidia.com/dynamo/dev/agents/identify-agent-sessions
    Naming("x-dynamo-session-id", "x-dynamo-parent-session-id"),
    # Claude Code since 2.1.86; https://code.claude.com/docs/en/llm-gateway
    Naming("x-claude-code-session-id", "x-claude-code-parent-agent-id", "x-claude-code-agent-id"),
    # Codex; ai-dynamo/dynamo, lib/llm/src/protocols/agents.rs
    Naming("thread-id", "x-codex-parent-thread-id"),
    # the same file
    Naming("x-deepseek-harness-session-id", "x-deepseek-harness-parent-session-id"),
    # OpenCode at its own gateway; musistudio/claude-code-router#1754
    Naming("x-opencode-session", "x-opencode-parent-session"),
    # OpenCode and Pi elsewhere; router-for-me/CLIProxyAPI#5694
    Naming("x-session-affinity", "x-parent-session-affinity"),
    # older Codex; KarpelesLab/teamclaude#352. Ray Serve's key in gRPC metadata is session_id
    Naming("session-id"),
)
"""What clients send, the first one that is there counts. The sources are where it is described or was seen."""
FINAL = ("x-session-final", "x-dynamo-session-final")
"""Headers that say ``true`` on the last request of a session."""
KEYS = frozenset(
    {*FINAL, *(key for naming in NAMINGS for key in (naming.session, naming.parent, naming.child) if key is not None)}
)
"""All headers that are read here, in their form with dashes."""


@dataclass(frozen=True)
class Identity:
    """What a request says about the session that it belongs to."""

    session: str | None = None
    """None: it names none."""
    parent: str | None = None
    """Session that this one is a child of."""
    final: bool = False
    """Whether the session ends with this request."""


def identify(
    headers: Mapping[str, str],
    *,
    session_id: str | None = None,
    parent_session_id: str | None = None,
    prompt_cache_key: str | None = None,
    user_id: str | None = None,
) -> Identity:
    """Return what a request says about its session.

    Args:
        headers: of HTTP, or metadata of gRPC; keys in small letters. Underscores count as dashes, as for Ray Serve; a
            key that has dashes counts before.
        session_id: field of the body; counts before all headers, and leaves none of their parents.
        parent_session_id: field of the body; counts before all headers.
        prompt_cache_key: OpenAI's field; counts after all headers.
        user_id: Anthropic's ``metadata.user_id``; counts last.

    Raises:
        RequestError: a name is too long, or a flag is neither true nor false.
    """
    headers = with_dashes(headers)
    session, parent = _checked(session_id, "session_id"), _checked(parent_session_id, "parent_session_id")
    if session is None:
        session, above = next((found for naming in NAMINGS if (found := _named(naming, headers))[0]), (None, None))
        parent = parent or above
    session = session or _checked(prompt_cache_key, "prompt_cache_key") or _session_of_user(user_id)
    return Identity(session, parent if parent != session else None, any(_flag(headers, key) for key in FINAL))


def with_dashes(headers: Mapping[str, str]) -> dict[str, str]:
    """Return the headers that are read here, by their names with dashes."""
    found: dict[str, str] = {}
    for key, value in headers.items():
        if key in KEYS:
            found.setdefault(key, value)
    for key, value in headers.items():
        if "_" in key and (name := key.replace("_", "-")) in KEYS:
            found.setdefault(name, value)
    return found


def _named(naming: Naming, headers: Mapping[str, str]) -> tuple[str | None, str | None]:
    """Return the session and its parent, as far as one kind of client names them."""
    root = _header(headers, naming.session)
    parent = _header(headers, naming.parent)
    if root is None or naming.child is None:
        return root, parent
    child = _header(headers, naming.child)
    if child is None:
        return root, None
    above = root if parent is None else f"{root}/{parent}"
    return _checked(f"{root}/{child}", naming.child), _checked(above, naming.parent or "")


def _header(headers: Mapping[str, str], key: str | None) -> str | None:
    return None if key is None else _checked(headers.get(key, "").strip(), key)


def _checked(name: str | None, where: str) -> str | None:
    """Return a name that can be one; None for one that is missing or empty."""
    if name is not None and len(name) > MAX_NAME:
        raise RequestError(f"{where} has {len(name)} characters; at most {MAX_NAME} are allowed for a session's name")
    return name or None


def _session_of_user(user_id: str | None) -> str | None:
    """Return the session that Claude Code writes into ``metadata.user_id``, or else a name for the user."""
    if not user_id:
        return None
    try:
        session = json.loads(user_id)["session_id"]
    except (ValueError, TypeError, KeyError, RecursionError):
        found = re.search(r"_session_([\w-]{1,128})$", user_id)
        session = found[1] if found else None
    if isinstance(session, str) and 0 < len(session) <= 128:
        return session
    return f"user:{hashlib.sha256(user_id.encode('utf-8', 'surrogatepass')).hexdigest()[:32]}"


def _flag(headers: Mapping[str, str], key: str) -> bool:
    text = headers.get(key, "false").strip().lower()
    if text not in ("true", "false"):
        raise RequestError(f"{key} is {text[:60]!r}; it must be true or false")
    return text == "true"
