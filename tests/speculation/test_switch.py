"""Speculation off and on again: what is judged too dear is tried again, soon enough to matter and seldom enough to cost nothing."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
from tests.speculation.test_control import LIMITS, Machine

from headrace.core.clock import VirtualClock
from headrace.core.request import SLO, Request, SamplingParams
from headrace.engine.simulation.acceptance import Acceptance, AcceptanceModel
from headrace.engine.simulation.drafts import PassCosts, SimulatedDrafter, SimulatedSpeculation
from headrace.engine.simulation.paths import Chains
from headrace.engine.simulation.runner import VOCAB, SimulatedEngine
from headrace.speculation.calibration import OnlineCalibration
from headrace.speculation.policies.adaserve import AdaServe, Settings

GOOD, BAD = Acceptance(ease=2.5, request_spread=0.2), Acceptance(ease=-4.0, request_spread=0.2)


def jobs() -> Iterator[Request]:
    for number in range(1 << 20):
        prompt = tuple(random.Random(number).choices(range(VOCAB), k=30))
        params = SamplingParams(temperature=0.0, max_tokens=100, ignore_eos=True, seed=number)
        yield Request(f"r{number}", prompt, params, arrival=1.0, slo=SLO(tpot_ms=[None, 40.0][number % 2]))


class Machinery:
    """A closed loop of ``users`` requests over simulated drafts of ``layer_ms`` a layer in steps of 20 ms."""

    def __init__(
        self, acceptance: Acceptance | None, users: int = 6, *, layer_ms: float = 1.0, settings: Settings | None = None
    ) -> None:
        self.clock, self._jobs = VirtualClock(1.0), jobs()
        models = {"draft": AcceptanceModel(acceptance, seed=5)} if acceptance is not None else {}
        drafts = SimulatedSpeculation(models, PassCosts({"draft": layer_ms}), OnlineCalibration())
        self.machine = Machine()
        self.engine = SimulatedEngine(
            self.machine, AdaServe(settings), self.clock, limits=LIMITS, speculation=drafts if models else None
        )
        self.users = users

    def turns(self, acceptance: Acceptance) -> None:
        """From now on drafts are so good."""
        assert self.engine.drafting is not None
        drafter = self.engine.drafting._drafters["draft"]
        assert isinstance(drafter, SimulatedDrafter)
        drafter._chains = Chains(AcceptanceModel(acceptance, seed=5))

    def run(self, seconds: float) -> float:
        """Tokens a second over the next ``seconds``."""
        begun, tokens = self.clock.now(), 0
        while self.clock.now() < begun + seconds:
            while self.engine.stats().running + self.engine.stats().waiting < self.users:
                self.engine.add(next(self._jobs))
            tokens += sum(len(delta.tokens) for delta in self.engine.step())
        return tokens / (self.clock.now() - begun)

    def nodes(self, seconds: float) -> float:
        """Draft nodes verified in a step, over the next ``seconds``."""
        stats = self.engine.stats()
        drafted, steps = stats.drafted, stats.steps
        self.run(seconds)
        return (stats.drafted - drafted) / (stats.steps - steps)


@pytest.mark.parametrize("users", [2, 12])
def test_a_source_that_never_pays_costs_next_to_nothing(users: int) -> None:
    plain, trying = Machinery(None, users), Machinery(BAD, users)
    plain.run(10.0)
    trying.run(10.0)  # while it learns that nothing pays
    assert trying.run(40.0) > 0.985 * plain.run(40.0)
    assert trying.engine.stats().drafted > 0


def test_drafts_that_become_good_are_found_again() -> None:
    built = Machinery(GOOD, layer_ms=4.0)
    first = built.run(10.0)
    built.turns(BAD)
    built.run(20.0)
    bad = built.run(10.0)
    assert bad < 0.6 * first
    built.turns(GOOD)
    built.run(10.0)
    assert built.run(10.0) > 0.9 * first


def test_without_trials_they_are_lost_for_ever() -> None:
    """Negative control."""
    built = Machinery(GOOD, layer_ms=4.0, settings=Settings(trials=False))
    first = built.run(10.0)
    built.turns(BAD)
    built.run(20.0)
    built.turns(GOOD)
    built.run(20.0)
    assert built.run(10.0) < 0.7 * first


def test_a_lighter_load_switches_it_on_again() -> None:
    """Rows so dear that drafts pay for few requests only: off with many, on within a second of their leaving."""
    built = Machinery(GOOD, users=40)
    built.machine.row_ms = 3.0
    built.run(10.0)
    assert built.nodes(3.0) / 40 < 1.0
    built.users = 1
    while built.engine.stats().running > 1:
        built.run(0.1)
    built.run(0.5)
    assert built.nodes(3.0) > 2.0
