"""Spans for OpenTelemetry: a request, and in it queue, restore, prefill and decode; before it the wait for a tool.

They are made when a request has ended, from the times that the engine has taken; nothing happens while it runs. The
attributes are numbers and the finish reason: no text, and no name that a client has chosen.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from absl import flags

from astraea_jax.engine.generation import Ended, Usage
from astraea_jax.engine.interface import Serving
from astraea_jax.errors import StartupError
from astraea_jax.scheduler.wait import HUMAN_WAIT


class Tracing:
    """Sends spans about the requests of an engine.

    Args:
        engine: its replicas are watched from now on.
        tracer: OpenTelemetry's.
        model: the model's name.
    """

    def __init__(self, engine: Serving, tracer: Any, model: str):
        self._tracer, self._model = tracer, model
        for number, replica in enumerate(engine.replicas):
            replica.observe(partial(self._ended, number))

    def _ended(self, replica: int, ended: Ended) -> None:
        usage = ended.usage
        if usage is None:
            return
        now = time.time()
        began = now - usage.queue_s - usage.prefill_s - usage.decode_s
        program = {"astraea.replica": replica, "astraea.program": ended.program}
        if usage.wait is not None:
            waited = "human_wait" if usage.wait.kind == HUMAN_WAIT else "tool_wait"
            self._span(waited, began - usage.wait.actual_s, began, program)
        attributes = {**program, **_attributes(usage, ended.reason), "gen_ai.request.model": self._model}
        whole = self._tracer.start_span("llm_request", start_time=_ns(began), attributes=attributes)
        parts = {"queue": usage.queue_s, "prefill": usage.prefill_s, "decode": usage.decode_s}
        for name, seconds in parts.items():
            self._span(name, began, began + seconds, program, whole)
            began += seconds
            if name == "queue" and ended.restore_s > 0:
                self._span("restore", began - ended.restore_s, began, program, whole)
        whole.end(_ns(now))

    def _span(self, name: str, began: float, ended: float, attributes: dict[str, Any], inside: Any = None) -> None:
        from opentelemetry.trace import set_span_in_context

        context = None if inside is None else set_span_in_context(inside)
        span = self._tracer.start_span(name, context, start_time=_ns(began), attributes=attributes)
        span.end(_ns(ended))


def tracing_flags() -> Callable[[Serving, str], Tracing | None]:
    """Define the flag; return a function that begins to trace an engine and its model, if the flag says where to."""
    flags.DEFINE_string("otlp_endpoint", None, "URL of a collector of OpenTelemetry (OTLP over HTTP) that gets spans.")
    flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS["otlp_endpoint"])

    def begin(engine: Serving, model: str) -> Tracing | None:
        endpoint = flags.FLAGS.otlp_endpoint
        return None if endpoint is None else Tracing(engine, _tracer(endpoint), model)

    return begin


def _tracer(endpoint: str) -> Any:
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        raise StartupError("--otlp_endpoint needs OpenTelemetry: pip install 'astraea-jax[otel]'") from None
    provider = TracerProvider(resource=Resource.create({"service.name": "astraea-jax"}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint)))  # sends from a thread of its own
    return provider.get_tracer("astraea_jax")


def _attributes(usage: Usage, reason: str) -> dict[str, Any]:
    return {
        "gen_ai.operation.name": "chat",
        "gen_ai.usage.input_tokens": usage.prompt_tokens,
        "gen_ai.usage.output_tokens": usage.output_tokens,
        "gen_ai.response.finish_reasons": [reason],
        "astraea.cached_tokens": usage.cached_tokens,
        "astraea.preemptions": usage.preemptions,
    }


def _ns(seconds: float) -> int:
    return int(seconds * 1e9)
