"""Sums, latencies and attainment."""

from __future__ import annotations

import pytest

from headrace.core.outputs import RequestTiming
from headrace.core.request import SLO
from headrace.server.api.outcome import Outcome


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


@pytest.mark.parametrize(
    ("reasons", "ttft", "attained"),
    [
        (("stop",), 150, True),
        (("stop",), 50, False),
        (("stop", "error"), 150, False),
        (("cancelled",), 150, None),
        (("cancelled",), 50, False),
        (("stop", "cancelled"), 150, None),
    ],
)
def test_what_attainment_counts(reasons: tuple[str, ...], ttft: float, attained: bool | None) -> None:
    assert outcome(SLO(ttft_ms=ttft), FAST, reasons=reasons).attained is attained
    assert outcome(SLO(), FAST, reasons=reasons).attained is None


def test_slack_is_seconds_to_the_deadline_of_the_worst_choice() -> None:
    both = outcome(SLO(ttft_ms=250, tpot_ms=150), FAST, SLOW).slack()
    assert both == {"ttft": pytest.approx(-0.05), "tpot": pytest.approx(-0.05)}  # SLOW: one token 50 ms late
    assert outcome(SLO(tpot_ms=150), FAST).slack() == {"tpot": pytest.approx(4 * 0.05)}  # four tokens 50 ms early
    assert outcome(SLO(), FAST).slack() == {}
    assert outcome(SLO(tpot_ms=150), SINGLE).slack() == {}
    assert outcome(SLO(ttft_ms=150)).slack() == {}


@pytest.mark.parametrize("target", [99.9, 100.1])
def test_slack_is_below_zero_when_and_only_when_the_target_is_missed(target: float) -> None:
    judged = outcome(SLO(tpot_ms=target), FAST)
    assert (judged.slack()["tpot"] >= 0) is judged.met


def test_what_became_of_drafts() -> None:
    made = Outcome(
        5, 9, 2, SLO(), timings=[FAST, SLOW], finish_reasons=("stop", "stop"), steps=4, drafted=12, accepted=3
    )
    assert made.usage()["speculation"] == {
        "steps": 4,
        "drafted_tokens": 12,
        "accepted_tokens": 3,
        "tokens_per_step": 1.75,  # seven after the two first ones, in four steps
    }
    assert outcome(SLO(), SINGLE).usage()["speculation"]["tokens_per_step"] is None
    assert made.usage()["slo"]["class"] == "none"
