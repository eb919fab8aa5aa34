"""The engine's own numbers for Prometheus, from its last snapshot."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from headrace.core.outputs import Counts, EngineStats


class EngineCollector(Collector):
    """Turns ``stats`` into metrics whenever somebody scrapes; the engine itself only counts."""

    def __init__(self) -> None:
        self.stats = EngineStats()

    def collect(self) -> Iterator[Metric]:
        """Every metric of the snapshot."""
        stats = self.stats
        for name, (text, value) in _gauges(stats).items():
            yield GaugeMetricFamily(name, text, value=float(value))
        for name, (text, value) in _counters(stats).items():
            yield CounterMetricFamily(name, text, value=float(value))
        for name, (text, counts) in _histograms(stats).items():
            yield histogram(name, text, {"": counts})
        yield histogram(
            "headrace_step_tokens",
            "Tokens of a step by purpose: rows of prompts, newest tokens of answers, draft nodes to verify",
            {"prefill": stats.prefill_per_step, "decode": stats.decode_per_step, "verify": stats.verify_per_step},
            label="purpose",
        )


def _gauges(stats: EngineStats) -> dict[str, tuple[str, float]]:
    used = stats.slots_total - stats.slots_free - stats.slots_cached
    gauges: dict[str, tuple[str, float]] = {
        "headrace_running_sequences": ("Sequences running", stats.running),
        "headrace_waiting_sequences": ("Sequences waiting", stats.waiting),
        "headrace_slots": ("Slots for K and V", stats.slots_total),
        "headrace_slots_free": ("Slots free", stats.slots_free),
        "headrace_slots_cached": ("Slots held only by cached prefixes", stats.slots_cached),
        "headrace_slots_used": ("Slots held by live sequences", used),
        "headrace_step_limit_tokens": ("Tokens that a step may hold", stats.step_limit),
    }
    if stats.profile_error_p50 is not None:
        text = "Median of |predicted / measured - 1| of the latest steps"
        gauges["headrace_profile_error_p50"] = (text, stats.profile_error_p50)
    return gauges


def _counters(stats: EngineStats) -> dict[str, tuple[str, float]]:
    return {
        "headrace_engine_steps": ("Steps run", stats.steps),
        "headrace_engine_prefill_tokens": ("Prompt tokens computed", stats.prefill_tokens),
        "headrace_engine_decode_tokens": ("Rows decoded, draft nodes among them", stats.decode_tokens),
        "headrace_engine_cached_tokens": ("Prompt tokens not computed, thanks to the cache", stats.cached_tokens),
        "headrace_engine_preemptions": ("Sequences preempted", stats.preemptions),
        "headrace_engine_finished": ("Sequences finished", stats.finished),
        "headrace_engine_aborted": ("Sequences aborted", stats.aborted),
        "headrace_draft_tokens": ("Draft nodes verified", stats.drafted),
        "headrace_accepted_draft_tokens": ("Of them, those that became part of an answer", stats.accepted),
        "headrace_draft_seconds": ("Time spent drafting", stats.draft_s),
        "headrace_plan_seconds": ("Time spent in the policy", stats.plan_s),
        "headrace_profile_steps": ("Steps compared with the profile", stats.predicted_steps),
        "headrace_profile_predicted_seconds": ("What the profile expected of them", stats.predicted_seconds),
        "headrace_profile_measured_seconds": ("What they took", stats.observed_seconds),
    }


def _histograms(stats: EngineStats) -> dict[str, tuple[str, Counts]]:
    return {
        "headrace_step_seconds": ("Duration of a step", stats.step_seconds),
        "headrace_forward_seconds": ("Of it, the model's forward", stats.forward_seconds),
        "headrace_accepted_per_draft_tokens": ("Nodes accepted of a draft that was verified", stats.accepted_per_draft),
        "headrace_profile_error": ("|predicted / measured - 1| of a step", stats.profile_error),
    }


def histogram(name: str, text: str, by_label: Mapping[str, Counts], label: str | None = None) -> Metric:
    """A histogram, or one per value of ``label``."""
    family = HistogramMetricFamily(name, text, labels=[label] if label else [])
    for value, counts in by_label.items():
        upto = itertools.accumulate(counts.counts)
        edges = [*(str(bound) for bound in counts.bounds), "+Inf"]
        buckets = [(edge, float(n)) for edge, n in zip(edges, upto, strict=True)]
        family.add_metric([value] if label else [], buckets=buckets, sum_value=counts.total)
    return family
