"""``headrace bench adaserve``: policies that speculate against those that do not, on AdaServe's own workload, simulated.

Engine, policies, slots and verification are the real ones; what a step costs comes from the artifact's tables, what becomes of drafts
from a model fitted to the paper's mean accepted tokens, and policies see beliefs that are not the truth. Every cell (machine, rate,
tightness, policy) is a row. The baselines' distance from the paper's plots says how far the gains may be believed.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from headrace.bench import metrics
from headrace.bench.results import Result, new_result
from headrace.bench.results import Rows as ResultRows
from headrace.bench.simulation.machines import get_machine
from headrace.bench.simulation.published import FIGURE_8, GOODPUT_AT_MOST, PUBLISHED_NAMES
from headrace.bench.simulation.replay import START, Replay
from headrace.bench.workloads.arrivals import Arrival, requests, rescaled, truncated
from headrace.bench.workloads.traces import load_trace
from headrace.compose import get_policy
from headrace.core.batch import StepShape
from headrace.core.clock import VirtualClock
from headrace.core.policy import Limits
from headrace.core.protocols import Profile
from headrace.core.request import SLO
from headrace.engine.acceptance import EXACT, AcceptanceModel, Miscalibration
from headrace.engine.acceptance_fit import get_acceptance
from headrace.engine.simulated import VOCAB, SimulatedEngine
from headrace.engine.simulated_drafts import PassCosts, SimulatedSpeculation
from headrace.speculation.calibration import OnlineCalibration

FIXED = ("chunked", "prefill-first", "spec-4", "spec-6", "spec-8")
RIVALS = (*FIXED, "adaptive-chain")
"""What adaserve must never fall behind: fixed policies and the adaptive one without targets, all at the same costs."""

REPLICAS = {"chunked": "chunked", "prefill-first": "prefill-first"} | {f"vllm-spec-{k}": f"spec-{k}" for k in (4, 6, 8)}
"""Our name of a published system -> its policy. Those that speculate draft at vLLM's cost, which is fitted, not the artifact's."""

POLICIES = (*RIVALS, "paper", "equal", "goodput", "adaserve", "vllm-spec-4", "vllm-spec-6", "vllm-spec-8")
OVERLOAD = 1.39
TIGHT_RATE = 4.0


@dataclass(frozen=True, slots=True)
class Setup:
    """A target with its draft, as simulated.

    Attributes:
        machine, pair: names of the step costs and of the acceptance fit.
        baseline_ms: TPOT of a lone request, which relative targets multiply.
        pass_ms: a layer of drafting, from the artifact's whole speculation.
        vllm_ms: a layer of drafting by vLLM, and what every row adds; fitted so that its chains of 4, 6 and 8 lose
            attainment with load as in figure 8.
        rates: requests a second, as in figure 8.
    """

    machine: str
    pair: str
    baseline_ms: float
    pass_ms: float
    vllm_ms: tuple[float, float]
    rates: tuple[float, ...]

    def drafting(self, policy: str) -> PassCosts:
        """What drafting costs under ``policy``."""
        layer, row = self.vllm_ms if policy.startswith("vllm-") else (self.pass_ms, 0.0)
        return PassCosts({"draft": layer}, {"draft": row})


SETUPS: dict[str, Setup] = {
    "llama": Setup("llama-3.1-70b-8xa100-flat", "llama-3.1-70b+1b", 30.0, 70.0 / 8, (10.0, 0.2), (2.6, 3.4, 4.2, 4.8)),
    "qwen": Setup("qwen2.5-32b-4xa100-flat", "qwen2.5-32b+0.5b", 28.0, 35.0 / 5, (12.0, 0.25), (2.4, 3.2, 3.6, 4.2)),
}


@dataclass(frozen=True, slots=True)
class Cell:
    """One replay.

    Attributes:
        model: key of :data:`SETUPS`.
        rate: requests a second.
        policy: a policy's name, or that of a published system (:data:`REPLICAS`).
        tightness: multiple of the baseline TPOT that the most urgent class is promised; None keeps the trace's.
        beliefs: "miscalibrated" or "exact".
        count: requests to replay; None replays all.
        seed: of the drafts' fates.
    """

    model: str
    rate: float
    policy: str
    tightness: float | None = None
    beliefs: str = "miscalibrated"
    count: int | None = None
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Sweep:
    """What to run: rates, tightness at one rate, and overload.

    Attributes:
        models, policies: names.
        rates: instead of each setup's own.
        tightness: of the sweep at :data:`TIGHT_RATE` requests a second.
        overload: factors on a setup's highest rate.
        count: requests of each replay; None replays the whole trace.
        seeds: fates to replay everything with.
    """

    models: tuple[str, ...] = ("llama", "qwen")
    policies: tuple[str, ...] = POLICIES
    rates: tuple[float, ...] = ()
    tightness: tuple[float, ...] = (1.6, 1.0, 0.8, 0.6)
    overload: tuple[float, ...] = (OVERLOAD,)
    count: int | None = None
    seeds: tuple[int, ...] = (0,)

    def cells(self) -> list[Cell]:
        """All replays, interleaved: policies change fastest."""
        found: list[Cell] = []
        for seed in self.seeds:
            for model in self.models:
                setup = SETUPS[model]
                points: list[tuple[float, float | None]] = [(rate, None) for rate in self.rates or setup.rates]
                points += [(round(setup.rates[-1] * factor, 3), None) for factor in self.overload]
                points += [(TIGHT_RATE, tightness) for tightness in self.tightness]
                found += [
                    Cell(model, rate, policy, tightness, count=self.count, seed=seed)
                    for rate, tightness in points
                    for policy in self.policies
                ]
        return found


def quick(sweep: Sweep) -> Sweep:
    """A part of ``sweep`` that takes about a minute: the highest rate of each model, few requests, four policies."""
    first = SETUPS[sweep.models[0]]
    return replace(
        sweep,
        models=sweep.models[:1],
        rates=sweep.rates[-1:] or first.rates[-1:],
        policies=tuple(name for name in sweep.policies if name in ("chunked", "spec-4", "adaptive-chain", "adaserve")),
        count=min(sweep.count or 150, 150),
        tightness=(),
        overload=(),
    )


@dataclass(slots=True)
class _Remembered:
    """A profile that depends on rows alone, remembered by them."""

    profile: Profile
    known: dict[int, float] = field(default_factory=dict)

    def cost(self, shape: StepShape) -> float:
        rows = shape.prefill_tokens + shape.decode_tokens
        if rows not in self.known:
            self.known[rows] = self.profile.cost(shape)
        return self.known[rows]


def run(sweep: Sweep, trace: Path, *, workers: int = 1, report: Callable[[str], None] = lambda line: None) -> Result:
    """Replay every cell, in ``workers`` processes; a row for each."""
    load_before = os.getloadavg()
    cells = sweep.cells()
    rows: list[dict[str, Any]] = []
    if workers == 1:
        done: Iterable[dict[str, Any]] = (replay(cell, trace) for cell in cells)
        rows = _gathered(done, len(cells), report)
    else:
        with ProcessPoolExecutor(workers) as pool:
            rows = _gathered(pool.map(replay, cells, [trace] * len(cells)), len(cells), report)
    return new_result("adaserve", rows, claims, load_before)


def _gathered(done: Iterable[dict[str, Any]], total: int, report: Callable[[str], None]) -> list[dict[str, Any]]:
    rows = []
    for row in done:
        rows.append(row)
        report(f"{len(rows)}/{total} {row['model']} {row['rate']:g}/s {row['policy']}: {row['attainment']:.1%}")
    return rows


def replay(cell: Cell, trace: Path) -> dict[str, Any]:
    """The row of one replay."""
    setup = SETUPS[cell.model]
    arrivals = workload(trace, setup, cell)
    clock = VirtualClock(START)
    calibration = OnlineCalibration()
    beliefs = EXACT if cell.beliefs == "exact" else Miscalibration()
    model = AcceptanceModel(get_acceptance(setup.pair), beliefs, seed=cell.seed)
    engine = SimulatedEngine(
        _Remembered(get_machine(setup.machine)),
        get_policy(REPLICAS.get(cell.policy, cell.policy)),
        clock,
        limits=Limits(max_sequences=256, max_step_tokens=2048, max_prefill_tokens=2048),
        speculation=SimulatedSpeculation({"draft": model}, setup.drafting(cell.policy), calibration),
    )
    started = time.perf_counter()
    coming = requests(arrivals, vocab_size=VOCAB, seed=0, start=START)
    done = Replay(engine, clock, clock.advance, coming).run()
    wall, stats = time.perf_counter() - started, engine.stats()
    figures = metrics.summary(done)
    shown = (
        "attainment",
        "goodput_tok_s",
        "throughput_tok_s",
        "tpot_ms_p50",
        "tpot_ms_p99",
        "ttft_ms_p50",
        "ttft_ms_p99",
    )
    return {
        "kind": "simulated",
        "model": cell.model,
        "rate": cell.rate,
        "policy": cell.policy,
        "tightness": cell.tightness,
        "beliefs": cell.beliefs,
        "seed": cell.seed,
        "requests": len(done),
        "missed": sum(not metrics.attained(row) for row in done),
        **{name: round(figures[name], 4) for name in shown},
        "classes": {name: round(metrics.attainment(rows), 4) for name, rows in _classes(done).items()},
        "tokens_per_verification": round(1.0 + stats.accepted / max(1, stats.verifications), 3),
        "nodes_per_verification": round(stats.drafted / max(1, stats.verifications), 3),
        "steps": stats.steps,
        "virtual_s": round(clock.now() - START, 3),
        "wall_s": round(wall, 2),
    }


def workload(trace: Path, setup: Setup, cell: Cell) -> list[Arrival]:
    """The trace at the cell's rate, its relative targets as tight as the cell wants them."""
    arrivals = load_trace(trace, baseline_tpot_ms=setup.baseline_ms)
    if cell.tightness is not None:
        urgent = SLO(tpot_ms=cell.tightness * setup.baseline_ms)
        arrivals = [replace(a, slo=urgent) if _relative(a.category) else a for a in arrivals]
    arrivals = rescaled(arrivals, cell.rate)
    return arrivals if cell.count is None else truncated(arrivals, count=cell.count)


