"""Simulated against real: where the real side is a simulation of a known machine, calibration must find that machine."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import pytest

from headrace.bench.openloop.loads import Lone, Model, drawn_load, with_classes
from headrace.bench.openloop.sweep import Case
from headrace.bench.simulation import against_real as simreal
from headrace.bench.simulation.against_real import Calibration, Hosted, Machine
from headrace.bench.simulation.machines import LinearMachine
from headrace.core.batch import StepShape
from headrace.core.policy import Limits

PROFILE = LinearMachine(step_ms=2.0, row_ms=0.05)
TRUE = Hosted(PROFILE, fixed_ms=0.8, sequence_ms=0.1, prompt_ms=1.5)
LOAD = drawn_load(128, seed=0)
MODEL = Model(1000, 128)


def machine(profile: Any, front_ms: float = 0.0) -> Machine:
    return Machine(profile, "chunked", Limits(), 1 << 16, 2048, front_ms=front_ms)


@functools.cache
def calibration(profile: Any) -> Calibration:
    shots = MODEL.shots(LOAD.piece(1.0, 200.0, seed=1), seed=1)
    lone = profile.cost(StepShape(0, 1, 80, 1, 81))
    ttft = profile.cost(StepShape(60, 0, 0, 1, 3600))
    blank = Calibration(ttft, 60, lone, 80, shots, 1.5, 0.0, 8)
    return replace(blank, tokens_per_s=simreal.saturated_rate(machine(profile), blank))


def case(rate: float, *, seed: int = 5) -> Case:
    arrivals = with_classes(LOAD.piece(rate, 4.0, seed=seed), Lone(4.0, 2.0), seed=seed)
    return Case(LOAD, 0.5, rate, 0, MODEL.shots(arrivals, seed=seed), arrivals[-1].time_s + 2.0)


def real_rows(case: Case) -> list[dict[str, Any]]:
    rows = machine(TRUE, front_ms=1.0).replay(case.shots, [s.at_s for s in case.shots], case.cutoff_s)
    return [{"kind": "request", "system": "headrace", **case.labels, **row, "error": None} for row in rows]


def test_calibration_finds_what_a_server_adds() -> None:
    found = simreal.calibrated(machine(PROFILE), calibration(TRUE))
    assert found.fixed_ms + found.sequence_ms == pytest.approx(0.9, abs=1e-6)
    assert found.sequence_ms == pytest.approx(0.1, rel=0.1)
    assert found.prompt_ms == pytest.approx(1.5)


def test_a_server_that_adds_nothing_gets_nothing() -> None:
    found = simreal.calibrated(machine(PROFILE), calibration(PROFILE))
    assert (found.fixed_ms, found.sequence_ms) == (pytest.approx(0.0, abs=0.02), pytest.approx(0.0, abs=0.01))


def test_a_profile_that_is_too_slow_is_corrected_too() -> None:
    slow = LinearMachine(step_ms=4.0, row_ms=0.05)
    found = simreal.calibrated(machine(slow), calibration(PROFILE))
    assert found.fixed_ms + found.sequence_ms == pytest.approx(-2.0)
    assert found.cost(StepShape(0, 1, 0, 1, 1)) == pytest.approx(2.05)


def test_calibrated_simulation_is_near_the_real_run_and_uncalibrated_is_not() -> None:
    one = case(70.0)
    real = real_rows(one)
    hosted = simreal.calibrated(machine(PROFILE), calibration(TRUE))
    rows: list[dict[str, Any]] = list(real)
    for flag, profile in ((True, hosted), (False, PROFILE)):
        rows += simreal.simulate_case(machine(profile, front_ms=1.0), one, real, calibrated=flag)
    good, bad = simreal.compare(rows)[0], simreal.compare(rows, calibrated=False)[0]
    assert good["error_points"] <= 1.0
    assert good["tpot_ms_p50_error"] < 0.03
    assert bad["tpot_ms_p50_error"] > 0.1
    assert bad["error_points"] > good["error_points"]
    claims = simreal.claims(rows)
    assert claims["sim_vs_real_attainment_error_points"] == round(good["error_points"], 4)
    assert claims["sim_vs_real_attainment_error_points_uncalibrated"] == round(bad["error_points"], 4)


def test_requests_leave_when_the_real_ones_left_whatever_their_order() -> None:
    one = case(20.0)
    real = real_rows(one)
    late = [{**r, "arrival_s": r["arrival_s"] + (1.0 if r["id"] == "0" else 0.0)} for r in reversed(real)]
    rows = simreal.simulate_case(machine(TRUE, front_ms=1.0), one, late, calibrated=True)
    assert {r["id"]: r["arrival_s"] for r in rows} == pytest.approx({r["id"]: r["arrival_s"] for r in late}, abs=1e-3)


def request(kind: str, load: str, good: bool, **more: Any) -> dict[str, Any]:
    return {"kind": kind, "system": "headrace", "load": load, "fraction": 0.5, "finished": good, "ttft_ms": 10.0, "tpot_ms": 2.0,
            "e2e_ms": 20.0, "slo_ttft_ms": None, "slo_tpot_ms": None, "decoded": 3, "arrival_s": 0.0, "end_s": 1.0,
            "prompt_tokens": 4, "cached_tokens": 0, "preemptions": 0, **more}  # fmt: skip


def test_claims_by_hand() -> None:
    rows = [
        *(request("request", "a", i < 3) for i in range(4)),  # 75 %
        *(request("simulated", "a", i < 2, calibrated=True) for i in range(4)),  # 50 %
        *(request("request", "b", True) for _ in range(2)),
        *(request("simulated", "b", True, calibrated=True, tpot_ms=3.0) for _ in range(2)),
        {"kind": "profile", "measured_ms": 10.0, "predicted_ms": 11.0},
        {"kind": "profile", "measured_ms": 10.0, "predicted_ms": 8.0},
        {"kind": "profile", "measured_ms": 10.0, "predicted_ms": 10.5},
        {"kind": "simulation", "virtual_s": 7200.0, "wall_s": 30.0},
    ]
    assert simreal.claims(rows) == {
        "sim_vs_real_attainment_error_points": 12.5,
        "sim_vs_real_attainment_error_points_worst": 25.0,
        "sim_vs_real_ttft_ms_p50_error": 0.0,
        "sim_vs_real_tpot_ms_p50_error": 0.25,
        "profile_error_p50": 0.1,
        "sim_hours_per_minute": 4.0,
    }
    assert simreal.claims([]) == {}


def test_a_step_never_costs_nothing() -> None:
    assert Hosted(PROFILE, fixed_ms=-100.0).cost(StepShape(0, 1, 0, 1, 1)) == pytest.approx(0.2 * 2.05)
