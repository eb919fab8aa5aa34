"""Fitting what a server adds to its engine's steps, to closed loops of different width measured on it.

A closed loop keeps a known number of requests open, so what its requests get says what a step costs with so many sequences. The
simulated engine runs the same closed loops; what its mean TPOT and TTFT lack, and what TTFT grows too little with the prompt, is
added to the steps, and again, until they agree. Open-loop runs, which simulations are held against, have no part in it.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from headrace.bench.openloop.sweep import WARM_SHARE, Level
from headrace.bench.simulation.hosted import Hosted, Line, stalls_of
from headrace.bench.simulation.machine import Machine

Rows = Sequence[Mapping[str, Any]]

ROUNDS = 10
"""Of the fit; each mends the better part of what is left."""

STEP = 0.7
"""Share of the error that a round mends, half of it in the later rounds: the curves at neighbouring widths lean on each other, and
each loop has a noise of its own."""

APART = 20
"""Prompt tokens by which two requests must differ to say what a prompt token costs."""

FEWEST = 5
"""Requests a closed loop must have finished to count."""


@dataclass(frozen=True, slots=True)
class Fit:
    """A machine with what the server adds, and what remains between its closed loops and the measured ones.

    Attributes:
        machine: the calibrated one.
        tpot_error, ttft_error: relative error of the means by concurrency.
    """

    machine: Machine
    tpot_error: dict[int, float]
    ttft_error: dict[int, float]

    def row(self) -> dict[str, Any]:
        """A row of kind ``calibration``."""
        hosted = self.machine.profile
        assert isinstance(hosted, Hosted)
        curves = {"step_ms": hosted.step, "prompt_ms": hosted.prompt, "front_ms": self.machine.front}
        return {
            "kind": "calibration",
            "sequences": list(hosted.step.at),
            **{name: [round(value, 4) for value in line.values] for name, line in curves.items()},
            "token_ms": round(hosted.token_ms, 5),
            "stalls_per_s": round(self.machine.stalls.per_s, 4),
            "stall_ms": [round(ms, 2) for ms in self.machine.stalls.ms],
            "tpot_error": {str(width): round(error, 4) for width, error in self.tpot_error.items()},
            "ttft_error": {str(width): round(error, 4) for width, error in self.ttft_error.items()},
        }


def calibrated(machine: Machine, levels: Sequence[Level], *, rounds: int = ROUNDS) -> Fit:
    """The machine with what makes its closed loops those of the real server.

    Stalls are taken from the tokens of requests that were alone, the time between client and engine is the median at each width.

    Raises:
        ValueError: no level has enough finished requests.
    """
    widths = _by_width(levels)
    if not widths:
        raise ValueError("calibration: no closed loop finished enough requests")
    at = tuple(float(width) for width in widths)
    front = Line(at, tuple(_front(of) for of in widths.values()))
    alone = [gaps for level in levels if level.concurrency == 1 for gaps in level.gaps_ms]
    machine = replace(machine, front=front, stalls=stalls_of(alone))
    wanted = {width: _means(_counted(of)) for width, of in widths.items()}
    steepness, token = _slope([_counted(of) for of in widths.values()]), 0.0
    step, prompt = [0.0] * len(at), [0.0] * len(at)
    fitted, errors = machine, dict.fromkeys(widths, (0.0, 0.0))
    for turn in range(rounds):
        gain = STEP if 2 * turn < rounds else STEP / 2
        hosted = Hosted(machine.profile, Line(at, tuple(step)), Line(at, tuple(prompt)), token)
        fitted = replace(machine, profile=hosted)
        ran = [
            [row for level in of for row in _warm(simulated(fitted, level), level.seconds)] for of in widths.values()
        ]
        for place, (width, rows) in enumerate(zip(widths, ran, strict=True)):
            tpot, ttft = (theirs - ours for theirs, ours in zip(wanted[width], _means(rows), strict=True))
            errors[width] = (tpot / wanted[width][0], ttft / wanted[width][1])
            step[place] += gain * tpot
            prompt[place] += gain * ttft
        token += gain * (steepness - _slope(ran))
    return Fit(fitted, *({width: -error[which] for width, error in errors.items()} for which in (0, 1)))


def simulated(machine: Machine, level: Level) -> list[dict[str, Any]]:
    """Rows of a closed loop of the simulated engine over the same shots."""
    return machine.closed(level.shots, concurrency=level.concurrency, seconds=level.seconds)


def _by_width(levels: Sequence[Level]) -> dict[int, list[Level]]:
    """Levels by concurrency, ascending, those without enough requests left out."""
    found: dict[int, list[Level]] = {}
    for level in sorted(levels, key=lambda each: each.concurrency):
        found.setdefault(level.concurrency, []).append(level)
    return {width: of for width, of in found.items() if len(_counted(of)) >= FEWEST}


def _counted(levels: Sequence[Level]) -> list[Mapping[str, Any]]:
    return [row for level in levels for row in _warm(level.rows, level.seconds)]


def _warm(rows: Rows, seconds: float) -> list[Mapping[str, Any]]:
    """Finished requests that were sent once the loop had settled."""
    settled = WARM_SHARE * seconds
    return [row for row in rows if row["finished"] and row["arrival_s"] >= settled and row["tpot_ms"] is not None]


def _means(rows: Rows) -> tuple[float, float]:
    """TPOT and TTFT; of a simulation in which nothing finished, far too long.

    Means and not medians: under load it is the time that all requests take together, long ones included, that queues are made of.
    """
    if not rows:
        return 1e4, 1e4
    return statistics.fmean(r["tpot_ms"] for r in rows), statistics.fmean(r["ttft_ms"] for r in rows)


def _slope(groups: Sequence[Rows]) -> float:
    """Milliseconds of TTFT for each prompt token: the median over pairs of requests of the same width (Theil and Sen)."""
    slopes = [
        (a["ttft_ms"] - b["ttft_ms"]) / (a["prompt_tokens"] - b["prompt_tokens"])
        for rows in groups
        for a, b in itertools.combinations(rows, 2)
        if abs(a["prompt_tokens"] - b["prompt_tokens"]) >= APART
    ]
    return statistics.median(slopes) if slopes else 0.0


def _front(levels: Sequence[Level]) -> float:
    known = [r for r in _counted(levels) if r.get("engine_ttft_ms") is not None]
    return statistics.median(r["ttft_ms"] - r["engine_ttft_ms"] for r in known) if known else 0.0
