"""Spans of requests, as OpenTelemetry gets them."""

from __future__ import annotations

import asyncio

import pytest
from support.engines import settled
from support.stub import stub_engine

from astraea_jax.engine.sampling import SamplingParams
from astraea_jax.frontends.tracing import Tracing

pytest.importorskip("opentelemetry.sdk")
PARAMS = SamplingParams(max_tokens=3, ignore_eos=True)


@pytest.fixture
def exported():
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    return exporter, provider.get_tracer("test")


async def test_a_request_has_its_phases_inside(exported):
    exporter, tracer = exported
    engine, _ = stub_engine()
    Tracing(engine, tracer, "m")
    await asyncio.to_thread(engine.start)
    for _ in range(2):
        await engine.generate([1, 2, 3], PARAMS, session="tell-tale", owner="tell-tale").text()
    await settled(engine)
    engine.shutdown(0)
    spans = exporter.get_finished_spans()
    assert sorted(span.name for span in spans) == sorted(
        ["llm_request", "queue", "prefill", "decode"] * 2 + ["tool_wait"]
    )
    assert "tell-tale" not in "".join(span.to_json() for span in spans)
    for whole in (span for span in spans if span.name == "llm_request"):
        inside = [span for span in spans if span.parent and span.parent.span_id == whole.context.span_id]
        assert min(inside, key=lambda span: span.start_time).name == "queue"
        assert len(inside) == 3
        assert all(whole.start_time <= span.start_time <= span.end_time <= whole.end_time + 1000 for span in inside)
        assert whole.attributes["gen_ai.usage.output_tokens"] == 3
        assert whole.attributes["gen_ai.response.finish_reasons"] == ("length",)
    [wait] = [span for span in spans if span.name == "tool_wait"]
    assert wait.end_time >= wait.start_time
