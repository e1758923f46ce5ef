"""What Prometheus sees: vLLM's names with the prefix `trm_`, and what only this system has.

Gauges and counters of the engine are read from it at each scrape; latencies are recorded
as events pass, with the times at which the engine gave them. One registry per app.
"""

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from trm.engine.engine import Engine
from trm.engine.request import Event

LATENCY_BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500)
STEP_BUCKETS = (0, 1, 2, 4, 8, 16, 32, 64)
TOKEN_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)
REJECTIONS = {
    400: "invalid",
    401: "unauthorized",
    404: "not_found",
    413: "too_large",
    429: "overloaded",
    503: "unavailable",
}
"""Status of a refused POST -> label `reason`."""


class Metrics:
    """Counters and histograms of one app, and its view of the engine."""

    def __init__(self, engine: Engine) -> None:
        self.registry = registry = CollectorRegistry()
        registry.register(_EngineCollector(engine))
        self.finished = Counter(
            "trm_request_success", "Accepted requests that ended, by how", ["finished_reason"], registry=registry
        )
        self.rejected = Counter("trm_request_rejected", "HTTP requests refused, by why", ["reason"], registry=registry)
        self.answers = Counter("trm_solve_answers", "Questions solved, by outcome", ["outcome"], registry=registry)
        self.first_token_s = Histogram(
            "trm_time_to_first_token_seconds",
            "From submission to the first token",
            buckets=LATENCY_BUCKETS_S,
            registry=registry,
        )
        self.inter_token_s = Histogram(
            "trm_inter_token_latency_seconds",
            "Between tokens of one reply",
            buckets=TOKEN_BUCKETS_S,
            registry=registry,
        )
        self.request_s = Histogram(
            "trm_e2e_request_latency_seconds",
            "From submission to the end of a reply that was not cut short",
            buckets=LATENCY_BUCKETS_S,
            registry=registry,
        )
        self.steps_per_token = Histogram(
            "trm_supervision_steps_per_token",
            "Mean over the tokens of a reply that was not cut short",
            buckets=STEP_BUCKETS,
            registry=registry,
        )

    def record(self, event: Event, age_s: float, gap_s: float | None) -> None:
        """Count one event, `age_s` after its request's submission, `gap_s` after the request's last tokens if any."""
        if event.token_ids and gap_s is None:
            self.first_token_s.observe(age_s)
        elif gap_s is not None:
            for _ in event.token_ids:
                self.inter_token_s.observe(gap_s / len(event.token_ids))
        if event.finish_reason is not None:
            self.finished.labels(event.finish_reason).inc()
        if event.finish_reason in ("stop", "length"):
            self.request_s.observe(age_s)
            if event.usage is not None and event.usage.completion_tokens:
                self.steps_per_token.observe(event.usage.supervision_steps / event.usage.completion_tokens)

    def exposition(self) -> bytes:
        """Everything in Prometheus' text format."""
        return generate_latest(self.registry)


class _EngineCollector(Collector):
    """The engine's statistics, read when Prometheus asks."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def describe(self) -> Iterable[Metric]:
        return []  # registering must not ask the engine

    def collect(self) -> Iterable[Metric]:
        stats = self._engine.stats()
        gauges = (
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
