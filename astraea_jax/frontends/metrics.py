"""Prometheus metrics of an engine, under vLLM's names and meanings, and ours beside them.

A scrape reads the numbers that the serving loops add up; between scrapes nothing happens but one call per request that
has ended. Every series has the labels ``model_name`` and ``replica``. Nothing that a client chooses becomes a label.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from typing import get_args

from prometheus_client import CollectorRegistry, GCCollector, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from astraea_jax.agents.continuity import Why
from astraea_jax.engine.engine import Engine
from astraea_jax.engine.generation import Ended, Usage
from astraea_jax.engine.interface import Serving
from astraea_jax.engine.lifecycle import State
from astraea_jax.scheduler.histogram import Histogram
from astraea_jax.scheduler.wait import DEVICE, DIFFERS, DISCARDED, EVICTED, FAILED, HOST, RECOMPUTED

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
PREFIX = "astraea:"
REASONS = {"stop": "stop", "length": "length", "cancelled": "abort", "error": "error"}
"""Our finish reason -> vLLM's."""
LATENCY_S = (0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0)
FIRST_TOKEN_S = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0),
    *(80.0, 160.0, 640.0, 2560.0),
)
PER_TOKEN_S = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0)
TOKENS = tuple(mantissa * 10**power for power in range(6) for mantissa in (1, 2, 5))
"""The last four are vLLM's bounds."""

OF_REQUESTS = {
    "time_to_first_token_seconds": (FIRST_TOKEN_S, "From submission to the first token."),
    "request_time_per_output_token_seconds": (PER_TOKEN_S, "Mean time from token to token of a request."),
    "e2e_request_latency_seconds": (LATENCY_S, "From submission to the last token."),
    "request_queue_time_seconds": (LATENCY_S, "From submission to the first step that ran the request."),
    "request_prefill_time_seconds": (LATENCY_S, "From that step to the first token."),
    "request_decode_time_seconds": (LATENCY_S, "From the first token to the last."),
    "request_inference_time_seconds": (LATENCY_S, "From the first step to the last token."),
    "request_prompt_tokens": (TOKENS, "Tokens of the prompt."),
    "request_generation_tokens": (TOKENS, "Tokens generated."),
    "request_prefill_kv_computed_tokens": (TOKENS, "Tokens of the prompt whose KV was not cached."),
}
"""Histogram over requests that have ended -> its bounds, and what it says."""
WHYS: tuple[str, ...] = get_args(Why)
RESUMES = ((DEVICE, ""), (HOST, ""), *((RECOMPUTED, why) for why in (EVICTED, DISCARDED, FAILED, DIFFERS)))
"""How turns resume: the source of their KV, and why some was computed again."""


class Requests:
    """The requests of one replica that have ended. Any thread may add to it."""

    def __init__(self) -> None:
        self.reasons = Counter(dict.fromkeys(REASONS.values(), 0))
        self.histograms = {name: Histogram(bounds) for name, (bounds, _) in OF_REQUESTS.items()}
        self._lock = threading.Lock()

    def ended(self, request: Ended) -> None:
        """Count one; an :data:`~astraea_jax.engine.generation.Observer`."""
        with self._lock:
            self.reasons[REASONS[request.reason]] += 1
            if request.usage is not None:
                for name, value in _figures(request.usage):
                    self.histograms[name].add(value)


def _figures(usage: Usage) -> Iterator[tuple[str, float]]:
    yield "request_queue_time_seconds", usage.queue_s
    yield "e2e_request_latency_seconds", usage.queue_s + usage.prefill_s + usage.decode_s
    yield "request_prompt_tokens", usage.prompt_tokens
    yield "request_generation_tokens", usage.output_tokens
    if usage.output_tokens:  # it has not ended before its first token
        yield "time_to_first_token_seconds", usage.queue_s + usage.prefill_s
        yield "request_prefill_time_seconds", usage.prefill_s
        yield "request_decode_time_seconds", usage.decode_s
        yield "request_inference_time_seconds", usage.prefill_s + usage.decode_s
        yield "request_prefill_kv_computed_tokens", usage.prompt_tokens - usage.cached_tokens
    if usage.output_tokens > 1:
        yield "request_time_per_output_token_seconds", usage.decode_s / (usage.output_tokens - 1)


class Metrics:
    """The metrics of an engine for Prometheus.

    Args:
        engine: its replicas are watched from now on.
        model: the model's name, a label of every series.
        prefix: of the metrics' names; ``"vllm:"`` for dashboards and routers that look for vLLM's.
        continued: requests by why the known part of their prompt ended, as front doors count them.
    """

    def __init__(self, engine: Serving, model: str, prefix: str = PREFIX, continued: Mapping[str, int] | None = None):
        self.registry = CollectorRegistry(auto_describe=False)
        self.registry.register(_Engines(engine, model, prefix, {} if continued is None else continued))
        ProcessCollector(registry=self.registry)
        GCCollector(registry=self.registry)

    def text(self) -> bytes:
        """The metrics of this moment in Prometheus' text format, :data:`CONTENT_TYPE`."""
        return generate_latest(self.registry)


