"""How well steps are predicted: the error on unseen steps, and whether it holds in a long run. Pure functions of rows."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

Rows = Sequence[Mapping[str, Any]]


class Window(TypedDict):
    """Predictions in a stretch of time.

    Attributes:
        from_s, to_s: where it lies, on the samples' clock.
        measured_s: what the steps took together.
        bias: predicted / measured - 1 of all of them together; below 0 they took longer than expected.
        error_p50: median over the samples of the running median error, None where no sample had one.
    """

    from_s: float
    to_s: float
    measured_s: float
    bias: float
    error_p50: float | None


def profile_error_p50(rows: Rows) -> float | None:
    """Median of ``|predicted_ms / measured_ms - 1|`` over the rows that have both; None of none."""
    errors = [abs(r["predicted_ms"] / r["measured_ms"] - 1) for r in rows if "predicted_ms" in r and "measured_ms" in r]
    return statistics.median(errors) if errors else None


def windows(samples: Rows, seconds: float) -> list[Window]:
    """Predictions by windows of ``seconds``, those without a step left out.

    Args:
        samples: in order of time, with ``at_s`` and the engine's running totals ``profile_predicted_seconds`` and
            ``profile_measured_seconds``, perhaps ``profile_error_p50``. An engine that starts again counts from 0 again.

    Raises:
        ValueError: the window has no length.
    """
    if not seconds > 0:
        raise ValueError(f"a window of {seconds} s: give more than 0")
    known = [s for s in samples if "profile_measured_seconds" in s]
    grouped: dict[int, list[tuple[Mapping[str, Any], Mapping[str, Any]]]] = {}
    for before, after in itertools.pairwise(known):
        grouped.setdefault(int((after["at_s"] - known[0]["at_s"]) / seconds), []).append((before, after))
    found: list[Window] = []
    for pairs in grouped.values():
        measured = sum(_gained(b, a, "profile_measured_seconds") for b, a in pairs)
        predicted = sum(_gained(b, a, "profile_predicted_seconds") for b, a in pairs)
        errors = [a["profile_error_p50"] for _, a in pairs if a.get("profile_error_p50") is not None]
        if measured > 0:
            found.append(
                Window(
                    from_s=pairs[0][0]["at_s"],
                    to_s=pairs[-1][1]["at_s"],
                    measured_s=measured,
                    bias=predicted / measured - 1,
                    error_p50=statistics.median(errors) if errors else None,
                )
            )
    return found


def drift(samples: Rows, seconds: float = 60.0) -> dict[str, float]:
    """The windows in four figures: ``profile_bias_first`` and ``_last`` (means of the first and the last third of windows),
    ``_worst`` (the window farthest from 0) and ``profile_bias_drift``, the change from first to last. Empty below three windows."""
    found = [w["bias"] for w in windows(samples, seconds)]
    if len(found) < 3:
        return {}
    third = len(found) // 3
    first, last = statistics.mean(found[:third]), statistics.mean(found[-third:])
    return {
        "profile_bias_first": first,
        "profile_bias_last": last,
        "profile_bias_worst": max(found, key=abs),
        "profile_bias_drift": last - first,
    }


def _gained(before: Mapping[str, Any], after: Mapping[str, Any], name: str) -> float:
    """How much a running total grew; all of it when the engine started again."""
    restarted = after["profile_measured_seconds"] < before["profile_measured_seconds"]
    grown: float = after[name] - (0.0 if restarted else before[name])
    return grown
