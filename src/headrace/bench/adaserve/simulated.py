"""Part one: policies on simulated GPUs.

Engine, policies, slots and verification are the real ones; what a step costs comes from the artifact's tables, what becomes of drafts
from a model fitted to the paper's mean accepted tokens, and policies see beliefs that are not the truth. Every (machine, rate, SLO
scale, policy) is a row of kind "simulated". The baselines' distance from the paper's plots says how far the gains may be believed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from headrace.bench import metrics
from headrace.bench.adaserve.cells import URGENT, Cell, Sweep
from headrace.bench.adaserve.journal import Journal
from headrace.bench.adaserve.setups import (
    CHAINS,
    REPLICAS,
    SETUPS,
    Setup,
    beliefs_for,
    calibration_for,
    policy_named,
)
from headrace.bench.simulation.chains import ChainReplay, NeedsEngine, replay_chains
from headrace.bench.simulation.published import is_published
from headrace.bench.simulation.replay import START, Replay
from headrace.bench.workloads.arrivals import Arrival, requests, rescaled, truncated
from headrace.bench.workloads.traces import load_trace
from headrace.core.clock import VirtualClock
from headrace.core.outputs import EngineStats
from headrace.core.policy import Limits
from headrace.core.request import SLO
from headrace.engine.simulation.acceptance import AcceptanceModel
from headrace.engine.simulation.drafts import SimulatedSpeculation
from headrace.engine.simulation.fit import get_acceptance
from headrace.engine.simulation.runner import VOCAB, SimulatedEngine

LIMITS = Limits(max_sequences=256, max_step_tokens=2048, max_prefill_tokens=2048)
SHOWN = ("attainment", "goodput_tok_s", "throughput_tok_s", "tpot_ms_p50", "tpot_ms_p99", "ttft_ms_p50", "ttft_ms_p99")
OUTPUT_TOKENS = 256.0
"""Mean answer of the published traces: what a rate of theirs means in tokens."""

Rows = list[dict[str, Any]]


def measure(
    sweep: Sweep,
    trace: Path,
    *,
    workers: int = 1,
    journal: Journal | None = None,
    report: Callable[[str, int, int], None] = lambda line, done, total: None,
) -> Iterator[dict[str, Any]]:
    """Replay every cell in ``workers`` processes and yield its rows as they come; those that ``journal`` knows are not replayed.

    ``report`` is told what was done, how many replays are done and how many there are.
    """
    cells = sweep.cells()
    missing = [cell for cell in cells if journal is None or cell not in journal]
    done = len(cells) - len(missing)
    if journal is not None:
        for cell in cells:
            yield from journal.get(cell)
    for cell, rows in _replayed(missing, trace, workers):
        done += 1
        if journal is not None:
            journal.add(cell, rows)
        report(f"{cell.model} {cell.rate:g}/s {cell.policy}: {rows[0]['attainment']:.1%}", done, len(cells))
        yield from rows


def _replayed(cells: Sequence[Cell], trace: Path, workers: int) -> Iterator[tuple[Cell, Rows]]:
    if workers == 1 or len(cells) < 2:
        for cell in cells:
            yield cell, replay(cell, trace)
        return
    with ProcessPoolExecutor(min(workers, len(cells))) as pool:
        try:
            yield from zip(cells, pool.map(replay, cells, [trace] * len(cells)), strict=True)
        except BaseException:  # whoever interrupts does not want to wait for replays that nobody reads
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def replay(cell: Cell, trace: Path) -> Rows:
    """The rows of one replay, one for each of the cell's SLO scales."""
    setup = SETUPS[cell.model]
    arrivals = workload(trace, setup, cell)
    model = AcceptanceModel(get_acceptance(setup.pair), beliefs_for(cell.policy), seed=cell.seed)
    started = time.perf_counter()
    done, counts, ended = _chains(cell, arrivals, setup, model) or through_engine(cell, arrivals, setup, model)
    common = {
        "tokens_per_verification": round(1.0 + counts.accepted / max(1, counts.verifications), 3),
        "nodes_per_verification": round(counts.drafted / max(1, counts.verifications), 3),
        "steps": counts.steps,
        "virtual_s": round(ended, 3),
        "wall_s": round((time.perf_counter() - started) / len(cell.tightness), 2),
        "published": cell.count is None and is_published(trace),
    }
    return [_row(cell, tightness, _judged(done, setup, tightness)) | common for tightness in cell.tightness]


