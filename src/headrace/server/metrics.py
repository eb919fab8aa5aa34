"""Prometheus metrics, in a registry of their own."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Enum, Gauge, Histogram, Info
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from headrace.core.outputs import Counts, EngineStats, RequestTiming
from headrace.core.protocols import ServiceState
from headrace.server.outcome import Outcome
from headrace.version import __version__

_SECONDS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0)
_TOKEN_SECONDS = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.0)


class Metrics:
    """What the server counts; :meth:`render` writes it out together with a snapshot of the engine."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self._engine = _EngineCollector()
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
            "headrace_slo_requests", "Requests with latency targets, by attainment", ["tier", "met"], registry=registry
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
        if outcome.met is not None and outcome.complete:
            self._slo.labels(outcome.tier, "yes" if outcome.met else "no").inc()

    def _observe(self, timing: RequestTiming) -> None:
        if timing.ttft_ms is not None:
            self._ttft.observe(timing.ttft_ms / 1e3)
        if timing.tpot_ms is not None:
            self._tpot.observe(timing.tpot_ms / 1e3)
        if timing.last_token is not None:
            self._e2e.observe(timing.last_token - timing.arrival)
        if timing.first_scheduled is not None:
            self._queue.observe(timing.first_scheduled - timing.arrival)

    def render(self, accept: str, state: ServiceState, open_requests: int, stats: EngineStats) -> tuple[bytes, str]:
        """(text, content type) in the format that ``accept`` asks for."""
        self._state.state(state)
        self._open.set(open_requests)
        self._engine.stats = stats
        encoder, content_type = choose_encoder(accept)
        return encoder(self.registry), content_type


class _EngineCollector(Collector):
    """The engine's own numbers, from its last snapshot."""

    def __init__(self) -> None:
        self.stats = EngineStats()

    def collect(self) -> Iterator[Metric]:
        stats = self.stats
        gauges: dict[str, tuple[str, float]] = {
            "headrace_running_sequences": ("Sequences running", stats.running),
            "headrace_waiting_sequences": ("Sequences waiting", stats.waiting),
            "headrace_slots": ("Slots for K and V", stats.slots_total),
            "headrace_slots_free": ("Slots free", stats.slots_free),
            "headrace_slots_cached": ("Slots held only by cached prefixes", stats.slots_cached),
            "headrace_slots_used": (
                "Slots held by live sequences",
                stats.slots_total - stats.slots_free - stats.slots_cached,
            ),
        }
        if stats.profile_error_p50 is not None:
            text = "Median of |predicted / measured - 1| of the latest steps"
            gauges["headrace_profile_error_p50"] = (text, stats.profile_error_p50)
        counters: dict[str, tuple[str, float]] = {
            "headrace_engine_steps": ("Steps run", stats.steps),
            "headrace_engine_prefill_tokens": ("Prompt tokens computed", stats.prefill_tokens),
            "headrace_engine_decode_tokens": ("Tokens decoded", stats.decode_tokens),
            "headrace_engine_cached_tokens": ("Prompt tokens not computed, thanks to the cache", stats.cached_tokens),
            "headrace_engine_preemptions": ("Sequences preempted", stats.preemptions),
            "headrace_engine_finished": ("Sequences finished", stats.finished),
            "headrace_engine_aborted": ("Sequences aborted", stats.aborted),
            "headrace_profile_steps": ("Steps compared with the profile", stats.predicted_steps),
            "headrace_profile_predicted_seconds": ("What the profile expected of them", stats.predicted_seconds),
            "headrace_profile_measured_seconds": ("What they took", stats.observed_seconds),
        }
        histograms = {
            "headrace_step_seconds": ("Duration of a step", stats.step_seconds),
            "headrace_forward_seconds": ("Of it, the model's forward", stats.forward_seconds),
            "headrace_profile_error": ("|predicted / measured - 1| of a step", stats.profile_error),
        }
        for name, (text, value) in gauges.items():
            yield GaugeMetricFamily(name, text, value=float(value))
        for name, (text, value) in counters.items():
            yield CounterMetricFamily(name, text, value=float(value))
        for name, (text, counts) in histograms.items():
            yield _histogram(name, text, counts)


def _histogram(name: str, text: str, counts: Counts) -> Metric:
    upto = itertools.accumulate(counts.counts)
    edges = [*(str(bound) for bound in counts.bounds), "+Inf"]
    buckets = [(edge, float(n)) for edge, n in zip(edges, upto, strict=True)]
    return HistogramMetricFamily(name, text, buckets=buckets, sum_value=counts.total)
