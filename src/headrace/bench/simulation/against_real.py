"""Simulated against real: the same requests through the simulated engine, and how far its latencies and attainment are off.

The simulated engine spends what a measured profile says a step costs. What a real step costs besides (pipes, the HTTP process on
the same cores) is a straight line in the running sequences and a constant for steps with prompts, fitted to two calibration runs
of the same server, lone requests and a saturated closed loop; no open-loop run that is compared has any part in it. Every case
is also simulated without them.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from headrace.bench import metrics
from headrace.bench.openloop.shots import Shot
from headrace.bench.openloop.sweep import Case, steady_rate
from headrace.bench.simulation.prediction import profile_error_p50
from headrace.bench.simulation.replay import START, Replay
from headrace.core.batch import StepShape
from headrace.core.clock import VirtualClock
from headrace.core.policy import Limits
from headrace.core.protocols import Profile
from headrace.core.request import Request, SamplingParams
from headrace.engine.policies import get_policy
from headrace.engine.simulated import SimulatedEngine

Rows = Sequence[Mapping[str, Any]]

LEAST_SHARE = 0.2
"""A step never costs less than this share of the profile, whatever was fitted."""

ROUNDS = 4
HALVINGS = 12


@dataclass(frozen=True, slots=True)
class Hosted:
    """A profile with what a server adds: ``fixed_ms`` to each step, ``sequence_ms`` for every running sequence, ``prompt_ms`` to
    steps that take in prompts (a request's first way through the processes)."""

    base: Profile
    fixed_ms: float = 0.0
    sequence_ms: float = 0.0
    prompt_ms: float = 0.0

    def cost(self, shape: StepShape) -> float:
        """Milliseconds of a step of ``shape``."""
        alone = self.base.cost(shape)
        added = self.fixed_ms + self.sequence_ms * shape.sequences + (self.prompt_ms if shape.prefill_tokens else 0.0)
        return max(LEAST_SHARE * alone, alone + added)


@dataclass(frozen=True, slots=True)
class Machine:
    """The simulated counterpart of a server: its engine's configuration and the time outside the engine.

    Attributes:
        profile: what steps cost.
        policy: a registered name.
        limits, slots, context, prefix_cache: as the real engine has them.
        front_ms: between client and engine, added to every TTFT.
    """

    profile: Profile
    policy: str
    limits: Limits
    slots: int
    context: int
    prefix_cache: bool = True
    front_ms: float = 0.0

    def replay(self, shots: Sequence[Shot], sent_s: Sequence[float], cutoff_s: float) -> list[dict[str, Any]]:
        """Rows of ``shots`` sent at ``sent_s`` seconds, open ones cut at ``cutoff_s``; the order is that of their ends."""
        clock = VirtualClock(START)
        engine = SimulatedEngine(
            self.profile, get_policy(self.policy), clock, limits=self.limits, slots=self.slots, context=self.context,
            prefix_cache=self.prefix_cache,
        )  # fmt: skip
        front = self.front_ms * 1e-3
        coming = [_request(shot, START + at + front) for shot, at in zip(shots, sent_s, strict=True)]
        horizon = START + cutoff_s
        rows = []
        for row in Replay(engine, clock, clock.advance, coming, horizon_s=horizon).run():
            ttft = None if row["ttft_ms"] is None else row["ttft_ms"] + self.front_ms
            rows.append(
                {**row, "arrival_s": row["arrival_s"] - front - START, "end_s": row["end_s"] - START, "ttft_ms": ttft}
            )
        return rows


def _request(shot: Shot, arrival: float) -> Request:
    params = SamplingParams(temperature=0.0, max_tokens=shot.new, ignore_eos=True, seed=int(shot.id))
    a = shot.arrival
    return Request(
        shot.id,
        shot.prompt,
        params,
        priority=a.priority,
        slo=a.slo,
        tier=a.category or None,
        arrival=arrival,
        owner=a.owner,
    )


@dataclass(frozen=True, slots=True)
class Calibration:
    """What two runs of the real server gave.

    Attributes:
        lone_ttft_ms, lone_prompt: TTFT of requests that were alone, as the client sees it, and their prompts' tokens.
        lone_tpot_ms, lone_context: their TPOT, and the tokens they held half-way.
        shots, seconds, tokens_per_s, concurrency: of the saturated closed loop.
    """

    lone_ttft_ms: float
    lone_prompt: int
    lone_tpot_ms: float
    lone_context: int
    shots: Sequence[Shot]
    seconds: float
    tokens_per_s: float
    concurrency: int


def calibrated(machine: Machine, seen: Calibration) -> Hosted:
    """The machine's profile with what makes its lone TTFT and TPOT and its saturated throughput those of the real server."""
    alone = machine.profile.cost(StepShape(0, 1, seen.lone_context, 1, seen.lone_context + 1))
    extra_alone = seen.lone_tpot_ms - alone
    prompt = machine.profile.cost(StepShape(seen.lone_prompt, 0, 0, 1, seen.lone_prompt**2))
    extra_prompt = max(0.0, seen.lone_ttft_ms - machine.front_ms - prompt - extra_alone)

    def line(extra_full: float) -> Hosted:
        slope = (extra_full - extra_alone) / max(seen.concurrency - 1, 1)
        return Hosted(machine.profile, extra_alone - slope, slope, extra_prompt)

    full = machine.profile.cost(StepShape(0, seen.concurrency, 0, seen.concurrency, seen.concurrency))
    low, high = -full, full + 4 * abs(extra_alone)
    for _ in range(ROUNDS):
        if saturated_rate(replace(machine, profile=line(high)), seen) < seen.tokens_per_s:
            break
        high *= 2
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        if saturated_rate(replace(machine, profile=line(middle)), seen) > seen.tokens_per_s:
            low = middle
        else:
            high = middle
    return line((low + high) / 2)


def saturated_rate(machine: Machine, seen: Calibration) -> float:
    """Tokens a second of the closed loop when simulated: everybody waits from the start and ``concurrency`` run at a time."""
    limits = replace(machine.limits, max_sequences=min(seen.concurrency, machine.limits.max_sequences))
    rows = replace(machine, limits=limits).replay(seen.shots, [0.0] * len(seen.shots), seen.seconds)
    return steady_rate(rows, seen.seconds)


def simulate_case(machine: Machine, case: Case, real: Rows, *, calibrated: bool) -> list[dict[str, Any]]:
    """Rows of kind ``simulated`` for a case whose real rows are given; requests leave when the real ones left."""
    sent = {r["id"]: r["arrival_s"] for r in real}
    shots = sorted(case.shots, key=lambda shot: sent[shot.id])
    rows = machine.replay(shots, [sent[s.id] for s in shots], case.cutoff_s)
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
