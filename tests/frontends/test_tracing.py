"""Spans of requests, as OpenTelemetry gets them."""

from __future__ import annotations

import asyncio

import pytest
from support.engines import settled
from support.stub import stub_engine

from astraea_jax.engine.generation import Ended, Usage
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


async def test_kv_that_comes_back_is_the_end_of_the_queue(exported):
    exporter, tracer = exported
    engine, _ = stub_engine()
    tracing = Tracing(engine, tracer, "m")
    usage = Usage(9, 8, 2, queue_s=3.0, prefill_s=1.0, decode_s=1.0, preemptions=0)
    tracing._ended(0, Ended("stop", usage, 1, restore_s=2.0))
    spans = {span.name: span for span in exporter.get_finished_spans()}
    assert spans.keys() == {"llm_request", "queue", "restore", "prefill", "decode"}
    assert spans["restore"].end_time == spans["queue"].end_time == spans["prefill"].start_time
    assert spans["restore"].end_time - spans["restore"].start_time == pytest.approx(2e9, abs=1e4)
