"""Simulated against real, where the real side is a simulation of a known machine."""

from __future__ import annotations

import functools
from typing import Any

import pytest

from headrace.bench.openloop.loads import Lone, Model, drawn_load, with_classes
from headrace.bench.openloop.sweep import Case, Level
from headrace.bench.simulation import against_real as simreal
from headrace.bench.simulation.calibrate import Fit, calibrated
from headrace.bench.simulation.hosted import Hosted, Line
from headrace.bench.simulation.machine import Machine
from headrace.bench.simulation.machines import LinearMachine
from headrace.core.policy import Limits

PROFILE = LinearMachine(step_ms=2.0, row_ms=0.05)
WIDTHS = (1, 4, 16)
AT = tuple(float(width) for width in WIDTHS)
TRUE = Hosted(PROFILE, Line(AT, (0.8, 1.2, 3.0)), Line(AT, (1.5, 2.5, 2.5)), token_ms=0.04)
FRONT = Line(AT, (1.0, 2.0, 4.0))
LOAD = drawn_load(128, seed=0)
MODEL = Model(1000, 128)


def machine(profile: Any, front: Line = FRONT) -> Machine:
    return Machine(profile, "chunked", Limits(), 1 << 16, 2048, front=front)


@functools.cache
def levels() -> tuple[Level, ...]:
    made = []
    for width in WIDTHS:
        shots = MODEL.shots(LOAD.piece(1.0, 400.0, seed=width), seed=width)
        rows = machine(TRUE).closed(shots, concurrency=width, seconds=4.0)
        rows = [{**row, "engine_ttft_ms": row["ttft_ms"] - FRONT(width)} for row in rows]
        made.append(Level(width, 4.0, shots, rows))
    return tuple(made)


@functools.cache
def fitted() -> Fit:
    return calibrated(machine(PROFILE, Line()), levels())


def case(rate: float, *, seed: int = 5) -> Case:
    arrivals = with_classes(LOAD.piece(rate, 4.0, seed=seed), Lone(4.0, 2.0), seed=seed)
    return Case(LOAD, 0.5, rate, 0, MODEL.shots(arrivals, seed=seed), arrivals[-1].time_s + 2.0)


def real_rows(case: Case) -> list[dict[str, Any]]:
    rows = machine(TRUE).replay(case.shots, [s.at_s for s in case.shots], case.cutoff_s)
    return [{"kind": "request", "system": "headrace", **case.labels, **row, "error": None} for row in rows]


def test_calibrated_simulation_is_near_the_real_run_and_uncalibrated_is_not() -> None:
    one = case(45.0)
    real = real_rows(one)
    rows: list[dict[str, Any]] = list(real)
    for flag, used in ((True, fitted().machine), (False, machine(PROFILE))):
        rows += simreal.simulate_case(used, one, real, calibrated=flag)
    good, bad = simreal.compare(rows)[0], simreal.compare(rows, calibrated=False)[0]
    assert good["error_points"] <= 3.0
    assert good["tpot_ms_p50_error"] < 0.05
    assert bad["tpot_ms_p50_error"] > 0.2
    assert bad["error_points"] > good["error_points"] + 5.0
    claims = simreal.claims(rows)
    assert claims["sim_vs_real_attainment_error_points"] == round(good["error_points"], 4)
    assert claims["sim_vs_real_attainment_error_points_uncalibrated"] == round(bad["error_points"], 4)


def test_requests_leave_when_the_real_ones_left_whatever_their_order() -> None:
    one = case(20.0)
    real = real_rows(one)
    late = [{**r, "arrival_s": r["arrival_s"] + (1.0 if r["id"] == "0" else 0.0)} for r in reversed(real)]
    rows = simreal.simulate_case(machine(TRUE), one, late, calibrated=True)
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