def _relative(category: str) -> bool:
    """Whether a category is a multiple of the baseline (``slo_ratio`` above 0)."""
    try:
        return float(category) > 0
    except ValueError:
        return False


def _classes(rows: metrics.Rows) -> dict[str, list[Mapping[str, Any]]]:
    found: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        found.setdefault(row["category"], []).append(row)
    return dict(sorted(found.items()))


def claims(rows: ResultRows) -> dict[str, float]:
    """Attainment of every policy at every rate, and what the comparison comes to."""
    mine = [row for row in rows if row["kind"] == "simulated" and row["beliefs"] == "miscalibrated"]
    attained = _attainment(mine)
    found = {
        f"sim_attainment_{model}_{rate:g}_{policy}": round(100 * share, 2)
        for (model, rate, tightness, policy), share in attained.items()
        if tightness is None
    }
    errors = [
        abs(100 * attained[model, rate, None, policy] - value)
        for model, at in FIGURE_8.items()
        for rate, values in at.items()
        for policy, value in values.items()
        if policy in REPLICAS and (model, rate, None, policy) in attained
    ]
    if errors:
        found["sim_baseline_max_abs_error_points"] = round(max(errors), 2)
        found["sim_baseline_mean_abs_error_points"] = round(sum(errors) / len(errors), 2)
    margins = _margins(attained)
    if margins:
        found["sim_never_below_margin_points"] = round(min(margins), 2)
    for model, setup in SETUPS.items():
        found |= _against_published(model, setup.rates[-1], attained, mine)
    gains = [
        100 * (share - attained[model, rate, tightness, "paper"])
        for (model, rate, tightness, policy), share in attained.items()
        if policy == "adaserve" and rate > SETUPS[model].rates[-1] and (model, rate, tightness, "paper") in attained
    ]
    if gains:
        found["overload_gain_vs_paper_points"] = round(min(gains), 2)
    return found


