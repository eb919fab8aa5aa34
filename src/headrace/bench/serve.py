"""``headrace bench serve``: closed-loop figures, load sweeps over HTTP with peers, and simulation held against the real server.

One run, one file: parts write their rows as they measure, so an interrupted run keeps what it has (``partial``), and a server
or peer that dies costs its rows and not the run.
"""

from __future__ import annotations

import contextlib
import logging
import os
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headrace.bench.openloop.loads import Load, Lone, Model, drawn_load, recorded_load
from headrace.bench.openloop.served import Served
from headrace.bench.openloop.sweep import Pace, Sweep, by_point, figures
from headrace.bench.openloop.systems import HTTPSystem, SessionSystem, System
from headrace.bench.results import Result, new_result
from headrace.bench.simulation import against_real as simreal
from headrace.bench.simulation.calibrate import calibrated
from headrace.bench.simulation.machine import Machine
from headrace.bench.simulation.profile import measured_profile, simulation_pace
from headrace.bench.workloads.traces import load_trace
from headrace.core.config import EngineConfig
from headrace.core.errors import HeadraceError, InvalidRequest

if TYPE_CHECKING:
    from headrace.bench.closedloop import decode
    from headrace.core.protocols import Profile

log = logging.getLogger(__name__)

Rows = Sequence[Mapping[str, Any]]

PARTS = ("closed", "sweep", "peers", "simulation")
SWEPT_PEERS = ("vllm", "openvino", "transformers-cb")
"""Peers that take requests while others run: over HTTP, or by feeding their scheduler in their own process."""

OURS = "headrace"
QUICK = Pace(fractions=(0.3, 0.7, 1.0), seeds=(0,), seconds=4.0, grace_s=1.5, saturate_s=3.0, concurrency=16, lone=5,
             widths=(1, 4, 16), width_s=1.5)  # fmt: skip
TRACE_FRACTIONS = (0.5, 0.8)
PEER_LOAD_S = 300.0
"""Seconds that a peer may take until it can take part in the sweep."""

GOAL = 0.9
"""Attainment that a rate must keep to count as served."""


@dataclass(frozen=True, slots=True)
class Setting:
    """What to measure.

    Attributes:
        model: folder, hub name or ``bundled``.
        seed: of everything drawn.
        traces: recorded workloads beside the drawn one.
        peers: the peers' folder; None takes the usual one.
        skip: parts to leave out, of :data:`PARTS`.
        policy: of the server.
        longest: prompt plus output tokens that lengths are scaled to, or the model's context where that is less.
        pace: how long and how often.
        quick: everything shorter, without peers in the sweep.
        threads: CPU threads of each system; None takes all.
        closed: setting of the closed-loop part; None takes its own default.
    """

    model: str = "bundled"
    seed: int = 0
    traces: tuple[Path, ...] = ()
    peers: Path | None = None
    skip: frozenset[str] = frozenset()
    policy: str = "chunked"
    longest: int = 512
    pace: Pace = field(default_factory=Pace)
    quick: bool = False
    threads: int | None = None
    closed: decode.Setting | None = None

    def __post_init__(self) -> None:
        unknown = set(self.skip) - set(PARTS)
        if unknown:
            raise InvalidRequest(f"skip is {', '.join(sorted(unknown))}: choose of {', '.join(PARTS)}", field="skip")

    def engine(self) -> EngineConfig:
        """The configuration of the server's engine."""
        return EngineConfig.from_options(model=self.model, policy=self.policy, dtype="float32", threads=self.threads)

    def options(self) -> list[str]:
        """The same as options of ``headrace profile`` (and, with the policy, of ``headrace serve``)."""
        config = self.engine()
        threads = [] if self.threads is None else ["--threads", str(self.threads)]
        limits = config.limits
        return ["--dtype", config.dtype, "--max-sequences", str(limits.max_sequences),
                "--max-step-tokens", str(limits.max_step_tokens), *threads]  # fmt: skip


def run(
    setting: Setting,
    *,
    report: Callable[[str], None] = lambda line: None,
    on_part: Callable[[int, int], None] = lambda done, total: None,
) -> Result:
    """Measure every part that is not skipped.

    Args:
        report: told what happens.
        on_part: told how many parts of how many are done.

    Returns:
        The result; ``partial`` when it was interrupted, or when a part ended early: a row of kind ``skipped`` says why.

    Raises:
        HeadraceError: a trace cannot be read, or nothing at all could be measured.
    """
    for path in setting.traces:
        load_trace(path, baseline_tpot_ms=1.0)  # what is wrong with it shall not show after minutes
    load_before = os.getloadavg()
    rows: list[dict[str, Any]] = []
    partial = False
    parts: list[Callable[[], None]] = []
    if "closed" not in setting.skip:
        parts.append(lambda: _closed(setting, rows, report))
    if "sweep" not in setting.skip:
        parts.append(lambda: _open(setting, rows, report))
    try:
        for done, part in enumerate(parts):
            on_part(done, len(parts))
            try:
                part()
            except Exception as error:
                if not rows:
                    raise
                partial = True
                reason = error.message if isinstance(error, HeadraceError) else f"{type(error).__name__}: {error}"
                log.warning("a part of the benchmark ended early", exc_info=not isinstance(error, HeadraceError))
                report(f"ended early: {reason}")
                rows.append({"kind": "skipped", "system": OURS, "load": "", "reason": f"ended early: {reason}"})
        on_part(len(parts), len(parts))
    except KeyboardInterrupt:
        partial = True
    return replace(new_result("serve", rows, claims, load_before), partial=partial)


