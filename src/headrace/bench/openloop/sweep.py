"""From idle to saturation: lone requests, the most a server can do, and then the same pieces of a workload at fractions of that.

Rows: ``lone`` and ``saturation`` (one each per measurement), ``request`` (one per request), ``run`` (one per replay: rates,
scales, and whether the client was punctual) and ``skipped`` (what was left out, and why).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from headrace.bench import metrics
from headrace.bench.neighbours import Neighbours
from headrace.bench.openloop.loads import Load, Lone, Model, with_classes
from headrace.bench.openloop.shots import Replayed, Shot
from headrace.bench.openloop.systems import HTTPSystem, System
from headrace.bench.workloads.arrivals import Arrival
from headrace.core.errors import HeadraceError

Report = Callable[[str], None]
Rows = Sequence[Mapping[str, Any]]

WARM_SHARE = 0.25
"""Share of a closed-loop run that is left out of its rate: everybody's prompts come at once there."""

MOST_RATE = 250
"""Requests a second that a closed-loop run holds ready."""

HOPELESS = 0.5
"""A system that finishes a smaller share of the requests at one rate is not asked at higher ones."""


@dataclass(frozen=True, slots=True)
class Pace:
    """How long and how often to measure.

    Attributes:
        fractions: of the saturation rate.
        seeds: pieces of the workload per rate.
        seconds: length of a piece.
        grace_s: how long open requests may go on after its last arrival.
        saturate_s: length of the closed-loop run that finds saturation.
        concurrency: requests open in it.
        lone: requests sent one after another.
        widths: of the closed loops that are measured between pieces, one after the other in turn.
        width_s: length of each of these.
        budget_s: seconds of a sweep after which no further round of pieces begins.
    """

    fractions: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 0.9, 1.1)
    seeds: tuple[int, ...] = (0, 1, 2)
    seconds: float = 6.0
    grace_s: float = 3.0
    saturate_s: float = 8.0
    concurrency: int = 32
    lone: int = 12
    widths: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    width_s: float = 3.0
    budget_s: float = float("inf")


@dataclass(frozen=True, slots=True)
class Case:
    """One piece of a workload at one rate: what was sent, so that a simulation can send the same."""

    load: Load
    fraction: float
    rate: float
    seed: int
    shots: Sequence[Shot]
    cutoff_s: float

    @property
    def labels(self) -> dict[str, Any]:
        """What its rows carry."""
        return {"load": self.load.name, "fraction": self.fraction, "seed": self.seed}


@dataclass(frozen=True, slots=True)
class Level:
    """A closed loop on a server: what a simulation of it is calibrated with.

    Attributes:
        concurrency: requests open at any time.
        seconds: how long.
        shots: what was sent, in order.
        rows: of the requests, as :func:`headrace.bench.openloop.shots.row_of` makes them.
        gaps_ms: between the tokens of each, where they were kept.
    """

    concurrency: int
    seconds: float
    shots: Sequence[Shot]
    rows: Sequence[Mapping[str, Any]]
    gaps_ms: Sequence[Sequence[float]] = ()


