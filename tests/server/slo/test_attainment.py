"""Shares of recent verdicts."""

from __future__ import annotations

from headrace.core.outputs import RequestTiming
from headrace.core.request import SLO
from headrace.server.api.outcome import Outcome
from headrace.server.slo.attainment import Attainment


def outcome(ttft_s: float, name: str = "chat", slo: SLO = SLO(1000), reason: str = "stop") -> Outcome:
    timing = RequestTiming(0.0, first_token=ttft_s, last_token=ttft_s, decoded=1)
    return Outcome(1, 1, 0, slo, slo_class=name, timings=[timing], finish_reasons=(reason,))


def test_shares_by_class_over_the_latest() -> None:
    made = Attainment(window=3)
    for seconds in (0.5, 2.0, 0.5, 0.5):
        made.count(outcome(seconds))
    made.count(outcome(2.0, "code"))
    made.count(outcome(2.0, "none", SLO()))
    assert made.recent("chat") == (2, 3)
    assert made.recent("code") == (0, 1)
    assert made.recent("none") == made.recent("unheard") == (0, 0)
    assert made.classes() == ("chat", "code")


def test_failures_count_as_missed_and_clients_that_left_do_not() -> None:
    made = Attainment()
    made.count(outcome(0.5, reason="error"))
    made.count(outcome(0.5, reason="cancelled"))
    assert made.recent("chat") == (0, 1)
    made.count(outcome(2.0, reason="cancelled"))  # late before its client left
    assert made.recent("chat") == (0, 2)