def _closed(setting: Setting, rows: list[dict[str, Any]], report: Callable[[str], None]) -> None:
    from headrace.bench.closedloop import decode

    closed = setting.closed or decode.Setting(folder=setting.peers, threads=setting.threads, seed=setting.seed)
    if setting.quick:
        closed = decode.quick(closed)
    decode.run(closed, rows=rows, report=report)


def _open(setting: Setting, rows: list[dict[str, Any]], report: Callable[[str], None]) -> None:
    """The server, its sweep with peers, the recorded workloads, and the simulation of all that."""
    # Before the server starts, which then finds the profile stored and need not measure its own.
    profile = _profile(setting, rows, report) if "simulation" not in setting.skip else None
    report("starting headrace serve")
    pace = QUICK if setting.quick else setting.pace
    with contextlib.ExitStack() as stack:
        served = stack.enter_context(Served(setting.model, ["--policy", setting.policy, *setting.options()]))
        model = model_of(setting, served)
        sweep = Sweep(model, pace, setting.seed, rows, report)
        ours = HTTPSystem(OURS, served.url, served.model, served)
        drawn = drawn_load(model.context, seed=setting.seed)
        lone = sweep.lone(ours, drawn)
        rate = sweep.saturation(ours, drawn)
        loads = [recorded_load(path, model.context, lone, seed=setting.seed) for path in setting.traces]
        served.pause()
        peers = [] if setting.quick or "peers" in setting.skip else list(_peers(setting, model, rows, stack, report))
        served.resume()

        def calibrate() -> None:
            if profile is not None:
                sweep.level(ours, drawn)

        sweep.run([ours, *peers], drawn, rate, lone, between=calibrate)
        _recorded(sweep, ours, loads, lone)
        slots = int(served.stats().get("slots", 0)) or 1 << 17
    if profile is not None:
        limits = setting.engine().limits
        _simulate(sweep, Machine(profile, setting.policy, limits, slots, served.context), rows, report)
        report("simulating a long trace")
        rows.append(simulation_pace(setting.traces, seconds=5.0 if setting.quick else 20.0))


def _profile(setting: Setting, rows: list[dict[str, Any]], report: Callable[[str], None]) -> Profile:
    report("measuring what steps cost")
    repeats, seconds = (1, 8.0) if setting.quick else (7, 60.0)
    return measured_profile(setting.model, setting.options(), rows, repeats=repeats, seconds=seconds)


def _recorded(sweep: Sweep, ours: HTTPSystem, loads: Sequence[Load], lone: Lone) -> None:
    """Each trace at its own saturation; one seed, for they serve to hold the simulation against other mixes."""
    full = sweep.pace
    sweep.pace = replace(full, fractions=TRACE_FRACTIONS, seeds=full.seeds[:1], saturate_s=full.saturate_s / 2)
    for load in loads:
        try:
            rate = sweep.saturation(ours, load)
        except HeadraceError as error:
            sweep.skip(ours, load, f"lost: {error.message}")
            continue
        sweep.run([ours], load, rate, lone)
    sweep.pace = full


def _peers(
    setting: Setting,
    model: Model,
    rows: list[dict[str, Any]],
    stack: contextlib.ExitStack,
    report: Callable[[str], None],
) -> Iterator[System]:
    """Peers that are installed and start, paused; whoever does not start leaves a row that says why."""
    from headrace.bench import peers
    from headrace.models.checkpoints import hub

    for peer in peers.discover(setting.peers, SWEPT_PEERS):
        if not peer.installed:
            rows.append({"kind": "skipped", "system": peer.name, "load": "", "reason": f"not installed: {peer.remedy}"})
            continue
        report(f"starting {peer.name}")
        try:
            session = peers.start(
                peer, hub.resolve(setting.model), "fp32", threads=setting.threads, context=model.context,
                sequences=setting.engine().limits.max_sequences, load_s=PEER_LOAD_S, report=report,
            )  # fmt: skip
        except HeadraceError as error:
            rows.append({"kind": "skipped", "system": peer.name, "load": "", "reason": f"lost: {error.message}"})
            continue
        stack.callback(session.close)
        rows.append({"kind": "system", "system": peer.name, "version": peer.version, "ran": session.ran,
                     "over": "http" if session.url else "its own process"})  # fmt: skip
        if session.url and session.model:
            system: System = HTTPSystem(peer.name, session.url, session.model, session)
        else:
            system = SessionSystem(peer.name, session)
        report(f"warming {peer.name} up")
        with contextlib.suppress(HeadraceError):  # what is wrong with it shows at its first turn
            warm = drawn_load(model.context, seed=setting.seed).piece(8.0, 1.0, seed=99)
            system.replay(model.shots(warm, seed=99), cutoff_s=30.0)
        session.pause()
        yield system


