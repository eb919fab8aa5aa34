"""Part two: the same policies on a real model, on the wall's clock.

One engine around the padded pair serves pieces of the trace under one policy after the other: every policy meets the same
pieces at the same loads, another one begins each time, and each goes on with what it has learnt of drafts. Loads are fractions of what
the engine without drafts completes when it is full. A run is a row of kind "real".
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headrace.bench import metrics
from headrace.bench.adaserve.load import Texts, lone_tpot_ms, read, saturation
from headrace.bench.adaserve.pair import Bench, Target, build
from headrace.bench.simulation.replay import Replay

if TYPE_CHECKING:
    from headrace.core.outputs import EngineStats

COMPARED = ("adaserve", "chunked", "spec-4", "spec-6", "spec-8", "adaptive-chain")
"""Those that the never-below rule is about: a run at every load in every turn."""

ABLATIONS = ("equal", "goodput", "paper")
"""A run at every load in the first turn."""

POLICIES = (*COMPARED, *ABLATIONS)
CURVE = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
"""Rows of the steps that are timed."""

Report = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Setting:
    """What to measure.

    Attributes:
        target: the pair.
        policies: names.
        loads: fractions of what the engine without drafts completes when full.
        seconds: of arrivals in a run.
        drain_s: after the last arrival; whoever is not done by then has missed.
        turns: runs of every compared policy at every load; the ablations have one.
        answer: tokens of every answer.
        lone, full: requests that the baseline and the saturation are measured with.
        identity: prompts whose answers are compared between policies.
        assisted: prompts for transformers' assisted generation.
        budget_s: seconds of the sweep; a turn that would not be done by then is left out.
    """

    target: Target = field(default_factory=Target)
    policies: tuple[str, ...] = POLICIES
    loads: tuple[float, ...] = (0.3, 0.5, 0.7, 0.9)
    seconds: float = 9.0
    drain_s: float = 4.0
    turns: int = 3
    answer: int = 32
    lone: int = 9
    full: int = 32
    identity: int = 200
    assisted: int = 6
    budget_s: float = 960.0


QUICK = Setting(
    policies=("adaserve", "chunked", "spec-4", "adaptive-chain"),
    loads=(0.4, 0.7), seconds=4.0, drain_s=3.0, turns=1, lone=3, full=16, identity=40, assisted=1, budget_s=60.0,
)  # fmt: skip
"""About a minute and a half."""


def measure(
    setting: Setting,
    trace: Path,
    *,
    served: bool = True,
    peer: bool = True,
    report: Report = lambda line, done, total: None,
) -> Iterator[dict[str, Any]]:
    """The sweep (``served``) and transformers' assisted generation beside it (``peer``), row by row.

    Raises:
        HeadraceError: the trace cannot be read, or the pair cannot be built.
    """
    from headrace.models.text.tokenizer import Tokenizer

    say: Callable[[str], None] = lambda line: report(line, 0, 0)  # noqa: E731
    say("reading the trace")
    context, answer = setting.target.context, setting.answer
    bench = build(setting.target, report=say)
    try:
        card = bench.engine.card
        encode = Tokenizer(Path(card.path)).encode
        texts = read(trace, encode, context=context, answer=answer, vocab_size=card.vocab_size)
        if served:
            say("measuring a lone request, a full engine and the curve of step costs")
            yield from curve(bench)
            machine = _machine(bench, texts, setting)
            yield machine
            yield from sweep(bench, texts, setting, machine["baseline_ms"], machine["saturation_requests_s"], report)
        if peer:
            from headrace.bench.adaserve.assisted import assisted_rows

            yield from assisted_rows(bench, texts, Path(card.path), setting.assisted, say)
    finally:
        bench.engine.close()


def _machine(bench: Bench, texts: Texts, setting: Setting) -> dict[str, Any]:
    """What targets and loads are measured against (kind "machine")."""
    alone = lone_tpot_ms(bench, texts, setting.lone + 1)[1:]
    return {
        "kind": "machine",
        "shape": setting.target.shape,
        "quantize": setting.target.quantize,
        "baseline_ms": round(statistics.median(alone), 3),
        "lone_ms": [round(ms, 3) for ms in alone],
        "saturation_requests_s": round(saturation(bench, texts, setting.full), 3),
        "answer": setting.answer,
        "prompt_tokens_mean": round(statistics.mean(map(len, texts.prompts)), 1),
    }


def curve(bench: Bench) -> Iterator[dict[str, Any]]:
    """What a step costs by its rows (kind "curve"): medians of interleaved repeats."""
    from headrace.engine.profiled import StepTimer
    from headrace.profiling.shapes import EvenStep

    timer = StepTimer(bench.engine)
    steps = {rows: EvenStep(decodes=rows, decode_context=64) for rows in CURVE}
    took: dict[int, list[float]] = {rows: [] for rows in CURVE}
    for turn in range(8):
        for rows, step in steps.items():
            ms = timer(step)
            if turn:
                took[rows].append(ms)
    drafts = bench.engine.drafting.outlook.drafts if bench.engine.drafting else None
    for rows, times in took.items():
        drafted = drafts.draft_ms("draft", rows, 1, 1) if drafts is not None else 0.0
        yield {"kind": "curve", "rows": rows, "step_ms": round(statistics.median(times), 3),
               "draft_layer_ms": round(drafted, 3)}  # fmt: skip


def sweep(
    bench: Bench, texts: Texts, setting: Setting, baseline_ms: float, most: float, report: Report
) -> Iterator[dict[str, Any]]:
    """A row for every policy, load and turn; before the first, every policy serves a little that is not counted."""
    begun = time.monotonic()
    runs = [
        (turn, load, policy)
        for turn in range(setting.turns)
        for place, load in enumerate(setting.loads)
        for policy in rotated(setting.policies, turn + place)
        if not turn or policy not in ABLATIONS
    ]
    for policy in setting.policies:
        serve(bench, policy, texts, 10 * most, 4, baseline_ms, seed=99, drain_s=setting.drain_s)
    for done, (turn, load, policy) in enumerate(runs):
        if turn and (turn, load) != runs[done - 1][:2] and _late(begun, done, runs, setting.budget_s):
            return
        count, seed = max(4, round(load * most * setting.seconds)), 100 * turn + setting.loads.index(load)
        row = serve(bench, policy, texts, load * most, count, baseline_ms, seed=seed, drain_s=setting.drain_s)
        report(f"{policy} at {load:g} of saturation: {row['attainment']:.0%}", done + 1, len(runs))
        yield {"kind": "real", "policy": policy, "load": load, "turn": turn, **row}


def _late(begun: float, done: int, runs: Sequence[tuple[int, float, str]], budget_s: float) -> bool:
    """Whether the runs of the same turn and load as ``runs[done]`` would not be over in time, at the pace so far."""
    coming = sum(run[:2] == runs[done][:2] for run in runs[done:])
    return (time.monotonic() - begun) * (done + coming) / done > budget_s


def rotated(names: Sequence[str], by: int) -> list[str]:
    """``names`` with another one first."""
    by %= len(names)
    return [*names[by:], *names[:by]]


def serve(
    bench: Bench, policy: str, texts: Texts, rate: float, count: int, baseline_ms: float, *, seed: int, drain_s: float
) -> dict[str, Any]:
    """Serve a piece under ``policy`` and say what became of it."""
    engine = bench.use(policy)
    start = engine.clock.now() + 0.05
    name = f"{policy}-{seed}-{engine.stats().steps}"
    coming = texts.piece(rate, count, baseline_ms, seed=seed, name=name, start=start)
    before = copy.deepcopy(engine.stats())
    run = Replay(engine, engine.clock, time.sleep, coming, horizon_s=coming[-1].arrival + drain_s)
    rows = run.run()
    after = copy.deepcopy(engine.stats())
    bench.clear()
    return _figures(rows, before, after)


def _figures(rows: metrics.Rows, before: EngineStats, after: EngineStats) -> dict[str, Any]:
    """Latencies and counts of a run, and where its time went."""
    figures = metrics.summary(rows)
    shown = (
        "attainment",
        "goodput_tok_s",
        "throughput_tok_s",
        "tpot_ms_p50",
        "tpot_ms_p99",
        "ttft_ms_p50",
        "ttft_ms_p99",
    )
    spent: Callable[[str], float] = lambda name: getattr(after, name) - getattr(before, name)  # noqa: E731
    classes = {str(category) for category in (row["category"] for row in rows)}
    return {
        "requests": len(rows),
        "attained": sum(metrics.attained(row) for row in rows),
        "unfinished": sum(not row["finished"] for row in rows),
        **{key: round(figures[key], 4) for key in shown},
        "duration_s": round(metrics.duration_s(rows), 3),
        "classes": {
            name: round(metrics.attainment([r for r in rows if r["category"] == name]), 4) for name in sorted(classes)
        },
        "steps": after.steps - before.steps,
        "verifications": spent("verifications"),
        "drafted": spent("drafted"),
        "accepted": spent("accepted"),
        "step_s": round(after.step_seconds.total - before.step_seconds.total, 4),
        "draft_s": round(spent("draft_s"), 4),
        "plan_s": round(spent("plan_s"), 4),
    }
