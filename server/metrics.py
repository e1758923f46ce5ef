"""What Prometheus sees: vLLM's names with the prefix `trm_`, and what only this system has.

Gauges and counters of the engine are read from it at each scrape; latencies are recorded
as events pass, with the times at which the engine gave them. Every label is there from the
start: what appears with its first count, no rate can see. Models appear when they are loaded
and go when they are unloaded, and their counts with them. One registry per app.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from server.memory import malloc_in_use_bytes, python_blocks
from server.schemas.solve import Outcome
from trm.engine.engine import Engine
from trm.engine.request import Event, FinishReason
from trm.errors import DeviceError, TRMError

LATENCY_BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500)
STEP_BUCKETS = (0, 1, 2, 4, 8, 16, 32, 64)
TOKEN_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)
REQUEST_TOKEN_BUCKETS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000)
REJECTIONS = {
    400: "invalid",
    401: "unauthorized",
    403: "forbidden",
    404: "not_found",
    405: "wrong_method",
    408: "slow_body",
    413: "too_large",
    415: "encoded",
    429: "overloaded",
    431: "head_too_large",
    500: "internal",
    503: "unavailable",
    504: "timeout",
}
"""Status that refused a POST or an unreadable request, or of the error that ended a stream -> label `reason`."""
DEVICE_FAILED = "failed"  # in place of "internal", where a request ended with a DeviceError


def rejection(status: int, error: TRMError | None) -> str | None:
    """The label of a request that ended with this status, and with `error` if it got as far as the engine."""
    return DEVICE_FAILED if status == 500 and isinstance(error, DeviceError) else REJECTIONS.get(status)


@dataclass
class Times:
    """When a request arrived and got its first and its latest tokens: seconds by one clock, None for not yet."""

    arrived_at: float
    first_at: float | None = None
    last_at: float | None = None


class Metrics:
    """Counters and histograms of one app, and its view of the engine."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        registry.register(_MemoryCollector())
        self.alive = Gauge("trm_alive", "0 while the engine or its device has failed or hangs", registry=registry)
        self.alive.set(1)
        self.ready = Gauge("trm_ready", "1 while new work is taken", registry=registry)
        self.finished = Counter(
            "trm_request_success",
            "Accepted requests that ended, by how",
            ["model_name", "finished_reason"],
            registry=registry,
        )
        self.rejected = Counter("trm_request_rejected", "HTTP requests refused, by why", ["reason"], registry=registry)
        self.departures = Counter(
            "trm_client_disconnects", "HTTP requests whose client left before the response was whole", registry=registry
        )
        self.answers = Counter("trm_solve_answers", "Questions solved, by outcome", ["outcome"], registry=registry)
        self.first_token_s = Histogram(
            "trm_time_to_first_token_seconds",
            "From arrival to the first token",
            ["model_name"],
            buckets=LATENCY_BUCKETS_S,
            registry=registry,
        )
        self.inter_token_s = Histogram(
            "trm_inter_token_latency_seconds",
            "Between one token of a reply and the next, or the next few where they come together",
            ["model_name"],
            buckets=TOKEN_BUCKETS_S,
            registry=registry,
        )
        self.per_token_s = Histogram(
            "trm_request_time_per_output_token_seconds",
            "Mean over the tokens after the first of a reply that was not cut short",
            ["model_name"],
            buckets=TOKEN_BUCKETS_S,
            registry=registry,
        )
        self.request_s = Histogram(
            "trm_e2e_request_latency_seconds",
            "From arrival to the end of a reply that was not cut short",
            ["model_name"],
            buckets=LATENCY_BUCKETS_S,
            registry=registry,
        )
        self.queue_s = Histogram(
            "trm_request_queue_time_seconds",
            "From acceptance to the start of decoding, or to the end of a request that never got there",
            ["model_name"],
            buckets=LATENCY_BUCKETS_S,
            registry=registry,
        )
        self.steps_per_token = Histogram(
            "trm_supervision_steps_per_token",
            "Mean over the tokens of a reply that was not cut short",
            ["model_name"],
            buckets=STEP_BUCKETS,
            registry=registry,
        )
        self.prompt_tokens = Histogram(
            "trm_request_prompt_tokens",
            "Prompt tokens of a request that ended",
            ["model_name"],
            buckets=REQUEST_TOKEN_BUCKETS,
            registry=registry,
        )
        self.generation_tokens = Histogram(
            "trm_request_generation_tokens",
            "Tokens decoded for a request that ended",
            ["model_name"],
            buckets=REQUEST_TOKEN_BUCKETS,
            registry=registry,
        )
        self._models: dict[str, ModelMetrics] = {}

        for reason in (*REJECTIONS.values(), DEVICE_FAILED):
            self.rejected.labels(reason)
        for outcome in get_args(Outcome):
            self.answers.labels(outcome)

    def watch(self, engine: Engine, ready: Callable[[], bool]) -> None:
        """Show this engine's numbers too, and what `ready` says."""
        self.registry.register(_EngineCollector(engine))
        self.alive.set_function(engine.alive)
        self.ready.set_function(ready)

    def of(self, model: str) -> "ModelMetrics":
        """The counts of one model, from 0 where it is new."""
        if model not in self._models:
            self._models[model] = ModelMetrics(self, model)
        return self._models[model]

    def forget(self, model: str) -> None:
        """Show nothing of a model any more."""
        for metric in (
            *(self.finished, self.first_token_s, self.inter_token_s, self.per_token_s, self.request_s, self.queue_s),
            *(self.steps_per_token, self.prompt_tokens, self.generation_tokens),
        ):
            metric.remove_by_labels({"model_name": model})
        self._models.pop(model, None)

    def exposition(self) -> bytes:
        """Everything in Prometheus' text format."""
        return generate_latest(self.registry)


