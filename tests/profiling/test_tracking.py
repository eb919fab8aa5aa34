"""The account of predictions beside a running engine."""

from __future__ import annotations

import pytest

from headrace.core.batch import StepShape
from headrace.core.outputs import EngineStats
from headrace.profiling import MeasuredProfile, Point
from headrace.profiling.tracking import EVERY, RECENT, WORTH_KEEPING, Tracker


def decode(rows: int) -> StepShape:
    return StepShape(0, rows, 100 * rows, rows, 101 * rows)


def profile() -> MeasuredProfile:
    return MeasuredProfile([Point(decode(n), (10.0 + n,)) for n in (1, 2, 4, 8)])


def test_errors_are_of_predictions_made_before_the_step() -> None:
    tracker, stats = Tracker(profile()), EngineStats()
    tracker.report(stats)
    assert (stats.profile_error_p50, stats.predicted_steps) == (None, 0)
    tracker.observe(decode(4), 28.0)
    tracker.report(stats)
    assert stats.profile_error_p50 == pytest.approx(0.5)
    assert stats.predicted_seconds == pytest.approx(0.014)
    assert stats.observed_seconds == pytest.approx(0.028)
    assert sum(stats.profile_error.counts) == stats.predicted_steps == 1
    assert tracker.profile.cost(decode(4)) > 14.0, "it has learnt"
    for _ in range(EVERY):
        tracker.observe(decode(4), 1e9)
    tracker.report(stats)
    assert stats.profile_error_p50 == pytest.approx(1.0)


def test_the_median_is_of_the_latest_steps() -> None:
    tracker, stats = Tracker(profile()), EngineStats()
    for _ in range(100):
        tracker.observe(decode(4), 100.0)
    for _ in range(RECENT + 200):
        tracker.observe(decode(4), 14.0)
    tracker.report(stats)
    assert stats.profile_error_p50 == pytest.approx(0.0, abs=1e-3)
    assert stats.predicted_steps == RECENT + 300


@pytest.mark.parametrize(("steps", "kept"), [(WORTH_KEEPING - 1, 0), (WORTH_KEEPING, 1)])
def test_what_was_learnt_is_handed_over_once(steps: int, kept: int) -> None:
    handed: list[MeasuredProfile] = []
    tracker = Tracker(profile(), handed.append)
    for _ in range(steps):
        tracker.observe(decode(4), 28.0)
    tracker.close()
    tracker.close()
    assert handed == [tracker.profile] * kept