class _Engines(Collector):
    """Reads the numbers of all replicas at a scrape."""

    def __init__(self, engine: Serving, model: str, prefix: str, continued: Mapping[str, int]):
        self._model, self._prefix, self._continued = model, prefix, continued
        self._replicas = [(replica, Requests()) for replica in engine.replicas]
        for replica, requests in self._replicas:
            replica.observe(requests.ended)

    def collect(self) -> Iterable[Metric]:
        families: dict[str, Metric] = {}
        for number, (replica, requests) in enumerate(self._replicas):
            page = _Page(families, self._prefix, {"model_name": self._model, "replica": str(number)})
            _queue(page, replica, requests)
            _programs(page, replica)
            _pages(page, replica)
            _load(page, replica)
            _steps(page, replica)
        page = _Page(families, self._prefix, {"model_name": self._model, "replica": ""})  # prompts are made before
        for why in WHYS:
            page.counter(
                "turns_continued", "Turns by why their known tokens ended.", self._continued.get(why, 0), why=why
            )
        return families.values()


class _Page:
    """Adds the samples of one replica to the families of all."""

    def __init__(self, families: dict[str, Metric], prefix: str, labels: dict[str, str]):
        self._families, self._prefix, self._labels = families, prefix, labels

    def gauge(self, name: str, text: str, value: float, **labels: str) -> None:
        names = [*self._labels, *labels]
        family = self._families.setdefault(name, GaugeMetricFamily(self._prefix + name, text, labels=names))
        family.add_metric([*self._labels.values(), *labels.values()], value)  # type: ignore[attr-defined]

    def counter(self, name: str, text: str, value: float, **labels: str) -> None:
        names = [*self._labels, *labels]
        family = self._families.setdefault(name, CounterMetricFamily(self._prefix + name, text, labels=names))
        family.add_metric([*self._labels.values(), *labels.values()], value)  # type: ignore[attr-defined]

    def histogram(self, name: str, text: str, value: Histogram) -> None:
        family = self._families.setdefault(
            name, HistogramMetricFamily(self._prefix + name, text, labels=[*self._labels])
        )
        buckets, seen = [], 0
        for bound, count in zip([*map(float, value.bounds), float("inf")], list(value.counts), strict=True):
            seen += count
            buckets.append(("+Inf" if bound == float("inf") else repr(bound), float(seen)))
        family.add_metric([*self._labels.values()], buckets, value.sum)  # type: ignore[attr-defined]


def _queue(page: _Page, engine: Engine, requests: Requests) -> None:
    stats, work = engine.stats(), engine.work
    page.gauge("num_requests_running", "Requests with a batch slot.", stats.running)
    page.gauge("num_requests_waiting", "Requests without one, preempted ones among them.", stats.waiting)
    page.gauge("max_queued_requests", "Requests that may wait; others are refused.", engine.config.max_queued)
    page.counter("requests_refused", "Requests refused because too many waited.", engine.refused)
    page.counter("num_preemptions", "Requests taken off their slot for want of pages.", stats.preemptions)
    page.counter("prompt_tokens", "Tokens of prompts that have got a slot, cached ones among them.", work.prompt_tokens)
    page.counter("prompt_tokens_cached", "Of these, tokens whose KV was still there.", work.cached_tokens)
    page.counter("generation_tokens", "Tokens generated.", work.output_tokens)
    for reason, count in requests.reasons.items():
        page.counter("request_success", "Requests that have ended.", count, finished_reason=reason)
    for name, (_, text) in OF_REQUESTS.items():
        page.histogram(name, text, requests.histograms[name])
    for state in State:
        page.gauge("engine_state", "1 for the state of the engine.", engine.state is state, state=state.value)


def _programs(page: _Page, engine: Engine) -> None:
    stats = engine.stats()
    counts = {"running": stats.running, "waiting": stats.waiting, "tool_wait": stats.in_tool_wait}
    counts["human_wait"] = stats.in_human_wait
    for state, count in counts.items():
        page.gauge("programs", "Live programs by state; a program has one request at most.", count, state=state)
    page.gauge("sessions", "Live programs that their callers have named.", stats.sessions)
    page.gauge("programs_offloaded", "Programs of whose KV the host holds a copy.", stats.programs_on_host)
    for event in ("created", "finished", "failed", "expired", "moved"):
        page.counter("program_events", "Programs so far.", getattr(stats, event), event=event)
    waits = engine.tool_waits
    page.histogram("tool_wait_seconds", "Time that programs have waited for their tools.", waits.seconds)
    page.histogram("tool_wait_prediction_error_seconds", "Between that time and what was predicted.", waits.errors)
    humans = engine.human_waits
    page.histogram("human_wait_seconds", "Time that programs have waited for a human's next message.", humans.seconds)
    page.histogram("human_wait_prediction_error_seconds", "Between that time and what was predicted.", humans.errors)
    page.histogram("job_completion_seconds", "From the first request of a job to its last token.", engine.job_times)