class ModelMetrics:
    """What is counted of one model's requests. Its series are looked up once, not with every token."""

    def __init__(self, metrics: Metrics, model: str) -> None:
        self.finished = {reason: metrics.finished.labels(model, reason) for reason in get_args(FinishReason)}
        self.first_token_s = metrics.first_token_s.labels(model)
        self.inter_token_s = metrics.inter_token_s.labels(model)
        self.per_token_s = metrics.per_token_s.labels(model)
        self.request_s = metrics.request_s.labels(model)
        self.queue_s = metrics.queue_s.labels(model)
        self.steps_per_token = metrics.steps_per_token.labels(model)
        self.prompt_tokens = metrics.prompt_tokens.labels(model)
        self.generation_tokens = metrics.generation_tokens.labels(model)

    def record(self, event: Event, times: Times, at: float) -> None:
        """Count one event, given at time `at`, and bring its request's times up to date."""
        if event.token_ids:
            if times.first_at is None or times.last_at is None:
                times.first_at = at
                self.first_token_s.observe(at - times.arrived_at)
            else:
                self.inter_token_s.observe(at - times.last_at)
            times.last_at = at
        if event.finish_reason is None or event.usage is None:
            return
        usage = event.usage
        self.finished[event.finish_reason].inc()
        self.queue_s.observe(usage.queue_s)
        self.prompt_tokens.observe(usage.prompt_tokens)
        self.generation_tokens.observe(usage.completion_tokens)
        if event.finish_reason in ("stop", "length"):
            self.request_s.observe(at - times.arrived_at)
            self.steps_per_token.observe(usage.supervision_steps / max(1, usage.completion_tokens))
            if usage.completion_tokens > 1 and times.first_at is not None and times.last_at is not None:
                self.per_token_s.observe((times.last_at - times.first_at) / (usage.completion_tokens - 1))


class _EngineCollector(Collector):
    """The engine's statistics, read when Prometheus asks."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def describe(self) -> Iterable[Metric]:
        return []  # registering must not ask the engine

    def collect(self) -> Iterable[Metric]:
        stats, config = self._engine.stats(), self._engine.config
        gauges = (
            ("trm_max_rows", "Requests that can be decoded together", config.max_rows),
            ("trm_max_queue", "Requests that may wait", config.max_queue),
            ("trm_num_requests_running", "Requests being decoded", stats.requests_running),
            ("trm_num_requests_waiting", "Requests in the queue", stats.requests_waiting),
            ("trm_kv_cache_bytes", "Size of the key/value cache", stats.kv_cache_bytes),
            ("trm_kv_cache_bytes_per_token", "Cache that one position takes", stats.kv_cache_bytes_per_token),
            ("trm_kv_cache_usage_ratio", "Share of the key/value cache that is reserved", stats.kv_cache_usage_ratio),
        )
        counters = (
            ("trm_prompt_tokens", "Prompt tokens taken", stats.prompt_tokens),
            ("trm_cached_prompt_tokens", "Prompt tokens taken over from another request", stats.cached_tokens),
            ("trm_generation_tokens", "Tokens decoded", stats.generation_tokens),
            ("trm_draft_tokens", "Tokens that the backbone proposed", stats.draft_tokens),
            ("trm_accepted_tokens", "Proposed tokens that the recursion chose", stats.accepted_tokens),
            ("trm_engine_steps", "Turns of the engine's loop", stats.steps),
            ("trm_ticks", "Supervision steps of the whole batch", stats.ticks),
            ("trm_backbone_calls", "Passes through the backbone", stats.backbone_calls),
            ("trm_row_steps", "Supervision steps, each row of a tick counted", stats.row_steps),
            ("trm_row_places", "Rows that could have advanced, summed over the engine's steps", stats.row_places),
        )
        yield from (GaugeMetricFamily(name, text, value=value) for name, text, value in gauges)
        yield from (CounterMetricFamily(name, text, value=value) for name, text, value in counters)


class _MemoryCollector(Collector):
    """What is in use of the memory that the process holds."""

    def collect(self) -> Iterable[Metric]:
        yield GaugeMetricFamily(
            "trm_python_blocks", "Pieces of memory that Python's objects hold", value=python_blocks()
        )
        if (used := malloc_in_use_bytes()) is not None:
            yield GaugeMetricFamily("trm_malloc_in_use_bytes", "Bytes that malloc has handed out", value=used)
