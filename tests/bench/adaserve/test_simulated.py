"""The simulated part: cells, replays, what is remembered of them, and what they come to."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from headrace.bench.adaserve import cells, setups, simulated
from headrace.bench.adaserve.cells import Cell, Sweep, quick
from headrace.bench.adaserve.claims import simulated_claims
from headrace.bench.adaserve.journal import Journal, fingerprint
from headrace.bench.adaserve.setups import BLIND, CHAINS, POLICIES, REPLICAS, SETUPS, VARIANTS
from headrace.bench.simulation.published import FIGURE_8, is_published
from headrace.core.errors import InvalidRequest
from headrace.engine.simulation.acceptance import AcceptanceModel
from headrace.engine.simulation.fit import get_acceptance


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """Forty requests of three classes, some with long prompts, in two bursts."""
    path = tmp_path / "trace.jsonl"
    kinds = [(1.2, 120), (-50, 20), (-150, 700)]
    lines = [
        {
            "emission_time_ms": 90.0 * i + (2500 if i > 20 else 0),
            "input_length": kinds[i % 3][1] + 7 * i,
            "output_length": 1 if i == 5 else 60 + i,
            "slo_ratio": kinds[i % 3][0],
        }
        for i in range(40)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_each_replay_is_asked_for_once() -> None:
    found = Sweep().cells()
    assert len(found) == len(set(found))
    for model in SETUPS:
        mine = [c for c in found if c.model == model]
        rates = {c.rate for c in mine if c.policy == "adaserve"}
        assert {2.4, 4.8, *SETUPS[model].rates} <= rates
        assert max(rates) > SETUPS[model].rates[-1]
        assert {c.policy for c in mine} == {*POLICIES, *VARIANTS}
        scales = {s for c in mine for s in c.tightness if c.policy == "adaserve"}
        assert scales == {None, 1.6, 1.0, 0.8, 0.6}
        assert all(len(c.tightness) == 1 or c.policy in BLIND for c in mine)


def test_quick_is_one_rate_of_one_model() -> None:
    found = quick(Sweep()).cells()
    assert {(c.model, c.rate) for c in found} == {("llama", 4.8)}
    assert {c.policy for c in found} == {"chunked", "spec-4", "adaptive-chain", "adaserve"}
    assert {c.count for c in found} == {200}


@pytest.mark.parametrize("policy", ["spec-4", "spec-8", "vllm-spec-6"])
def test_chains_without_an_engine_come_to_the_same_to_the_last_bit(trace: Path, policy: str) -> None:
    cell, setup = Cell("qwen", 9.0, policy), SETUPS["qwen"]
    arrivals = simulated.workload(trace, setup, cell)
    model = AcceptanceModel(get_acceptance(setup.pair))
    fast = simulated._chains(cell, arrivals, setup, model)
    assert fast is not None
    rows, stats, ended = simulated.through_engine(cell, arrivals, setup, model)
    assert sorted(fast[0], key=lambda r: r["id"]) == sorted(rows, key=lambda r: r["id"])
    for name in ("steps", "verifications", "drafted", "accepted"):
        assert getattr(fast[1], name) == getattr(stats, name), name
    assert fast[2] == ended
    # negative control: other fates are other rows
    other = simulated._chains(cell, arrivals, setup, AcceptanceModel(get_acceptance(setup.pair), seed=1))
    assert other is not None
    assert other[0] != fast[0]


def test_chains_decline_what_only_the_engine_can_say(trace: Path) -> None:
    cell, setup = Cell("qwen", 9.0, "spec-4"), SETUPS["qwen"]
    arrivals = simulated.workload(trace, setup, cell)
    model = AcceptanceModel(get_acceptance(setup.pair))
    urgent = [replace(arrivals[0], priority=-1), *arrivals[1:]]
    assert simulated._chains(cell, urgent, setup, model) is None
    huge = [replace(arrivals[0], prompt_tokens=1 << 15), *arrivals[1:]]
    assert simulated._chains(cell, huge, setup, model) is None
    assert simulated._chains(replace(cell, policy="adaserve"), arrivals, setup, model) is None


@pytest.mark.parametrize("policy", sorted(BLIND - CHAINS))
def test_one_replay_serves_every_target_of_a_policy_that_looks_at_none(trace: Path, policy: str) -> None:
    together = simulated.replay(Cell("llama", 12.0, policy, (None, 0.8)), trace)
    alone = [simulated.replay(Cell("llama", 12.0, policy, (scale,)), trace)[0] for scale in (None, 0.8)]
    for row in (*together, *alone):
        row.pop("wall_s")
    assert together == alone


def test_adaserve_does_look_at_targets(trace: Path) -> None:
    """The control of the test above: its steps differ with the targets."""
    steps = {simulated.replay(Cell("llama", 12.0, "adaserve", (scale,)), trace)[0]["steps"] for scale in (3.0, 0.7)}
    assert len(steps) == 2


def test_an_interrupted_grid_goes_on_from_its_rows(trace: Path, tmp_path: Path) -> None:
    sweep = Sweep(
        models=("llama",), policies=("chunked", "spec-4"), rates=(8.0,), tightness=(), overload=(), ablations=()
    )
    first = Journal(tmp_path / "rows.jsonl")
    running = simulated.measure(sweep, trace, journal=first)
    begun = [next(running)]
    running.close()
    with (tmp_path / "rows.jsonl").open("a") as out:
        out.write('{"cell": "cut o')
    told: list[tuple[str, int, int]] = []
    rows = list(
        simulated.measure(
            sweep, trace, journal=Journal(tmp_path / "rows.jsonl"), report=lambda *said: told.append(said)
        )
    )
    assert rows[0] == begun[0]
    assert len(rows) == 2
    assert [(done, total) for _, done, total in told] == [(2, 2)]


def test_a_journal_is_of_one_trace_and_one_code(trace: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    before = fingerprint(trace)
    assert before == fingerprint(trace)
    trace.write_text(trace.read_text() + "\n")
    assert before != fingerprint(trace)
    monkeypatch.setenv("HEADRACE_CACHE", str(tmp_path / "cache"))
    kept = Journal.of(trace)
    kept.add(Cell("llama", 1.0, "chunked"), [{"a": 1}])
    assert Cell("llama", 1.0, "chunked") in Journal.of(trace)
    assert Cell("llama", 1.0, "chunked") not in Journal.of(trace, again=True)


def row(policy: str, rate: float, share: float, *, model: str = "llama", published: bool = True, **more: object):
    base = {"kind": "simulated", "model": model, "rate": rate, "policy": policy, "tightness": None, "seed": 0}
    return {**base, "attainment": share, "goodput_tok_s": 870.0, "published": published, **more}


def test_claims_say_what_the_rows_say() -> None:
    best = FIGURE_8["llama"][4.8]
    rows = [row(name, 4.8, best[name] / 100) for name in REPLICAS] + [
        row("adaserve", 4.8, 0.883),
        row("spec-4", 4.8, 0.90),
        row("adaserve", 6.672, 0.5),
        row("paper", 6.672, 0.2),
        row("adaserve", 4.0, 0.7, tightness=0.8),
        row("adaptive-chain", 4.0, 0.75, tightness=0.8),
        row("adaserve-tree", 4.8, 0.80),
    ]
    found = simulated_claims(rows)
    assert found["sim_attainment_llama_4.8_adaserve"] == 88.3
    assert found["sim_baseline_max_abs_error_points"] == 0
    assert found["sim_violations_ratio_llama"] == pytest.approx((100 - 41.5) / 11.7, abs=0.01)
    assert found["sim_goodput_ratio_llama"] == 2.0
    assert found["sim_never_below_margin_points"] == -5.0
    assert found["overload_gain_vs_paper_points"] == 30.0
    assert found["sim_ablation_points_llama_4.8_adaserve-tree"] == -8.3
    assert not any(math.isnan(value) for value in found.values())
    rows[1]["attainment"] += 0.09
    assert simulated_claims(rows)["sim_baseline_max_abs_error_points"] == 9.0


def test_other_traces_are_not_held_against_the_paper(trace: Path) -> None:
    assert not is_published(trace)
    found = simulated_claims([row("adaserve", 4.8, 0.9, published=False), row("chunked", 4.8, 0.5, published=False)])
    assert found["sim_never_below_margin_points"] == 40.0
    assert not any("ratio" in name or "baseline" in name for name in found)


def test_other_traces_are_replayed_at_as_many_tokens_a_second(trace: Path) -> None:
    pace = simulated.pace_of(trace)
    lines = [json.loads(line) for line in trace.read_text().splitlines()]
    tokens = sum(line["output_length"] for line in lines) / len(lines)
    assert pace == pytest.approx(256 / tokens)
    rates = Sweep(pace=pace).own_rates("llama")
    assert rates[-1] == pytest.approx(4.8 * pace, abs=1e-3)
    assert all(rate in {c.rate for c in Sweep(pace=pace).cells()} for rate in rates)


def test_a_bad_trace_is_named(tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"emission_time_ms": 3}\n')
    with pytest.raises(InvalidRequest, match="line 1: input_length"):
        simulated.pace_of(bad)


def test_ablations_differ_in_what_they_say() -> None:
    assert setups.beliefs_for("adaserve-exact").noise == 0 < setups.beliefs_for("adaserve").noise
    assert isinstance(setups.calibration_for("adaserve-uncalibrated"), setups.Unlearned)
    assert not isinstance(setups.calibration_for("adaserve"), setups.Unlearned)
    for name in (*POLICIES, *VARIANTS):
        assert setups.policy_named(name) is not setups.policy_named(name)
    assert cells.OVERLOAD > 1
