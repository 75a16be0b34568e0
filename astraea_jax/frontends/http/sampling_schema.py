"""Fields of a request that chats and completions share, and the sampling that they ask for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from astraea_jax.engine.events import MAX_NAME
from astraea_jax.engine.sampling import (
    LEAST_REPETITION_PENALTY,
    MAX_BIASES,
    MAX_STOP_CHARS,
    MAX_STOPS,
    SamplingParams,
)
from astraea_jax.errors import RequestError
from astraea_jax.frontends.http.agent_fields import AgentFields
from astraea_jax.frontends.http.tenants import MAX_SALT
from astraea_jax.frontends.http.turns import MAX_CHOICES
from astraea_jax.frontends.http.wire_model import few

MAX_TEXT = 2**24
"""Characters of a text; bodies are bounded further."""
LARGE = 2**31 - 1

SAMPLING = (
    *("temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty"),
    *("min_tokens", "stop", "stop_token_ids", "ignore_eos"),
)
"""Fields that mean the same in :class:`SamplingParams`."""

Text = Annotated[str, StringConstraints(max_length=MAX_TEXT)]
Name = Annotated[str, StringConstraints(max_length=MAX_NAME)]
TokenId = Annotated[int, Field(ge=0, le=LARGE)]
Stop = Annotated[str, StringConstraints(min_length=1, max_length=MAX_STOP_CHARS)]


class Model(BaseModel):
    """Fields that are not known are ignored."""

    model_config = ConfigDict(extra="ignore", protected_namespaces=())


class StreamOptions(Model):
    """Options of a stream."""

    include_usage: bool = False


class StructuredOutputs(Model):
    """The form that the text must have, in vLLM's shape; one of these."""

    json_: dict[str, Any] | Text | None = Field(None, alias="json")
    regex: Text | None = None
    choice: Annotated[list[Text], Field(min_length=1, max_length=1024, fail_fast=True)] | None = None
    grammar: Text | None = None
    json_object: bool | None = None

    def constraint(self) -> dict[str, Any] | None:
        """Return the constraint of :class:`.turns.Request`.

        Raises:
            RequestError: there are several.
        """
        given: list[dict[str, Any]] = []
        if self.json_ is not None:
            given.append({"type": "json_schema", "schema": self.json_})
        if self.regex is not None:
            given.append({"type": "regex", "regex": self.regex})
        if self.choice is not None:
            given.append({"type": "choice", "choice": self.choice})
        if self.grammar is not None:
            given.append({"type": "lark", "lark": self.grammar})
        if self.json_object:
            given.append({"type": "json_object"})
        if len(given) > 1:
            raise RequestError("structured_outputs has several of json, regex, choice, grammar and json_object; one")
        return given[0] if given else None


class SamplingFields(Model, AgentFields):
    """Sampling in OpenAI's words, and vLLM's where OpenAI has none."""

    model: Name | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=LARGE)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(ge=LEAST_REPETITION_PENALTY, le=10)] | None = None
    min_tokens: Annotated[int, Field(ge=0, le=LARGE)] | None = None
    logit_bias: (
        Annotated[
            dict[Annotated[str, Field(pattern=r"^\d{1,9}$")], Annotated[float, Field(ge=-100, le=100)]],
            few(MAX_BIASES),
        ]
        | None
    ) = None
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS, fail_fast=True)] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MAX_STOPS, fail_fast=True)] | None = None
    ignore_eos: bool | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    structured_outputs: StructuredOutputs | None = None
    cache_salt: Annotated[str, StringConstraints(max_length=MAX_SALT)] | None = None

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with its usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    def sampling(self, defaults: Mapping[str, Any], max_tokens: int | None, logprobs: int | None) -> SamplingParams:
        """Return the sampling that is asked for.

        Args:
            defaults: what counts where nothing is given.
            max_tokens: None: what the context has left.
            logprobs: see :class:`SamplingParams`.

        Raises:
            RequestError: values contradict each other.
        """
        given = {name: value for name in SAMPLING if (value := getattr(self, name)) is not None}
        chosen = {"temperature": 1.0, **defaults, **given, "logprobs": logprobs}
        chosen["top_k"] = max(0, chosen.get("top_k", 0))  # -1 means all tokens to vLLM
        chosen["logit_bias"] = {int(token): bias for token, bias in (self.logit_bias or {}).items()}
        chosen["seed"] = None if self.seed is None else self.seed % 2**32
        return SamplingParams(max_tokens=max_tokens or LARGE, **chosen)
