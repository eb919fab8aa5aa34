"""Calibration must find the machine behind closed loops that were simulated on a known one."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tests.bench.simulation.test_against_real import AT, FRONT, PROFILE, TRUE, WIDTHS, fitted, levels, machine

from headrace.bench.simulation.calibrate import calibrated
from headrace.bench.simulation.hosted import Hosted, Line
from headrace.bench.simulation.machines import LinearMachine


def test_it_finds_what_a_server_adds() -> None:
    found = fitted().machine
    assert isinstance(found.profile, Hosted)
    assert found.front.values == pytest.approx(FRONT.values)
    assert found.profile.step.at == AT
    assert found.profile.step.values == pytest.approx(TRUE.step.values, rel=0.15, abs=0.1)
    assert found.profile.prompt(1) + 60 * found.profile.token_ms == pytest.approx(1.5 + 60 * 0.04, rel=0.2)
    assert found.stalls.ms == ()


def test_what_remains_is_told() -> None:
    fit = fitted()
    assert set(fit.tpot_error) == set(WIDTHS)
    assert all(abs(error) < 0.05 for error in fit.tpot_error.values())
    row = fit.row()
    assert row["kind"] == "calibration"
    assert row["sequences"] == list(AT)
    assert len(row["step_ms"]) == len(row["prompt_ms"]) == len(row["front_ms"]) == len(WIDTHS)


def test_a_profile_that_is_too_slow_is_corrected_too() -> None:
    slow = LinearMachine(step_ms=4.0, row_ms=0.05)
    found = calibrated(machine(slow, Line()), levels()).machine.profile
    assert isinstance(found, Hosted)
    assert found.step.values[0] == pytest.approx(TRUE.step.values[0] - 2.0, abs=0.15)


def test_closed_loops_that_nothing_came_of_are_left_out_or_refused() -> None:
    short = [replace(level, rows=[]) if level.concurrency == 4 else level for level in levels()]
    hosted = calibrated(machine(PROFILE), short, rounds=1).machine.profile
    assert isinstance(hosted, Hosted)
    assert hosted.step.at == (1.0, 16.0)
    with pytest.raises(ValueError, match="no closed loop finished enough requests"):
        calibrated(machine(PROFILE), [replace(level, rows=[]) for level in levels()])
