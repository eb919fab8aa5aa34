"""Where a request stands, second by second."""

from __future__ import annotations

import pytest

from headrace.core.outputs import RequestTiming
from headrace.core.request import SLO
from headrace.server.slo.standing import ended_as, standing

WAITING = RequestTiming(10.0)


def decoding(tokens: int, first: float = 11.0) -> RequestTiming:
    return RequestTiming(10.0, first_token=first, last_token=first, decoded=tokens)


@pytest.mark.parametrize(
    ("slo", "timing", "now", "stands"),
    [
        (SLO(), WAITING, 99.0, "none"),
        (SLO(None, 50), WAITING, 99.0, "met"),
        (SLO(1000), WAITING, 10.7, "met"),
        (SLO(1000), WAITING, 10.8, "risk"),
        (SLO(1000), WAITING, 11.1, "missed"),
        (SLO(1000), decoding(1), 99.0, "met"),
        (SLO(999), decoding(1), 11.0, "missed"),
        # 100 ms a token, at most 11: the second is due at 11.1, the third at 11.2, the last at 12
        (SLO(None, 100), decoding(1), 11.09, "met"),
        (SLO(None, 100), decoding(1), 11.11, "risk"),
        (SLO(None, 100), decoding(2), 11.11, "met"),
        (SLO(None, 100), decoding(9), 11.99, "risk"),
        (SLO(None, 100), decoding(10), 12.01, "missed"),
        (SLO(None, 100), decoding(10), 11.99, "met"),
        (SLO(500, 100), decoding(10), 11.0, "missed"),
    ],
)
def test_standing(slo: SLO, timing: RequestTiming, now: float, stands: str) -> None:
    assert standing(slo, timing, 11, now) == stands


@pytest.mark.parametrize(("last", "stands"), [(11.95, "met"), (12.05, "missed")])
def test_one_that_has_ended_stands_as_its_verdict(last: float, stands: str) -> None:
    timing = RequestTiming(10.0, first_token=11.0, last_token=last, decoded=11)
    assert ended_as(SLO(None, 100), timing) == stands
    assert ended_as(SLO(), timing) == "none"
