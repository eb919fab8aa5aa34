"""Simulated against real: the same requests through the simulated engine, and how far its latencies and attainment are off.

The simulated engine spends what a measured profile says a step costs, and what a server adds to it
(:mod:`headrace.bench.simulation.calibrate`): that is fitted to closed loops of the same server, and no open-loop run that is
compared has any part in it. Every case is also simulated without.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from headrace.bench import metrics
from headrace.bench.openloop.sweep import Case
from headrace.bench.simulation.machine import Machine
from headrace.bench.simulation.prediction import profile_error_p50

Rows = Sequence[Mapping[str, Any]]


def simulate_case(machine: Machine, case: Case, real: Rows, *, calibrated: bool) -> list[dict[str, Any]]:
    """Rows of kind ``simulated`` for a case whose real rows are given; requests leave when the real ones left."""
    sent = {r["id"]: r["arrival_s"] for r in real}
    shots = sorted(case.shots, key=lambda shot: sent[shot.id])
    rows = replace(machine, seed=case.seed).replay(shots, [sent[s.id] for s in shots], case.cutoff_s)
    return [{"kind": "simulated", "calibrated": calibrated, **case.labels, **_rounded(row)} for row in rows]


def compare(rows: Rows, *, calibrated: bool = True) -> list[dict[str, Any]]:
    """One comparison per (load, fraction), pieces together: attainment of both, and relative errors of the medians and tails.

    Keys: ``load``, ``fraction``, ``requests``, ``real`` and ``simulated`` attainment, ``error_points``, and
    ``ttft_ms_p50_error`` and the like, relative (absent where either has none).
    """
    simulated: dict[tuple[str, float], list[Mapping[str, Any]]] = {}
    for r in rows:
        if r["kind"] == "simulated" and r["calibrated"] == calibrated:
            simulated.setdefault((r["load"], r["fraction"]), []).append(r)
    found = []
    for (load, fraction), mine in simulated.items():
        real = [
            r
            for r in rows
            if r["kind"] == "request" and (r["system"], r["load"], r["fraction"]) == ("headrace", load, fraction)
        ]
        there, here = metrics.summary(real), metrics.summary(mine)
        point: dict[str, Any] = {
            "load": load,
            "fraction": fraction,
            "requests": len(real),
            "real": there["attainment"],
            "simulated": here["attainment"],
            "error_points": abs(there["attainment"] - here["attainment"]) * 100,
        }
        for name in ("ttft_ms_p50", "ttft_ms_p90", "tpot_ms_p50", "tpot_ms_p90"):
            error = abs(here[name] - there[name]) / there[name] if there[name] else float("nan")
            if error == error:
                point[f"{name}_error"] = error
        found.append(point)
    return found


def claims(rows: Rows) -> dict[str, float]:
    """Errors of simulation (mean over cases, and the worst), error of the profile, and the pace of simulation, where rows say."""
    found: dict[str, float] = {}
    for flag, suffix in ((True, ""), (False, "_uncalibrated")):
        points = compare(rows, calibrated=flag)
        if points:
            errors = [p["error_points"] for p in points]
            found[f"sim_vs_real_attainment_error_points{suffix}"] = statistics.fmean(errors)
            found[f"sim_vs_real_attainment_error_points_worst{suffix}"] = max(errors)
        for name in ("ttft_ms_p50", "tpot_ms_p50"):
            mine = [p[f"{name}_error"] for p in points if f"{name}_error" in p]
            if mine:
                found[f"sim_vs_real_{name}_error{suffix}"] = statistics.median(mine)
    error = profile_error_p50([r for r in rows if r["kind"] == "profile"])
    if error is not None:
        found["profile_error_p50"] = error
    runs = [r for r in rows if r["kind"] == "simulation"]
    if runs:
        found["sim_hours_per_minute"] = sum(r["virtual_s"] for r in runs) / 60 / sum(r["wall_s"] for r in runs)
    return {name: round(value, 4) for name, value in found.items()}


def _rounded(row: Mapping[str, Any]) -> dict[str, Any]:
    return {k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}
