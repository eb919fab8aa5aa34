"""Latency, attainment and throughput of a run: pure functions over one row per request.

Times are milliseconds or seconds as named. TPOT is decode time over decoded tokens, the first token excluded; TTFT counts
queueing. A request that never finished violates its targets, and so does one that was refused.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypedDict

PERCENTILES = (50, 90, 99)


class RequestRow(TypedDict):
    """What became of one request; None where it never got that far.

    ``end_s`` is when its last token came (or when the run was cut off), on the same clock as ``arrival_s``.
    """

    id: str
    category: str
    owner: str
    arrival_s: float
    end_s: float
    prompt_tokens: int
    output_tokens: int
    decoded: int
    cached_tokens: int
    preemptions: int
    finished: bool
    ttft_ms: float | None
    tpot_ms: float | None
    e2e_ms: float | None
    slo_ttft_ms: float | None
    slo_tpot_ms: float | None


Rows = Sequence[Mapping[str, Any]]


def attained(row: Mapping[str, Any]) -> bool:
    """Whether a request finished within its targets. One token has no TPOT and so cannot miss it."""
    if not row["finished"]:
        return False
    for measure, target in (("ttft_ms", "slo_ttft_ms"), ("tpot_ms", "slo_tpot_ms")):
        if row[target] is not None and row[measure] is not None and row[measure] > row[target]:
            return False
    return True


def attainment(rows: Rows) -> float:
    """Share of requests within their targets; 1.0 of none."""
    return sum(attained(r) for r in rows) / len(rows) if rows else 1.0


def duration_s(rows: Rows) -> float:
    """Seconds from the first arrival to the last end."""
    return max(r["end_s"] for r in rows) - min(r["arrival_s"] for r in rows) if rows else 0.0


def goodput(rows: Rows) -> float:
    """Generated tokens a second of requests within their targets."""
    return _rate(sum(r["decoded"] for r in rows if attained(r)), duration_s(rows))


def throughput(rows: Rows) -> float:
    """Generated tokens a second, of all requests."""
    return _rate(sum(r["decoded"] for r in rows), duration_s(rows))


def percentile(values: Iterable[float], q: float) -> float:
    """The ``q``-th percentile (0 to 100), linear between order statistics; NaN of nothing."""
    ordered = sorted(values)
    if not ordered:
        return math.nan
    place = (len(ordered) - 1) * q / 100
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def worst_window(rows: Rows, seconds: float) -> float:
    """Lowest attainment of requests that arrived in the same window of ``seconds``; windows follow from the first arrival."""
    if not rows:
        return 1.0
    start = min(r["arrival_s"] for r in rows)
    windows: dict[int, list[Mapping[str, Any]]] = {}
    for row in rows:
        windows.setdefault(int((row["arrival_s"] - start) / seconds), []).append(row)
    return min(attainment(window) for window in windows.values())


def summary(rows: Rows) -> dict[str, float]:
    """All figures of a run by name: counts, percentiles in milliseconds, rates per second."""
    found: dict[str, float] = {
        "requests": len(rows),
        "finished": sum(r["finished"] for r in rows),
        "attainment": attainment(rows),
        "worst_minute_attainment": worst_window(rows, 60.0),
        "goodput_tok_s": goodput(rows),
        "throughput_tok_s": throughput(rows),
        "preemptions": sum(r["preemptions"] for r in rows),
    }
    prompts = sum(r["prompt_tokens"] for r in rows)
    found["cached_share"] = sum(r["cached_tokens"] for r in rows) / prompts if prompts else 0.0
    for name in ("ttft_ms", "tpot_ms", "e2e_ms"):
        values = [r[name] for r in rows if r[name] is not None]
        for q in PERCENTILES:
            found[f"{name}_p{q}"] = percentile(values, q)
    return found


def _rate(tokens: float, seconds: float) -> float:
    return tokens / seconds if seconds > 0 else 0.0
