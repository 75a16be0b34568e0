"""Fields of a request's body by which agents say who they are and what comes next; a part of every API's."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from astraea_jax.engine.events import MAX_NAME
from astraea_jax.frontends.hint_fields import HintFields

Name = Annotated[str, Field(max_length=MAX_NAME)]


class AgentFields(HintFields):
    """Names of sessions, hints, and whether the answer is to say what was reused."""

    session_id: Name | None = None
    parent_session_id: Name | None = None
    prompt_cache_key: Name | None = None
    astraea_report: bool | None = None
