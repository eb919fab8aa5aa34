"""The control loop on a virtual clock: the real engine and policies over simulated drafts, at costs that need not be as believed."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest

from headrace.core.batch import StepShape
from headrace.core.clock import VirtualClock
from headrace.core.outputs import RequestTiming
from headrace.core.policy import Limits
from headrace.core.request import SLO, Request, SamplingParams
from headrace.engine.simulation.acceptance import Acceptance, AcceptanceModel, Miscalibration
from headrace.engine.simulation.drafts import PassCosts, SimulatedSpeculation
from headrace.engine.simulation.runner import VOCAB, SimulatedEngine
from headrace.speculation.calibration import OnlineCalibration
from headrace.speculation.policies import POLICIES

LIMITS = Limits(max_sequences=64, max_step_tokens=512, max_prefill_tokens=512)


@dataclass
class Machine:
    """Milliseconds of a step and of a row; ``off`` is what the policy's copy is multiplied with."""

    step_ms: float = 20.0
    row_ms: float = 0.2
    off: float = 1.0

    def cost(self, shape: StepShape) -> float:
        return self.off * (self.step_ms + self.row_ms * (shape.prefill_tokens + shape.decode_tokens))


def job(name: str, tpot_ms: float | None, tokens: int = 150, arrival: float = 1.0) -> Request:
    prompt = tuple(random.Random(name).choices(range(VOCAB), k=20))
    params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, seed=sum(map(ord, name)))
    return Request(name, prompt, params, arrival=arrival, slo=SLO(tpot_ms=tpot_ms))


def built(
    machine: Machine,
    clock: VirtualClock,
    *,
    policy: str = "adaserve",
    believed: Machine | None = None,
    miscalibration: Miscalibration | None = None,
    layer_ms: float = 2.0,
) -> SimulatedEngine:
    model = AcceptanceModel(Acceptance(ease=2.5, request_spread=0.2), miscalibration, seed=3)
    costs = PassCosts({"draft": layer_ms})
    engine = SimulatedEngine(
        machine,
        POLICIES[policy](),
        clock,
        limits=LIMITS,
        speculation=SimulatedSpeculation({"draft": model}, costs, OnlineCalibration()),
    )
    if believed is not None:
        engine.profile = believed
    return engine


def finished(engine: SimulatedEngine, jobs: list[Request]) -> dict[str, RequestTiming]:
    for each in jobs:
        engine.add(each)
    timings: dict[str, RequestTiming] = {}
    while engine.busy:
        for delta in engine.step():
            if delta.reason is not None:
                assert delta.timing is not None
                timings[delta.request_id] = delta.timing
    return timings


MIXED = (
    [job(f"u{i}", 15.0) for i in range(6)]
    + [job(f"c{i}", 30.0) for i in range(6)]
    + [job(f"s{i}", 90.0) for i in range(6)]
)


@pytest.mark.parametrize("off", [0.7, 1.0, 1.3])
@pytest.mark.parametrize("bias", [-0.7, 0.0, 0.7])
def test_feasible_targets_are_kept_although_costs_and_chances_are_misjudged(off: float, bias: float) -> None:
    """Step costs off by 30 % either way and drafts that think too well or too badly of themselves: within 2 % of every target."""
    clock = VirtualClock(1.0)
    machine = Machine()
    wrong = Machine(off=off)
    engine = built(machine, clock, believed=wrong, miscalibration=Miscalibration(0.8, bias, 0.3))
    for each, timing in finished(engine, MIXED).items():
        target = next(j.slo.tpot_ms for j in MIXED if j.id == each)
        assert timing.tpot_ms is not None
        assert timing.tpot_ms <= 1.02 * target, each


def test_without_drafts_the_same_targets_are_missed() -> None:
    """Negative control: a step takes 24 ms for everybody, above the tightest target."""
    clock = VirtualClock(1.0)
    jobs = [Request(j.id, j.prompt, j.params, arrival=j.arrival, slo=j.slo, speculate=False) for j in MIXED]
    timings = finished(built(Machine(), clock), jobs)
    assert all(timings[j.id].tpot_ms > 20.0 for j in jobs if j.slo.tpot_ms == 15.0)


def test_a_hopeless_request_costs_others_nothing() -> None:
    """One that wants a token a millisecond beside feasible ones: they still keep their targets, and it ends."""
    clock = VirtualClock(1.0)
    timings = finished(built(Machine(), clock), [*MIXED, job("doomed", 1.0)])
    kept = sum(timings[j.id].tpot_ms <= j.slo.tpot_ms for j in MIXED)
    assert kept >= len(MIXED) - 0.01 * len(MIXED)
    assert timings["doomed"].tpot_ms > 1.0


def test_the_step_adapts_to_a_changed_machine_within_fifty_steps() -> None:
    """Rows become twenty times as dear: within fifty steps far fewer draft nodes are verified."""
    clock = VirtualClock(1.0)
    machine = Machine(row_ms=0.05)
    engine = built(machine, clock)
    for number in range(12):
        engine.add(job(f"r{number}", None, tokens=2000))

    def nodes_of(steps: int) -> float:
        before = engine.stats().drafted
        for _ in range(steps):
            engine.step()
        return (engine.stats().drafted - before) / steps

    nodes_of(20)
    cheap = nodes_of(20)
    machine.row_ms = 5.0
    nodes_of(50)
    dear = nodes_of(20)
    assert dear < cheap / 4
    machine.row_ms = 0.05
    nodes_of(50)
    assert nodes_of(20) > 0.7 * cheap
    engine.close()


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_every_policy_ends_every_request_and_gives_all_slots_back(policy: str) -> None:
    clock = VirtualClock(1.0)
    engine = built(Machine(), clock, policy=policy)
    timings = finished(engine, [*MIXED, job("free", None), job("forced", 20.0)])
    assert len(timings) == len(MIXED) + 2
    assert all(t.decoded == 150 for t in timings.values())
    assert engine.space.pool.free == engine.space.pool.size
