"""Prediction errors from rows."""

from __future__ import annotations

import pytest

from headrace.bench.simulation.prediction import drift, profile_error_p50, windows


def samples(bias: list[float], each_s: float = 10.0) -> list[dict[str, float]]:
    """A sample every ten seconds, with a second of steps in between that was predicted as ``1 + bias`` seconds."""
    found = [{"at_s": 5.0, "profile_predicted_seconds": 7.0, "profile_measured_seconds": 9.0}]
    for change in bias:
        last = found[-1]
        found.append(
            {
                "at_s": last["at_s"] + each_s,
                "profile_predicted_seconds": last["profile_predicted_seconds"] + 1 + change,
                "profile_measured_seconds": last["profile_measured_seconds"] + 1,
                "profile_error_p50": abs(change),
            }
        )
    return found


def test_the_error_is_the_median_of_relative_errors() -> None:
    rows = [{"predicted_ms": p, "measured_ms": 10.0} for p in (11.0, 8.0, 10.5, 90.0, 10.0)]
    assert profile_error_p50([*rows, {"kind": "else"}]) == pytest.approx(0.1)
    assert profile_error_p50([]) is None


def test_windows_compare_totals() -> None:
    found = windows(samples([0.1, 0.3, -0.2, -0.2]), 25.0)
    assert [w["bias"] for w in found] == pytest.approx([0.2, -0.2])
    assert [w["measured_s"] for w in found] == pytest.approx([2.0, 2.0])
    assert [w["error_p50"] for w in found] == pytest.approx([0.2, 0.2])
    assert (found[0]["from_s"], found[-1]["to_s"]) == (5.0, 45.0)


def test_idle_windows_and_samples_without_a_profile_are_left_out() -> None:
    idle = samples([0.1, 0.1])
    idle.append({**idle[-1], "at_s": 1000.0})
    idle.insert(1, {"at_s": 6.0})
    assert len(windows(idle, 10.0)) == 2
    assert windows([], 10.0) == []
    with pytest.raises(ValueError, match="more than 0"):
        windows(idle, 0.0)


def test_an_engine_that_starts_again_is_no_step_back() -> None:
    rows = samples([0.1, 0.1])
    rows.append(
        {"at_s": 35.0, "profile_predicted_seconds": 0.55, "profile_measured_seconds": 0.5, "profile_error_p50": 0.1}
    )
    assert [w["bias"] for w in windows(rows, 10.0)] == pytest.approx([0.1, 0.1, 0.1])


def test_drift_is_the_change_from_the_first_third_to_the_last() -> None:
    steady = drift(samples([0.05] * 9), 10.0)
    assert steady["profile_bias_drift"] == pytest.approx(0.0)
    grows = drift(samples([0.0, 0.0, 0.0, 0.1, 0.1, -0.4, 0.2, 0.2, 0.2]), 10.0)
    assert grows["profile_bias_drift"] == pytest.approx(0.2)
    assert grows["profile_bias_worst"] == pytest.approx(-0.4)
    assert drift(samples([0.1, 0.1]), 10.0) == {}
