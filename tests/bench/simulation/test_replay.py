"""Open-loop replay: arrivals when they are due, one row each, also for what is refused or cut off."""

from __future__ import annotations

import pytest
from tests.engine import fake

from headrace.bench import metrics
from headrace.bench.simulation.machines import LinearMachine, TableMachine, get_machine
from headrace.bench.simulation.replay import START, Replay
from headrace.bench.workloads.arrivals import BLOCK, Arrival, poisson, requests
from headrace.core.batch import StepShape
from headrace.core.clock import VirtualClock
from headrace.core.errors import InvalidRequest
from headrace.core.policy import StepPlan, View
from headrace.core.request import SLO
from headrace.engine.policies import get_policy
from headrace.engine.simulation.runner import VOCAB, SimulatedEngine


def replay(
    arrivals: list[Arrival], *, policy: str = "chunked", horizon_s: float | None = None, **options: object
) -> list[metrics.RequestRow]:
    clock = VirtualClock(START)
    engine = SimulatedEngine(LinearMachine(10.0), get_policy(policy), clock, **options)  # type: ignore[arg-type]
    coming = requests(arrivals, vocab_size=VOCAB, start=START)
    return Replay(engine, clock, clock.advance, coming, horizon_s=horizon_s).run()


def test_rows_are_exact_on_a_constant_machine() -> None:
    arrivals = [Arrival(0.0, 100, 3, slo=SLO(tpot_ms=10.5)), Arrival(5.0, 100, 1), Arrival(5.004, 100, 2)]
    a, b, c = replay(arrivals)
    assert (a["ttft_ms"], a["tpot_ms"], a["e2e_ms"]) == (pytest.approx(10), pytest.approx(10), pytest.approx(30))
    assert (b["ttft_ms"], b["tpot_ms"], b["decoded"]) == (pytest.approx(10), None, 1)
    assert c["ttft_ms"] == pytest.approx(16), "waits for the step under way"
    assert all(metrics.attained(row) for row in (a, b, c))
    assert metrics.duration_s([a, b, c]) == pytest.approx(5.030)


def test_refused_requests_count_as_missed() -> None:
    rows = replay([Arrival(0.0, 500, 10), Arrival(0.0, 10, 10)], context=100)
    by_id = {row["id"]: row for row in rows}
    assert (by_id["0"]["finished"], by_id["0"]["ttft_ms"], by_id["1"]["finished"]) == (False, None, True)
    assert metrics.attainment(rows) == 0.5


@pytest.mark.parametrize("policy", ["chunked", "vtc"])
def test_the_horizon_cuts_off(policy: str) -> None:
    rows = replay([Arrival(0.0, 10, 5), Arrival(0.0, 10, 500)], policy=policy, horizon_s=START + 0.2)
    assert [(r["id"], r["finished"], r["decoded"]) for r in rows] == [("0", True, 5), ("1", False, 20)]
    assert rows[1]["e2e_ms"] is None


def test_shared_prefixes_are_found() -> None:
    arrivals = [Arrival(float(i), 2 * BLOCK + 10, 2, blocks=(1, 2, 3 + i)) for i in range(4)]
    shared = metrics.summary(replay(arrivals, prefix_cache=True))["cached_share"]
    assert shared == pytest.approx(3 * 2 * BLOCK / (4 * (2 * BLOCK + 10)), abs=0.01)
    assert metrics.summary(replay(arrivals))["cached_share"] == 0.0


def test_any_engine_can_be_replayed() -> None:
    engine = fake.engine()
    clock = engine.clock
    assert isinstance(clock, VirtualClock)
    coming = [fake.request(str(i), [i + 1] * 9, max_tokens=6, ignore_eos=True) for i in range(5)]
    rows = Replay(engine, clock, clock.advance, coming).run()
    assert sorted(r["id"] for r in rows) == list("01234")
    assert all(r["finished"] and r["decoded"] == 6 for r in rows)


class Idle:
    """Admits and runs nobody."""

    def admit(self, view: View) -> list[int]:
        return []

    def plan(self, view: View) -> StepPlan:
        return StepPlan()


def test_a_policy_that_runs_nothing_is_caught() -> None:
    clock = VirtualClock(START)
    engine = SimulatedEngine(LinearMachine(1.0), Idle(), clock)
    with pytest.raises(RuntimeError, match="runs nothing"):
        Replay(engine, clock, clock.advance, requests(poisson(1.0, 3, seed=0), vocab_size=VOCAB, start=START)).run()


def test_machines() -> None:
    assert LinearMachine(1.0, 2.0, 3.0).cost(StepShape(4, 1, 2000, 2, 0)) == 1 + 10 + 6
    table = TableMachine((1.0, 10.0, 20.0), (5.0, 5.0, 9.0))
    assert [table.cost(StepShape(0, n, 0, n, 0)) for n in (1, 10, 15, 30)] == [5, 5, 7, 13]
    assert get_machine("llama-3.1-70b-8xa100").cost(StepShape(512, 0, 0, 1, 0)) == 125.0
    with pytest.raises(InvalidRequest, match="choose one of llama"):
        get_machine("abacus")
