"""Metrics: vLLM's names, numbers that add up, and labels that no client chooses."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families
from support.engines import held, settled
from support.stub import stub_engine

from astraea_jax.engine.generation import Ended
from astraea_jax.engine.replicas import Replicas
from astraea_jax.engine.sampling import SamplingParams
from astraea_jax.errors import Overloaded
from astraea_jax.frontends.metrics import Metrics
from astraea_jax.scheduler.wait import Wait

VLLM = {
    *("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "num_preemptions", "cache_config_info"),
    *("prompt_tokens", "prompt_tokens_cached", "generation_tokens", "prefix_cache_queries", "prefix_cache_hits"),
    *("request_success", "time_to_first_token_seconds", "inter_token_latency_seconds", "e2e_request_latency_seconds"),
    *("request_queue_time_seconds", "request_prefill_time_seconds", "request_decode_time_seconds"),
    *("request_inference_time_seconds", "request_time_per_output_token_seconds", "iteration_tokens_total"),
    *("request_prompt_tokens", "request_generation_tokens", "request_prefill_kv_computed_tokens"),
    *("kv_offload_store_bytes", "kv_offload_load_bytes"),
}
"""Names that vLLM has, whose meaning is kept."""
PARAMS = SamplingParams(max_tokens=4, ignore_eos=True)


@pytest.fixture
async def engine():
    engine, _ = stub_engine()
    await asyncio.to_thread(engine.start)
    yield engine
    engine.shutdown(0)


def read(metrics: Metrics) -> dict[str, float]:
    """``name{label="value"}`` without the labels that all have -> value."""
    found = {}
    for family in text_string_to_metric_families(metrics.text().decode()):
        for sample in family.samples:
            own = {k: v for k, v in sample.labels.items() if k not in ("model_name", "replica")}
            text = ",".join(f"{k}={v}" for k, v in sorted(own.items()))
            found[f"{sample.name}{{{text}}}" if text else sample.name] = sample.value
    return found


@pytest.mark.parametrize("prefix", ["astraea:", "vllm:"])
async def test_names_are_those_of_vllm(prefix, engine):
    metrics = Metrics(engine, "m", prefix)
    families = {family.name for family in text_string_to_metric_families(metrics.text().decode())}
    assert {prefix + name for name in VLLM} <= families
    others = {name for name in families if not name.startswith(prefix)}
    assert all(name.startswith(("process_", "python_gc_")) for name in others)


async def test_every_series_names_its_model_and_replica(engine):
    for family in text_string_to_metric_families(Metrics(engine, "m").text().decode()):
        if family.name.startswith("astraea:"):
            assert family.samples
            assert family.documentation.endswith(".")
            replica = "" if family.name == "astraea:turns_continued" else "0"  # prompts are made before one is chosen
            assert all((s.labels["model_name"], s.labels["replica"]) == ("m", replica) for s in family.samples)


async def test_requests_are_counted_by_their_ends(engine):
    metrics = Metrics(engine, "m")
    await engine.generate([1, 2, 3], PARAMS, session="s").text()
    await engine.generate([1, 2, 3], PARAMS, session="s").text()
    with held(engine, 2):
        generation = engine.generate([1] * 5, SamplingParams(max_tokens=30, ignore_eos=True))
        await anext(generation)
        generation.cancel()
    await settled(engine)
    found = read(metrics)
    ends = {r: found[f"astraea:request_success_total{{finished_reason={r}}}"] for r in ("stop", "length", "abort")}
    assert ends == {"stop": 0, "length": 2, "abort": 1}
    assert found["astraea:e2e_request_latency_seconds_count"] == 3
    assert found["astraea:request_prompt_tokens_sum"] == found["astraea:prompt_tokens_total"] == 11
    assert found["astraea:generation_tokens_total"] == found["astraea:inter_token_latency_seconds_count"]
    assert found["astraea:generation_tokens_total"] >= found["astraea:request_generation_tokens_sum"] >= 9
    assert found["astraea:steps_total"] == found["astraea:iteration_tokens_total_count"]
    assert found["astraea:tool_wait_seconds_count"] == found["astraea:tool_wait_prediction_error_seconds_count"] == 1
    assert found["astraea:resume_source_total{reason=,source=device}"] == 1
    assert found["astraea:sessions"] == found["astraea:programs{state=tool_wait}"] == 1
    assert found["astraea:engine_state{state=serving}"] == 1
    assert found["astraea:num_requests_running"] == found["astraea:kv_cache_usage_perc"] == 0


async def test_jobs_and_the_waits_of_humans_are_counted(engine):
    metrics = Metrics(engine, "m")
    for prompt in ([1] * 9, [2] * 9):
        await engine.generate(prompt, PARAMS, session="s").text()
        engine.waits("s", Wait())
    await settled(engine)
    found = read(metrics)
    assert found["astraea:human_wait_seconds_count"] == found["astraea:human_wait_prediction_error_seconds_count"] == 1
    assert found["astraea:tool_wait_seconds_count"] == 0
    assert found["astraea:job_completion_seconds_count"] == 2
    assert (found["astraea:programs{state=human_wait}"], found["astraea:programs{state=tool_wait}"]) == (1, 0)
    assert found["astraea:resume_source_total{reason=prefix differs,source=recomputed}"] == 1


async def test_replicas_have_their_own_numbers():
    both = Replicas([stub_engine()[0], stub_engine()[0]])
    metrics = Metrics(both, "m")
    await asyncio.to_thread(both.start)
    try:
        for _ in range(3):
            await both.generate([1, 2, 3], PARAMS).text()
        await settled(both)
        families = list(text_string_to_metric_families(metrics.text().decode()))
    finally:
        both.shutdown(0)
    [ends] = [family for family in families if family.name == "astraea:request_success"]
    assert {sample.labels["replica"] for sample in ends.samples} == {"0", "1"}
    assert sum(sample.value for sample in ends.samples) == 3
    assert len({family.name for family in families}) == len(families)


async def test_pages_add_up(engine):
    metrics = Metrics(engine, "m")
    await engine.generate([1] * 12, PARAMS, session="s").text()
    await settled(engine)
    found = read(metrics)
    states = ("running", "retained", "cached", "free")
    assert sum(found[f"astraea:kv_pages{{state={state}}}"] for state in states) == engine.layout.num_pages - 1
    assert found["astraea:kv_pages{state=retained}"] == 4


async def test_refused_requests_are_counted(engine):
    metrics, runner = Metrics(engine, "m"), engine._runner
    runner.go.clear()
    with pytest.raises(Overloaded):
        _ = [engine.generate([1], PARAMS) for _ in range(100)]
    runner.go.set()
    assert read(metrics)["astraea:requests_refused_total"] == 1


async def test_requests_that_the_engines_end_cuts_are_errors(engine):
    metrics = Metrics(engine, "m")
    engine._runner.go.clear()
    generation = engine.generate([1], PARAMS)
    engine._die("the test ends it")
    with pytest.raises(Exception, match="the test"):
        await generation.text()
    engine._runner.go.set()
    found = read(metrics)
    assert found["astraea:request_success_total{finished_reason=error}"] == 1
    assert found["astraea:engine_state{state=dead}"] == 1


async def test_an_observer_that_fails_costs_nobody_an_answer(engine, caplog):
    seen: list[Ended] = []

    def broken(ended: Ended) -> None:
        raise RuntimeError("broken")

    engine.observe(broken)
    engine.observe(seen.append)
    assert await engine.generate([1, 2, 3], PARAMS).text() is not None
    assert [ended.reason for ended in seen] == ["length"]
    assert "an observer of requests failed" in caplog.text


async def test_no_client_chooses_a_label(engine):
    """Or else whoever makes up names fills the memory of whoever collects them."""
    metrics = Metrics(engine, "m")
    await engine.generate([1], PARAMS, session="tell-tale", owner="tell-tale", salt="tell-tale").text()
    engine.waits("tell-tale", Wait(("tell-tale",)), owner="tell-tale")
    await settled(engine)
    assert b"tell-tale" not in metrics.text()


def names_in(expression: str) -> set[str]:
    return set(re.findall(r"astraea:\w+", expression))


async def test_the_dashboard_asks_for_what_there_is(engine):
    metrics = Metrics(engine, "m")
    await engine.generate([1], PARAMS).text()
    await engine.generate([1], PARAMS, session="s").text()
    families = text_string_to_metric_families(metrics.text().decode())
    every = [sample for family in families for sample in family.samples]
    samples, labels = {sample.name for sample in every}, {label for sample in every for label in sample.labels}
    dashboard = json.loads((Path(__file__).parents[2] / "docs" / "grafana.json").read_text())
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())]
    assert len(expressions) >= 12
    for expression in expressions:
        assert names_in(expression), expression
        assert names_in(expression) <= samples, expression
        assert set(re.findall(r"(\w+)=~?\"", expression)) <= labels, expression
        for by in re.findall(r"by \(([^)]*)\)", expression):
            assert {label.strip() for label in by.split(",")} <= labels, expression
        assert expression.count("(") == expression.count(")")