def _pages(page: _Page, engine: Engine) -> None:
    stats, layout = engine.stats(), engine.layout
    total = layout.num_pages - 1
    free, retained = stats.free_pages, stats.retained_pages
    used = total - free - retained
    page.gauge("kv_cache_usage_perc", "Share of the pages that running requests use, 0 to 1.", used / total)
    held = {"running": used, "retained": retained, "cached": stats.cached_pages, "free": free - stats.cached_pages}
    for state, count in held.items():
        page.gauge("kv_pages", "Pages of the device by whom they serve.", count, state=state)
    if layout.window is not None:
        held = {"held": layout.window.num_pages - 1 - stats.free_windows, "valid": stats.valid_windows}
        held["free"] = stats.free_windows - stats.valid_windows
        for state, count in held.items():
            page.gauge("kv_window_pages", "Pages of layers with a window by whom they serve.", count, state=state)
    page.gauge("kv_host_pages", "Pages of KV that fit into host memory.", layout.host.pages)
    page.gauge("kv_host_pages_used", "Pages of host memory in use.", stats.host_pages)
    page.counter("prefix_cache_queries", "Tokens of prompts looked up in the cache.", engine.work.prompt_tokens)
    page.counter("prefix_cache_hits", "Of these, tokens whose KV was still there.", engine.work.cached_tokens)
    stored, loaded = (stats.offloaded_pages, stats.offloaded_windows), (stats.restored_pages, stats.restored_windows)
    page.counter("kv_offload_store_bytes", "KV copied to the host.", layout.bytes_of(*stored))
    page.counter("kv_offload_load_bytes", "KV copied back.", layout.bytes_of(*loaded))
    page.counter("kv_transfers_failed", "Copies in either direction that failed.", stats.failed_transfers)
    page.counter("kv_pages_dropped", "Pages of KV dropped under pressure.", stats.dropped_pages)
    page.counter("reused_tokens", "Tokens of requests with a slot whose KV was still there.", stats.reused_tokens)
    page.counter("recomputed_tokens", "Tokens computed again because their KV was dropped.", stats.recomputed_tokens)
    for decision, count in stats.decisions.items():
        action, _, why = decision.partition(": ")
        if action != "resume":
            page.counter("residency_decisions", "Choices of where KV stays.", count, action=action, reason=why)
    for source, why in RESUMES:
        count = stats.decisions.get(f"resume: {source}, {why}" if why else f"resume: {source}", 0)
        page.counter(
            "resume_source",
            "Turns resumed, by the slowest source of their KV, and why it was computed again.",
            count,
            source=source,
            reason=why,
        )
    if engine.config.kv_events:
        page.counter("kv_events_dropped", "Turns of the loop whose KV events nobody took.", engine.kv_events.dropped)
    page.gauge(
        "cache_config_info",
        "1; the sizes are its labels.",
        1,
        block_size=str(engine.config.page_size),
        num_gpu_blocks=str(total),
        cache_dtype=str(engine.config.kv_dtype or layout.dtype.name),
    )


def _load(page: _Page, engine: Engine) -> None:
    report = engine.report()
    page.gauge("kv_live_tokens", "Contexts of all live programs, those that wait included.", report.live)
    page.gauge("kv_demand_tokens", "The same, where those that wait fade with time.", report.demand)
    for decile, wait_s in enumerate(report.wait_s):
        page.gauge(
            "expected_wait_seconds",
            "Wait that a new request may expect, by decile of its program's remaining model time.",
            wait_s,
            decile=str(decile),
        )
    page.gauge("prefill_seconds_per_token", "What a token of a prompt costs, as fitted.", report.prefill_s)
    page.gauge("restore_seconds_per_token", "What a token restored from the host costs.", report.restore_s)
    page.gauge("mean_step_seconds", "Mean time of the last steps.", report.step_s)
    page.gauge("draining", "1 if other replicas are to take new programs.", report.draining)


def _steps(page: _Page, engine: Engine) -> None:
    work, times = engine.work, asdict(engine.times)
    page.histogram("iteration_tokens_total", "Tokens computed by a step.", work.step_tokens)
    page.histogram("inter_token_latency_seconds", "Time of a step, for each token that came from it.", work.token_s)
    page.histogram("step_seconds", "Time of a step on the device.", work.step_s)
    page.histogram("plan_seconds", "Time that planning a step took.", work.plan_s)
    for activity in ("plan", "dispatch", "resample", "wait", "commit"):
        page.counter("loop_seconds", "Time of the loop by activity.", times[f"{activity}_s"], activity=activity)
    page.counter("loop_cpu_seconds", "CPU time of the loop's thread.", times["cpu_s"])
    page.counter("steps", "Steps dispatched.", times["steps"])
    page.counter("steps_starved", "Steps before which the device had waited for the host.", times["starved"])