def _simulate(sweep: Sweep, machine: Machine, rows: list[dict[str, Any]], report: Callable[[str], None]) -> None:
    """Every case that was replayed on the server again in simulation, with and without calibration."""
    report("fitting what a server adds to a step")
    try:
        fit = calibrated(machine, sweep.levels)
    except ValueError as error:
        rows.append({"kind": "skipped", "system": OURS, "load": "simulated", "reason": str(error)})
        return
    rows.append(fit.row())
    real: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        if row["kind"] == "request" and row["system"] == OURS:
            real.setdefault((row["load"], row["fraction"], row["seed"]), []).append(row)
    for case in sweep.cases:
        report(f"simulating {case.load.name} at {case.fraction:g}")
        mine = real.get(tuple(case.labels.values()), [])
        if mine:
            for flag, used in ((True, fit.machine), (False, replace(machine, front=fit.machine.front))):
                rows.extend(simreal.simulate_case(used, case, mine, calibrated=flag))


def model_of(setting: Setting, served: Served) -> Model:
    """Vocabulary, usable context and tokeniser of the served model."""
    import json

    from headrace.models.checkpoints import hub
    from headrace.models.text.tokenizer import Tokenizer

    folder = hub.resolve(setting.model)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    vocabulary = int((config.get("text_config") or config)["vocab_size"])
    tokenizer: list[Tokenizer] = []

    def tokenize(text: str) -> Sequence[int]:
        if not tokenizer:  # only traces with texts need it, and it takes seconds
            tokenizer.append(Tokenizer(str(folder)))
        return tokenizer[0].encode(text)

    return Model(vocabulary, min(served.context, setting.longest), tokenize)


def claims(rows: Rows) -> dict[str, float]:
    """All claims of the file; each from its own rows, and left out where they are missing."""
    from headrace.bench.closedloop.claims import claims as closed_claims

    return {**closed_claims(rows), **sweep_claims(rows), **simreal.claims(rows)}


def sweep_claims(rows: Rows) -> dict[str, float]:
    """Of the drawn workload, per system: the highest rate that keeps :data:`GOAL`, and at each fraction attainment and goodput
    against the best peer. ``late_sends_share`` says what share of all requests the client sent late, ``busy_elsewhere_cores`` how
    many cores programs that are not ours kept busy meanwhile."""
    points = {k: figures(v) for k, v in by_point(rows).items()}
    rates = {(r["load"], r["fraction"]): r["rate"] for r in rows if r["kind"] == "run"}
    found: dict[str, float] = {}
    best: dict[str, float] = {}
    for (load, system, fraction), point in points.items():
        if load != "poisson":
            continue
        if system == OURS:
            found[f"attainment_at_{fraction:g}"] = point["attainment"]
        best.setdefault(system, 0.0)
        if point["attainment"] >= GOAL:
            best[system] = max(best[system], rates[load, fraction])
    for system, rate in best.items():
        found[f"requests_per_s_at_goal_{_word(system)}"] = rate
    others = [rate for system, rate in best.items() if system != OURS]
    if OURS in best and others and max(others) > 0:
        found["requests_per_s_at_goal_vs_best_peer"] = best[OURS] / max(others)
    sent = [r for r in rows if r["kind"] == "run" and r.get("sent")]
    if sent:
        found["late_sends_share"] = sum(r["late"] for r in sent) / sum(r["sent"] for r in sent)
    elsewhere = [r["elsewhere_cores"] for r in rows if r["kind"] == "run" and "elsewhere_cores" in r]
    if elsewhere:
        found["busy_elsewhere_cores"] = statistics.fmean(elsewhere)
    full = [r["requests_per_s"] for r in rows if r["kind"] == "saturation" and r["load"] == "poisson"]
    if full:
        found["saturation_requests_per_s"] = statistics.median(full)
    return {name: round(value, 4) for name, value in found.items()}


def panels(rows: Rows) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """Curves over the rate, one per system, of the drawn workload."""
    shown = {
        "ttft_ms_p50": "TTFT p50, ms", "ttft_ms_p99": "TTFT p99, ms", "tpot_ms_p50": "TPOT p50, ms", "tpot_ms_p99": "TPOT p99, ms",
        "throughput_tok_s": "throughput, tok/s", "goodput_tok_s": "goodput, tok/s", "attainment": "SLO attainment",
    }  # fmt: skip
    rates = {(r["load"], r["fraction"]): r["rate"] for r in rows if r["kind"] == "run"}
    drawn: dict[str, dict[str, list[tuple[float, float]]]] = {title: {} for title in shown.values()}
    for (load, system, fraction), mine in by_point(rows).items():
        point = figures(mine)
        for name, title in shown.items():
            if load == "poisson" and point[name] == point[name]:
                drawn[title].setdefault(system, []).append((rates[load, fraction], point[name]))
    return drawn


def _word(name: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in name)
