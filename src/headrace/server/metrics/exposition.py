"""Prometheus metrics, in a registry of their own."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Enum, Gauge, Histogram, Info
from prometheus_client.exposition import choose_encoder

from headrace.core.outputs import EngineStats, RequestTiming
from headrace.core.protocols import ServiceState
from headrace.server.api.outcome import Outcome
from headrace.server.metrics.engine import EngineCollector
from headrace.server.slo.attainment import Attainment
from headrace.version import __version__

_SECONDS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0)
_SLACK_SECONDS = (
    -100.0, -30.0, -10.0, -3.0, -1.0, -0.3, -0.1, -0.03, -0.01, 0.0, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0,
)  # fmt: skip
_TOKEN_SECONDS = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.0)


class Metrics:
    """What the server counts; :meth:`render` writes it out together with a snapshot of the engine."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self._engine = EngineCollector()
        registry.register(self._engine)
        Info("headrace_build", "Version of the server", registry=registry).info({"version": __version__})
        self._state = Enum(
            "headrace_state",
            "State of the service",
            states=["loading", "ready", "draining", "failed"],
            registry=registry,
        )
        self._open = Gauge("headrace_open_requests", "Requests the server is answering", registry=registry)
        self._http = Counter(
            "headrace_http_requests", "HTTP requests", ["endpoint", "method", "status"], registry=registry
        )
        self._finished = Counter(
            "headrace_sequences_finished",
            "Sequences by finish reason",
            ["endpoint", "finish_reason"],
            registry=registry,
        )
        self._prompt = Counter("headrace_prompt_tokens", "Tokens of prompts", registry=registry)
        self._generated = Counter("headrace_generation_tokens", "Tokens generated", registry=registry)
        self._cached = Counter("headrace_cached_prompt_tokens", "Prompt tokens found in the cache", registry=registry)
        self._slo = Counter(
            "headrace_slo_requests",
            "Requests with latency targets, by attainment; failed ones count as missed",
            ["slo_class", "met"],
            registry=registry,
        )
        self._attainment = Gauge(
            "headrace_slo_attainment_ratio",
            "Share of the latest 500 requests of a class that met their targets",
            ["slo_class"],
            registry=registry,
        )
        self._slack = Histogram(
            "headrace_slo_slack_seconds",
            "Deadline minus reality: above 0 early, below 0 late; for TPOT at the last token",
            ["slo_class", "target"],
            buckets=_SLACK_SECONDS,
            registry=registry,
        )
        self._ttft = self._histogram("headrace_ttft_seconds", "Arrival to first token", _SECONDS)
        self._tpot = self._histogram("headrace_tpot_seconds", "Decode time over decoded tokens", _TOKEN_SECONDS)
        self._e2e = self._histogram("headrace_e2e_seconds", "Arrival to last token", _SECONDS)
        self._queue = self._histogram("headrace_queue_seconds", "Arrival to first step", _SECONDS)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(name, text, buckets=buckets, registry=self.registry)

    def count_http(self, endpoint: str, method: str, status: int) -> None:
        """Count an answered HTTP request; ``endpoint`` is a route's template, never a client's text."""
        self._http.labels(endpoint, method, str(status)).inc()

    def count_outcome(self, endpoint: str, outcome: Outcome) -> None:
        """Count a request that has ended, whichever way."""
        self._prompt.inc(outcome.prompt_tokens)
        self._generated.inc(outcome.completion_tokens)
        self._cached.inc(outcome.cached_tokens)
        for reason in outcome.finish_reasons:
            self._finished.labels(endpoint, reason).inc()
        for timing in outcome.timings:
            self._observe(timing)
        if outcome.attained is not None:
            self._slo.labels(outcome.slo_class, "yes" if outcome.attained else "no").inc()
            for target, seconds in outcome.slack().items():
                self._slack.labels(outcome.slo_class, target).observe(seconds)

    def _observe(self, timing: RequestTiming) -> None:
        if timing.ttft_ms is not None:
            self._ttft.observe(timing.ttft_ms / 1e3)
        if timing.tpot_ms is not None:
            self._tpot.observe(timing.tpot_ms / 1e3)
        if timing.last_token is not None:
            self._e2e.observe(timing.last_token - timing.arrival)
        if timing.first_scheduled is not None:
            self._queue.observe(timing.first_scheduled - timing.arrival)

    def show_attainment(self, attainment: Attainment) -> None:
        """Take over the present shares."""
        for name in attainment.classes():
            met, judged = attainment.recent(name)
            self._attainment.labels(name).set(met / judged)

    def render(self, accept: str, state: ServiceState, open_requests: int, stats: EngineStats) -> tuple[bytes, str]:
        """(text, content type) in the format that ``accept`` asks for."""
        self._state.state(state)
        self._open.set(open_requests)
        self._engine.stats = stats
        encoder, content_type = choose_encoder(accept)
        return encoder(self.registry), content_type
