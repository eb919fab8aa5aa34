"""The gate for every change of a policy: a trace of three classes as AdaServe's, on a simulated machine with a draft model."""

from __future__ import annotations

import functools
import random

import pytest

from headrace.bench.simulation.machines import get_machine
from headrace.bench.simulation.replay import Replay
from headrace.core.clock import VirtualClock
from headrace.core.policy import DraftingPolicy, Limits, Policy
from headrace.core.request import SLO, Request, SamplingParams
from headrace.engine.policies.chunked import Chunked
from headrace.engine.simulation.acceptance import Acceptance, AcceptanceModel
from headrace.engine.simulation.drafts import PassCosts, SimulatedSpeculation
from headrace.engine.simulation.runner import VOCAB, SimulatedEngine
from headrace.speculation.calibration import OnlineCalibration
from headrace.speculation.policies import POLICIES
from headrace.speculation.policies.adaptive_chain import AdaptiveChain
from headrace.speculation.policies.fixed import FixedChain

BASELINE_MS = 30.0
CLASSES = ((0.6, 1.2 * BASELINE_MS, 60), (0.2, 50.0, 15), (0.2, 150.0, 300))
"""Share, TPOT target and mean prompt: coding, chat, summaries."""

ANSWER, COUNT = 64, 120
FIXED = {f"chain of {k}": (lambda k=k: FixedChain(k)) for k in (2, 4, 8)}
RIVALS = {"none": Chunked, "adaptive chain": AdaptiveChain, **FIXED}


def trace(rate: float) -> list[Request]:
    """Poisson arrivals of ``rate`` a second."""
    drawn, now, made = random.Random(3), 1.0, []
    for number in range(COUNT):
        now += drawn.expovariate(rate)
        _, target, size = drawn.choices(CLASSES, [c[0] for c in CLASSES])[0]
        prompt = tuple(drawn.choices(range(VOCAB), k=max(1, int(size * drawn.lognormvariate(0.0, 0.4)))))
        params = SamplingParams(temperature=0.0, max_tokens=ANSWER, ignore_eos=True, seed=number)
        made.append(Request(f"{number}", prompt, params, arrival=now, slo=SLO(tpot_ms=target)))
    return made


def attainment(policy: Policy, rate: float) -> float:
    """Share of the requests within their target, per cent."""
    clock = VirtualClock(1.0)
    model = AcceptanceModel(Acceptance(ease=1.6), seed=1)
    drafts = SimulatedSpeculation({"draft": model}, PassCosts({"draft": 7.0}), OnlineCalibration())
    engine = SimulatedEngine(
        get_machine("llama-3.1-70b-8xa100-flat"),
        policy,
        clock,
        limits=Limits(256, 1024, 1024),
        speculation=drafts if isinstance(policy, DraftingPolicy) else None,
    )
    rows = Replay(engine, clock, clock.advance, trace(rate)).run()
    kept = sum(row["tpot_ms"] is not None and row["tpot_ms"] <= (row["slo_tpot_ms"] or 0.0) for row in rows)
    return 100.0 * kept / len(rows)


@functools.cache
def mine(rate: float) -> float:
    return attainment(POLICIES["adaserve"](), rate)


@functools.cache
def best(rate: float) -> float:
    return max(attainment(made(), rate) for made in RIVALS.values())


@pytest.mark.slow
@pytest.mark.parametrize("rate", [4.0, 12.0, 20.0])
def test_never_below_any_fixed_choice(rate: float) -> None:
    """Every request is almost a point here, so one of them is granted."""
    assert mine(rate) >= best(rate) - 100.0 / COUNT - 1e-9


@pytest.mark.slow
def test_far_above_at_a_high_load() -> None:
    assert max(mine(rate) - max(attainment(made(), rate) for made in FIXED.values()) for rate in (12.0, 20.0)) > 10.0


@pytest.mark.slow
def test_each_part_earns_its_keep() -> None:
    """Negative controls of the gate: without a part of the policy, at some load it falls below."""
    for name in ("equal", "paper"):
        assert max(mine(rate) - attainment(POLICIES[name](), rate) for rate in (4.0, 20.0)) > 10.0, name