@dataclass(slots=True)
class Sweep:
    """Measurements on systems, with everything written to ``rows`` as soon as it is known.

    Attributes:
        model: what shots depend on.
        pace: how long and how often.
        seed: of pieces, classes and tokens.
        rows: where rows go.
        cases: what was replayed on the first system, for simulation.
        levels: closed loops on it, taken between the pieces so that both saw the same moods of the machine.
    """

    model: Model
    pace: Pace
    seed: int
    rows: list[dict[str, Any]]
    report: Report = lambda line: None
    cases: list[Case] = field(default_factory=list)
    levels: list[Level] = field(default_factory=list)
    _turns: int = 0
    _drawn: int = 0

    def lone(self, system: HTTPSystem, load: Load) -> Lone:
        """What a request gets alone; a first round warms the server up and is not counted."""
        self.report(f"{load.name}: one request at a time")
        usual = sorted(load.arrivals, key=lambda a: a.prompt_tokens)[len(load.arrivals) // 2]
        arrival = Arrival(0.0, usual.prompt_tokens, max(usual.output_tokens, 8))
        system.replay(self._shots([arrival] * 4), cutoff_s=60.0, concurrency=1)
        replayed = system.replay(self._shots([arrival] * self.pace.lone), cutoff_s=60.0, concurrency=1)
        done = [r for r in replayed.rows if r["finished"] and r["tpot_ms"] is not None]
        if not done:
            raise LostSystem(system.name, replayed)
        row = lone_row(system.name, load.name, done)
        self.rows.append(row)
        return Lone(row["ttft_ms"], row["tpot_ms"], row["front_ms"])

    def saturation(self, system: HTTPSystem, load: Load) -> float:
        """Requests a second of ``load`` that the system answers when it always has ``concurrency`` open."""
        self.report(f"{load.name}: {self.pace.concurrency} requests open at any time")
        seconds = self.pace.saturate_s
        arrivals = [load.arrivals[i % len(load.arrivals)] for i in range(max(400, int(MOST_RATE * seconds)))]
        warm = self._shots(arrivals[: self.pace.concurrency])
        system.replay(warm, cutoff_s=30.0, concurrency=self.pace.concurrency)
        shots = self._shots(arrivals)
        replayed = system.replay(shots, cutoff_s=seconds, concurrency=self.pace.concurrency)
        rate = steady_rate(replayed.rows, seconds)
        if not rate:
            raise LostSystem(system.name, replayed)
        mean = statistics.fmean(s.new for s in shots[: len(replayed.rows)])
        self.rows.append(
            {"kind": "saturation", "system": system.name, "load": load.name, "concurrency": self.pace.concurrency,
             "tokens_per_s": round(rate, 3), "requests_per_s": round(rate / mean, 4), "seconds": seconds,
             **self._scales(load)}
        )  # fmt: skip
        return rate / mean

    def level(self, system: HTTPSystem, load: Load) -> None:
        """The next closed loop of :attr:`Pace.widths`; its requests become rows of kind ``level``."""
        width, seconds = self.pace.widths[len(self.levels) % len(self.pace.widths)], self.pace.width_s
        self.report(f"{load.name}: {width} requests open at any time, to calibrate the simulation")
        count = min(len(load.arrivals), max(60, int(MOST_RATE * seconds)))
        first = len(self.levels) * count
        shots = self._shots([load.arrivals[(first + i) % len(load.arrivals)] for i in range(count)])
        replayed = system.replay(shots, cutoff_s=seconds, concurrency=width, gaps=width == 1)
        self.levels.append(Level(width, seconds, shots, replayed.rows, list(replayed.gaps_ms.values())))
        labels = {"kind": "level", "system": system.name, "load": load.name, "concurrency": width}
        self.rows.extend({**labels, "turn": len(self.levels), **row} for row in replayed.rows)

    def run(
        self,
        systems: Sequence[System],
        load: Load,
        saturation: float,
        lone: Lone,
        *,
        between: Callable[[], None] = lambda: None,
    ) -> None:
        """Replay pieces of ``load`` at every fraction of ``saturation``, the systems in turn on each; the first one's are kept.

        Each round goes through all fractions, so that a change of the machine's speed falls on all alike. ``between`` is called
        before each piece, with the first system running and all others stopped.
        """
        most = {system.name: float("inf") for system in systems}  # the fraction above which it is not asked
        begun = time.monotonic()
        for number in self.pace.seeds:
            if time.monotonic() > begun + self.pace.budget_s and number != self.pace.seeds[0]:
                self.skip(systems[0], load, f"no time left for piece {number + 1} of each rate")
                break
            for fraction in self.pace.fractions:
                self._only(systems[0], systems)
                between()
                case = self._case(load, fraction, saturation, lone, number)
                for system in _rotated(systems, self._turns + number):
                    if fraction > most[system.name]:
                        continue
                    self.report(f"{load.name} at {fraction:g} of saturation, piece {number + 1}: {system.name}")
                    try:
                        self._replay(system, systems, case)
                    except HeadraceError as error:
                        self.skip(system, load, f"lost: {error.message}")
                        most[system.name] = -1.0
                    if system is systems[0]:
                        self.cases.append(case)
                    elif most[system.name] > fraction and self._hopeless(system, load, fraction):
                        most[system.name] = fraction
                self._turns += 1

    def _replay(self, system: System, systems: Sequence[System], case: Case) -> None:
        self._only(system, systems)
        neighbours = Neighbours()
        replayed = system.replay(case.shots, cutoff_s=case.cutoff_s)
        elsewhere = round(neighbours.cores(), 3)
        where = {"system": system.name, **case.labels}
        self.rows.extend({"kind": "request", **where, **row} for row in replayed.rows)
        self.rows.append(
            {"kind": "run", **where, "rate": round(case.rate, 4), "requests": len(replayed.rows),
             "cutoff_s": case.cutoff_s, "elsewhere_cores": elsewhere, **self._scales(case.load), **_rounded(replayed.client)}
        )  # fmt: skip
        if replayed.rows and all(_unreachable(r) for r in replayed.rows):
            raise LostSystem(system.name, replayed)

    @staticmethod
    def _only(system: System, systems: Sequence[System]) -> None:
        """Let ``system`` run alone."""
        for other in systems:
            if other is not system:
                other.process.pause()
        system.process.resume()

    def _hopeless(self, system: System, load: Load, fraction: float) -> bool:
        mine = [r for r in _requests(self.rows, system.name, load.name) if r["fraction"] == fraction]
        share = sum(r["finished"] for r in mine) / len(mine) if mine else 1.0
        if share < HOPELESS:
            why = (
                f"only {share:.0%} of the requests at {fraction:g} came to their end in time; higher rates are left out"
            )
            self.rows.append({"kind": "skipped", "system": system.name, "load": load.name, "reason": why})
        return share < HOPELESS

    def skip(self, system: System, load: Load, reason: str) -> None:
        """Say in a row that ``system`` takes no (further) part in ``load``, and why."""
        self.report(f"{system.name} {reason}")
        self.rows.append({"kind": "skipped", "system": system.name, "load": load.name, "reason": reason})

    def _case(self, load: Load, fraction: float, saturation: float, lone: Lone, number: int) -> Case:
        rate = fraction * saturation
        seed = self.seed * 1000 + number
        arrivals = with_classes(load.piece(rate, self.pace.seconds, seed=seed), lone, seed=seed)
        cutoff = round(arrivals[-1].time_s + self.pace.grace_s, 3)
        return Case(load, fraction, rate, number, self._shots(arrivals), cutoff)

    def _shots(self, arrivals: Sequence[Arrival]) -> list[Shot]:
        self._drawn += 1
        return self.model.shots(arrivals, seed=self.seed * 100_000 + self._drawn)

    def _scales(self, load: Load) -> dict[str, float]:
        scales = {"prompt_scale": load.prompt_scale, "output_scale": load.output_scale, "context": self.model.context}
        return {name: round(value, 4) for name, value in scales.items()}


class LostSystem(HeadraceError):
    """A system answered nothing at all."""

    def __init__(self, name: str, replayed: Replayed) -> None:
        errors = [r.get("error") for r in replayed.rows if r.get("error")]
        super().__init__(f"{name} answered no request: {errors[0] if errors else 'no error was told'}")


def lone_row(system: str, load: str, done: Rows) -> dict[str, Any]:
    """Medians over requests that were alone."""
    front = [r["ttft_ms"] - r["engine_ttft_ms"] for r in done if r.get("engine_ttft_ms") is not None]
    return {
        "kind": "lone",
        "system": system,
        "load": load,
        "ttft_ms": statistics.median(r["ttft_ms"] for r in done),
        "tpot_ms": statistics.median(r["tpot_ms"] for r in done),
        "front_ms": round(statistics.median(front), 3) if front else 0.0,
        "prompt_tokens": done[0]["prompt_tokens"],
        "output_tokens": done[0]["output_tokens"],
        "requests": len(done),
    }


def steady_rate(rows: Rows, seconds: float) -> float:
    """Tokens a second of a closed-loop run after its first :data:`WARM_SHARE`.

    Every request's tokens are taken as spread evenly from its first to its last. A run that ended before its time, because
    nothing was left to send, counts until its end.
    """
    if rows and all(r["finished"] for r in rows):
        seconds = min(seconds, max(r["end_s"] for r in rows))
    low = WARM_SHARE * seconds
    total = 0.0
    for r in rows:
        if r["ttft_ms"] is None:
            continue
        first, last = r["arrival_s"] + r["ttft_ms"] / 1e3, r["end_s"]
        inside = min(last, seconds) - max(first, low)
        if last <= first:
            total += r["decoded"] if low <= first <= seconds else 0
        elif inside > 0:
            total += r["decoded"] * inside / (last - first)
    return total / (seconds - low) if seconds > low else 0.0


def by_point(rows: Rows) -> dict[tuple[str, str, float], list[Mapping[str, Any]]]:
    """Request rows by (load, system, fraction), pieces of one rate together, in the order measured."""
    found: dict[tuple[str, str, float], list[Mapping[str, Any]]] = {}
    for row in rows:
        if row["kind"] == "request":
            found.setdefault((row["load"], row["system"], row["fraction"]), []).append(row)
    return found


def pieces(rows: Rows) -> dict[int, list[Mapping[str, Any]]]:
    """Rows of one point by piece; rates hold within a piece only, for every piece starts its clock anew."""
    found: dict[int, list[Mapping[str, Any]]] = {}
    for row in rows:
        found.setdefault(row["seed"], []).append(row)
    return found


def figures(rows: Rows) -> dict[str, float]:
    """A point's figures: percentiles and attainment over all its requests, rates as medians over its pieces."""
    found = metrics.summary(rows)
    for name, rate in (("goodput_tok_s", metrics.goodput), ("throughput_tok_s", metrics.throughput)):
        found[name] = statistics.median(rate(piece) for piece in pieces(rows).values())
    return found


def _requests(rows: Rows, system: str, load: str) -> Iterator[Mapping[str, Any]]:
    return (r for r in rows if r["kind"] == "request" and r["system"] == system and r["load"] == load)


def _unreachable(row: Mapping[str, Any]) -> bool:
    return row["decoded"] == 0 and row["error"] not in (None, "cut off") and not str(row["error"]).startswith("HTTP ")


def _rotated(systems: Sequence[System], turn: int) -> list[System]:
    """Another one begins every time, so that nobody always comes after the same one."""
    if not systems:
        return []
    turn %= len(systems)
    return [*systems[turn:], *systems[:turn]]


def _rounded(values: Mapping[str, Any]) -> dict[str, Any]:
    return {k: round(v, 4) if isinstance(v, float) else v for k, v in values.items()}
