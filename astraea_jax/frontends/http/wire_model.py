"""The base of what clients send as JSON."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, model_validator


class WireModel(BaseModel):
    """A JSON object of a request. Fields without a name here are ignored, and null is the same as no field at all."""

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, given: Any) -> Any:
        return {key: value for key, value in given.items() if value is not None} if isinstance(given, dict) else given