Case = tuple[str, float, float | None, str]


def _attainment(rows: Sequence[Mapping[str, Any]]) -> dict[Case, float]:
    """Mean over seeds, by (model, rate, tightness, policy)."""
    shares: dict[Case, list[float]] = {}
    for row in rows:
        shares.setdefault((row["model"], row["rate"], row["tightness"], row["policy"]), []).append(row["attainment"])
    return {case: sum(values) / len(values) for case, values in shares.items()}


def _margins(attained: Mapping[Case, float]) -> list[float]:
    """adaserve minus the best rival at every point where both ran."""
    found = []
    for (model, rate, tightness, policy), share in attained.items():
        rivals = [attained[case] for name in RIVALS if (case := (model, rate, tightness, name)) in attained]
        if policy == "adaserve" and rivals:
            found.append(100 * (share - max(rivals)))
    return found


def _against_published(
    model: str, rate: float, attained: Mapping[Case, float], rows: Sequence[Mapping[str, Any]]
) -> dict[str, float]:
    """Violations and goodput at the highest rate against the best baseline the paper printed."""
    share = attained.get((model, rate, None, "adaserve"))
    if share is None:
        return {}
    best = max(FIGURE_8[model][rate][name] for name in REPLICAS)
    speeds = [
        r["goodput_tok_s"]
        for r in rows
        if (r["model"], r["rate"], r["tightness"], r["policy"]) == (model, rate, None, "adaserve")
    ]
    goodput = sum(speeds) / len(speeds)
    return {
        f"sim_violations_ratio_{model}": round((100 - best) / max(100 - 100 * share, 0.05), 2),
        f"sim_goodput_ratio_{model}": round(goodput / GOODPUT_AT_MOST[model], 2),
    }


def panels(rows: ResultRows) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """Attainment over the rate, one curve per policy and one panel per model, with the paper's points beside."""
    drawn: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for (model, rate, tightness, policy), share in sorted(
        _attainment([r for r in rows if r["kind"] == "simulated"]).items(),
        key=lambda item: str(item[0][2:]) + f"{item[0][1]:9.3f}",
    ):
        if tightness is None:
            drawn.setdefault(f"{model}: attainment, %", {}).setdefault(policy, []).append((rate, 100 * share))
    for model, at in FIGURE_8.items():
        for rate, values in at.items():
            panel = drawn.get(f"{model}: attainment, %")
            if panel is not None:
                for name, value in values.items():
                    panel.setdefault(f"{PUBLISHED_NAMES[name]} as published", []).append((rate, value))
    return drawn
