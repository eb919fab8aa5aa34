"""How an open request stands towards its targets. Pure."""

from __future__ import annotations

from typing import Literal

from headrace.core.outputs import RequestTiming
from headrace.core.request import SLO

Standing = Literal["none", "met", "risk", "missed"]
"""No targets; on schedule or within them; late but not lost, or nearly late; out of reach."""

WORST_FIRST: tuple[Standing, ...] = ("missed", "risk", "met", "none")

NEARLY = 0.7
"""Share of the TTFT target after which a request without a token is at risk."""


def standing(slo: SLO, timing: RequestTiming, limit: int, now: float) -> Standing:
    """Where a sequence stands at ``now``.

    TTFT is judged by the clock. TPOT is judged by its schedule, on which token k + 1 is due ``k * tpot_ms`` after the first:
    behind it a sequence is at risk, and it has missed once even its last token, the ``limit``-th, would be late.

    Args:
        slo: targets.
        timing: what happened so far; ``decoded`` counts its tokens.
        limit: tokens it may generate.
        now: seconds on the clock of ``timing``.
    """
    if slo == SLO():
        return "none"
    if timing.first_token is None:
        return _waiting(slo, (now - timing.arrival) * 1e3)
    if slo.ttft_ms is not None and (timing.ttft_ms or 0.0) > slo.ttft_ms:
        return "missed"
    if slo.tpot_ms is None:
        return "met"
    elapsed = (now - timing.first_token) * 1e3
    if elapsed > slo.tpot_ms * max(limit - 1, 1):
        return "missed"
    return "risk" if elapsed > slo.tpot_ms * max(timing.decoded, 1) else "met"


def ended_as(slo: SLO, timing: RequestTiming) -> Standing:
    """Where a sequence stands that has ended."""
    met = slo.met_by(timing.ttft_ms, timing.tpot_ms)
    return "none" if met is None else "met" if met else "missed"


def _waiting(slo: SLO, waited_ms: float) -> Standing:
    if slo.ttft_ms is None or waited_ms <= NEARLY * slo.ttft_ms:
        return "met"
    return "risk" if waited_ms <= slo.ttft_ms else "missed"
