"""The base of what clients send as JSON.

Lists of schemas are made with ``fail_fast``, and objects with keys of the client's choice with :func:`few`: an error
costs more than a value, and a body has room for a million.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, BeforeValidator, model_validator


class WireModel(BaseModel):
    """A JSON object of a request. Fields without a name here are ignored, and null is the same as no field at all."""

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, given: Any) -> Any:
        return {key: value for key, value in given.items() if value is not None} if isinstance(given, dict) else given


def few(entries: int) -> BeforeValidator:
    """Refuse an object that has more entries, before any of them is looked at."""

    def check(given: Any) -> Any:
        if isinstance(given, dict) and len(given) > entries:
            raise ValueError(f"at most {entries} entries are allowed, not {len(given)}")
        return given

    return BeforeValidator(check)
