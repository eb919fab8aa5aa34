"""Sums, latencies and attainment."""

from __future__ import annotations

import pytest

from headrace.core.outputs import RequestTiming
from headrace.core.request import SLO
from headrace.server.outcome import Outcome


def outcome(slo: SLO, *timings: RequestTiming, reasons: tuple[str, ...] = ("stop",)) -> Outcome:
    return Outcome(5, 7, 2, slo, timings=timings, finish_reasons=reasons)


FAST = RequestTiming(
    10.0, first_scheduled=10.01, first_token=10.1, last_token=10.5, decoded=5
)  # 100 ms, 100 ms a token
SLOW = RequestTiming(
    10.0, first_scheduled=10.01, first_token=10.3, last_token=10.5, decoded=2
)  # 300 ms, 200 ms a token
SINGLE = RequestTiming(10.0, first_token=10.1, last_token=10.1, decoded=1)


def test_usage() -> None:
    usage = outcome(SLO(ttft_ms=150), FAST).usage()
    assert usage["total_tokens"] == 12
    assert usage["prompt_tokens_details"] == {"cached_tokens": 2}
    assert usage["slo"]["achieved"] == {"ttft_ms": pytest.approx(100), "tpot_ms": pytest.approx(100)}
    assert usage["slo"]["met"] is True


def test_the_worst_choice_counts() -> None:
    both = outcome(SLO(ttft_ms=150, tpot_ms=150), FAST, SLOW)
    assert both.ttft_ms == pytest.approx(300)
    assert both.tpot_ms == pytest.approx(200)
    assert both.met is False
    assert outcome(SLO(ttft_ms=150, tpot_ms=150), FAST).met is True


@pytest.mark.parametrize(
    ("slo", "met"),
    [
        (SLO(), None),
        (SLO(ttft_ms=99), False),
        (SLO(ttft_ms=101), True),
        (SLO(tpot_ms=99), False),
        (SLO(tpot_ms=101), True),
    ],
)
def test_attainment(slo: SLO, met: bool | None) -> None:
    assert outcome(slo, FAST).met is met


def test_one_token_has_no_tpot_to_miss() -> None:
    assert outcome(SLO(tpot_ms=0.001), SINGLE).met is True
    assert outcome(SLO(tpot_ms=0.001), SINGLE).usage()["slo"]["achieved"]["tpot_ms"] is None


def test_no_token_is_a_miss_when_there_was_a_target() -> None:
    assert outcome(SLO(ttft_ms=1)).met is False
    assert outcome(SLO()).met is None


def test_complete() -> None:
    assert outcome(SLO(), FAST, reasons=("stop", "length")).complete
    assert not outcome(SLO(), FAST, reasons=("stop", "cancelled")).complete
