"""``headrace bench simulate``: policies against each other on a trace, on simulated hardware, at several loads.

Everything but the model is real: engine, policies, slots, prefix cache. What a step costs comes from a profile.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from headrace.bench import metrics
from headrace.bench.results import Result, new_result
from headrace.bench.results import Rows as ResultRows
from headrace.bench.simulation.replay import START, Replay
from headrace.bench.workloads.arrivals import Arrival, requests, rescaled, within_context
from headrace.compose import get_policy
from headrace.core.clock import VirtualClock
from headrace.core.errors import InvalidRequest
from headrace.core.policy import Limits
from headrace.core.protocols import Profile
from headrace.engine.simulation.runner import VOCAB, SimulatedEngine

SHOWN = ("attainment", "goodput_tok_s", "throughput_tok_s", "ttft_ms_p50", "ttft_ms_p99", "tpot_ms_p50", "tpot_ms_p99")


@dataclass(frozen=True, slots=True)
class Simulation:
    """What to compare.

    Attributes:
        policies: names.
        rates: requests a second, the trace stretched or squeezed to each; empty keeps the trace's own pace.
        limits: bounds of a step.
        slots: tokens whose K and V fit the simulated memory.
        context: longest prompt plus output; longer requests are cut.
        prefix_cache: share the K and V of equal prefixes.
        seed: of the tokens.
        by_hour: keep figures of each hour's requests instead of a row for each request.
    """

    policies: tuple[str, ...] = ("chunked", "prefill-first")
    rates: tuple[float, ...] = ()
    limits: Limits = field(default_factory=Limits)
    slots: int = 1 << 18
    context: int = 1 << 14
    prefix_cache: bool = False
    seed: int = 0
    by_hour: bool = False

    def __post_init__(self) -> None:
        for name in self.policies:
            get_policy(name)
        if any(not rate > 0 for rate in self.rates):
            raise InvalidRequest(f"rates are {self.rates}: give requests per second above 0", field="rate")
        if self.slots < 2 or self.context < 2:
            raise InvalidRequest("slots and context must be at least 2", field="slots")


def run(
    simulation: Simulation,
    arrivals: Sequence[Arrival],
    profile: Profile,
    *,
    report: Callable[[str], None] = lambda line: None,
) -> Result:
    """Replay ``arrivals`` under every policy at every rate.

    Rows: one of ``kind`` "request" per request (or "hour" per hour of arrivals), and one of "run" per replay.
    """
    load_before = os.getloadavg()
    cut = within_context(arrivals, min(simulation.context, simulation.slots))
    rows: list[dict[str, Any]] = []
    for rate in simulation.rates or (own_rate(cut),):
        paced = rescaled(cut, rate) if simulation.rates else rescaled(cut, own_rate(cut))
        for policy in simulation.policies:
            report(f"{policy} at {rate:.3g} requests/s")
            found = replay(simulation, paced, profile, policy, rate)
            rows += [*hours(found[:-1]), found[-1]] if simulation.by_hour else found
    return new_result("simulate", rows, claims, load_before)


def replay(
    simulation: Simulation, arrivals: Iterable[Arrival], profile: Profile, policy: str, rate: float
) -> list[dict[str, Any]]:
    """Rows of one replay, the last of them of ``kind`` "run"."""
    clock = VirtualClock(START)
    engine = SimulatedEngine(
        profile,
        get_policy(policy),
        clock,
        limits=simulation.limits,
        slots=simulation.slots,
        context=simulation.context,
        prefix_cache=simulation.prefix_cache,
    )
    coming = requests(arrivals, vocab_size=VOCAB, seed=simulation.seed, start=START)
    started = time.perf_counter()
    done = Replay(engine, clock, clock.advance, coming).run()
    wall = time.perf_counter() - started
    case = {"policy": policy, "rate": round(rate, 6)}
    of_run = {"kind": "run", **case, "virtual_s": clock.now() - START, "wall_s": wall, "steps": engine.stats().steps}
    return [*({"kind": "request", **case, **row} for row in done), of_run]


def hours(requests: ResultRows) -> list[dict[str, Any]]:
    """A row of kind "hour" per hour of arrivals: figures of its requests, and the case they belong to."""
    found: dict[int, list[Mapping[str, Any]]] = {}
    for row in requests:
        found.setdefault(int((row["arrival_s"] - START) // 3600), []).append(row)
    return [
        {"kind": "hour", "policy": mine[0]["policy"], "rate": mine[0]["rate"], "hour": hour,
         **{name: round(value, 4) for name, value in metrics.summary(mine).items() if value == value}}
        for hour, mine in sorted(found.items())
    ]  # fmt: skip


def own_rate(arrivals: Sequence[Arrival]) -> float:
    """Requests a second of a trace as recorded."""
    span = arrivals[-1].time_s - arrivals[0].time_s if arrivals else 0.0
    return (len(arrivals) - 1) / span if span > 0 else 1.0


def claims(rows: ResultRows) -> dict[str, float]:
    """Figures of every policy at every rate, and how many simulated hours a minute of wall time holds."""
    found: dict[str, float] = {}
    for (policy, rate), mine in cases(rows).items():
        figures = metrics.summary(mine)
        for name in SHOWN:
            if figures[name] == figures[name]:  # NaN where nothing finished
                found[f"{name}_{policy}_at_{rate:g}"] = round(figures[name], 4)
    found |= _of_hours([r for r in rows if r["kind"] == "hour"])
    runs = [r for r in rows if r["kind"] == "run"]
    wall = sum(r["wall_s"] for r in runs)
    found["sim_hours_per_minute"] = round(sum(r["virtual_s"] for r in runs) / 3600 / (wall / 60), 3) if wall else 0.0
    found["simulated_hours"] = round(sum(r["virtual_s"] for r in runs) / 3600, 3)
    found["simulation_minutes"] = round(wall / 60, 3)
    return found


def _of_hours(rows: ResultRows) -> dict[str, float]:
    """What can be said of a case of which only hours are known: counts, attainment, and the worst hour's tails."""
    found: dict[str, float] = {}
    for policy, rate in dict.fromkeys((r["policy"], r["rate"]) for r in rows):
        mine = [r for r in rows if (r["policy"], r["rate"]) == (policy, rate)]
        requests = sum(r["requests"] for r in mine)
        case = f"{policy}_at_{rate:g}"
        found[f"requests_{case}"] = requests
        found[f"finished_{case}"] = sum(r["finished"] for r in mine)
        found[f"attainment_{case}"] = round(sum(r["attainment"] * r["requests"] for r in mine) / requests, 4)
        for name in ("ttft_ms_p99", "tpot_ms_p99"):
            found[f"{name}_worst_hour_{case}"] = max(r[name] for r in mine if name in r)
    return found


def cases(rows: ResultRows) -> dict[tuple[str, float], list[Mapping[str, Any]]]:
    """Request rows by (policy, rate), in the order they ran."""
    found: dict[tuple[str, float], list[Mapping[str, Any]]] = {}
    for row in rows:
        if row["kind"] == "request":
            found.setdefault((row["policy"], row["rate"]), []).append(row)
    return found


def panels(rows: ResultRows) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """Curves over the rate, one per policy, for a plot."""
    names = {"attainment": "SLO attainment", "goodput_tok_s": "goodput, tok/s", "ttft_ms_p99": "TTFT p99, ms",
             "tpot_ms_p99": "TPOT p99, ms"}  # fmt: skip
    drawn: dict[str, dict[str, list[tuple[float, float]]]] = {title: {} for title in names.values()}
    for (policy, rate), mine in cases(rows).items():
        figures = metrics.summary(mine)
        for name, title in names.items():
            drawn[title].setdefault(policy, []).append((rate, figures[name]))
    return drawn