def _chains(
    cell: Cell, arrivals: list[Arrival], setup: Setup, model: AcceptanceModel
) -> tuple[metrics.Rows, ChainReplay, float] | None:
    """The replay of a chain of fixed length, without an engine where it comes to the same; None where it may not."""
    name = REPLICAS.get(cell.policy, cell.policy)
    if name not in CHAINS:
        return None
    profile, length = setup.steps(cell.policy), int(name.removeprefix("spec-"))
    try:
        found = replay_chains(arrivals, length, profile, setup.drafting(cell.policy), model, LIMITS)
    except NeedsEngine:
        return None
    return found.rows, found, found.virtual_s


def through_engine(
    cell: Cell, arrivals: list[Arrival], setup: Setup, model: AcceptanceModel
) -> tuple[metrics.Rows, EngineStats, float]:
    """Rows, counts and virtual seconds of a replay through the engine."""
    clock = VirtualClock(START)
    engine = SimulatedEngine(
        setup.steps(cell.policy),
        policy_named(cell.policy),
        clock,
        limits=LIMITS,
        speculation=SimulatedSpeculation({"draft": model}, setup.drafting(cell.policy), calibration_for(cell.policy)),
    )
    coming = requests(arrivals, vocab_size=VOCAB, seed=0, start=START)
    done = Replay(engine, clock, clock.advance, coming).run()
    return done, engine.stats(), clock.now() - START


def _row(cell: Cell, tightness: float | None, done: metrics.Rows) -> dict[str, Any]:
    figures = metrics.summary(done)
    return {
        "kind": "simulated",
        "model": cell.model,
        "rate": cell.rate,
        "policy": cell.policy,
        "tightness": tightness,
        "seed": cell.seed,
        "requests": len(done),
        "missed": sum(not metrics.attained(row) for row in done),
        **{name: round(figures[name], 4) for name in SHOWN},
        "classes": {name: round(metrics.attainment(rows), 4) for name, rows in classes(done).items()},
    }


def _judged(done: metrics.Rows, setup: Setup, tightness: float | None) -> metrics.Rows:
    """``done`` with the targets of another SLO scale."""
    if tightness is None:
        return done
    urgent = tightness * setup.baseline_ms
    return [{**row, "slo_tpot_ms": urgent} if relative(row["category"]) else row for row in done]


def workload(trace: Path, setup: Setup, cell: Cell) -> list[Arrival]:
    """The trace at the cell's rate, its relative targets as tight as the cell wants them (as the first of several)."""
    arrivals = rescaled(_loaded(trace, setup.baseline_ms), cell.rate)
    tightness = cell.tightness[0]
    if tightness is not None:
        urgent = SLO(tpot_ms=tightness * setup.baseline_ms)
        arrivals = [replace(a, slo=urgent) if relative(a.category) else a for a in arrivals]
    return arrivals if cell.count is None else truncated(arrivals, count=cell.count)


@lru_cache(maxsize=4)
def _loaded(trace: Path, baseline_ms: float) -> list[Arrival]:
    return load_trace(trace, baseline_tpot_ms=baseline_ms, slo=SLO(tpot_ms=URGENT * baseline_ms))


def pace_of(trace: Path) -> float:
    """What rates to replay a trace at, as a factor on the published ones: its requests a second of as many tokens.

    Raises:
        InvalidRequest: the trace cannot be read.
    """
    arrivals = _loaded(trace, SETUPS["llama"].baseline_ms)
    return 1.0 if is_published(trace) else OUTPUT_TOKENS * len(arrivals) / sum(a.output_tokens for a in arrivals)


def relative(category: str) -> bool:
    """Whether a category is a multiple of the baseline (``slo_ratio`` above 0)."""
    try:
        return float(category) > 0
    except ValueError:
        return False


def classes(rows: metrics.Rows) -> dict[str, list[Mapping[str, Any]]]:
    """Rows by category."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        found.setdefault(row["category"], []).append(row)
    return dict(sorted(found.items()))
