"""Whatever makes planning cheap leaves the decisions as they are: costs as arrays, steps shared by both calls, early exits."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.speculation.policies.test_policies import states
from tests.speculation.policies.views import Fake, Known, view

from headrace.core.batch import StepShape
from headrace.core.policy import StepPlan, View
from headrace.core.request import SLO
from headrace.core.speculation import DraftTree, empty_tree
from headrace.profiling import MeasuredProfile, Point
from headrace.speculation.forecast import Forecast
from headrace.speculation.pace import Pace
from headrace.speculation.policies.adaserve import AdaServe, Settings
from headrace.speculation.policies.step import Step, forecast
from headrace.speculation.select import ladder


def measured(corrected: bool) -> MeasuredProfile:
    """Costs that rise with every size of a step, with bends; corrected by some steps that were slower."""
    points = []
    for rows in (1, 2, 4, 8, 16, 64, 256):
        for context in (0, 100, 900):
            shape = StepShape(0, rows, context * min(rows, 8), min(rows, 8), rows * (context + rows))
            points.append(Point(shape, (10.0 + 0.1 * rows + max(0, rows - 16) * 0.2 + 1e-4 * shape.attended,)))
            points.append(Point(replace(shape, prefill_tokens=rows, decode_tokens=0), (11.0 + 0.4 * rows,)))
    profile = MeasuredProfile(points)
    if corrected:
        for rows in (2, 9, 40):
            profile.observe(StepShape(0, rows, 100, rows, 100 * rows), 30.0 + rows)
            profile.observe(StepShape(rows, 3, 100, 4, 100 * rows), 12.0 + rows)
    return profile


class OneByOne:
    """A profile that can only be asked step by step."""

    def __init__(self, profile: MeasuredProfile) -> None:
        self._profile = profile

    def cost(self, shape: StepShape) -> float:
        return self._profile.cost(shape)


@settings(max_examples=60, deadline=None)
@given(states(), st.booleans(), st.integers(0, 300))
def test_costs_as_an_array_are_those_of_single_steps(state: View, corrected: bool, prefill: int) -> None:
    """At every size the array profile says what the other is asked for; between its sizes the other is taken as linear."""
    profile = measured(corrected)
    state.profile = profile
    many = Step(state).passes(60, prefill)
    state.profile = OneByOne(profile)
    single = Step(state)
    for nodes in ladder(0, 60)[:-1]:  # the sizes asked for
        # a step's pairs are whole numbers when it is asked for alone
        assert many[nodes] == pytest.approx(single.passes(60, prefill)[nodes], rel=1e-4)
    assert single.prefill_ms(prefill) == pytest.approx(many[0], rel=1e-4)


@settings(max_examples=150, deadline=None)
@given(states(), st.randoms(use_true_random=False))
def test_a_step_begun_for_the_draft_is_planned_as_a_fresh_one(state: View, random) -> None:
    """The plan right after the draft, on the costs known from it, equals that of a policy that begins anew."""
    policy = AdaServe(Settings(trials=False))
    candidates = {}
    for order in policy.draft(state).orders:
        rates = [random.uniform(0.1, 1.0) for _ in range(order.depth)]
        candidates[order.sequence] = DraftTree.chain(range(order.depth), rates, "draft")
    state.candidates = candidates
    assert same(policy.plan(state), AdaServe(Settings(trials=False)).plan(state))


@settings(max_examples=150, deadline=None)
@given(states())
def test_no_candidates_are_planned_as_empty_ones(state: View) -> None:
    """The early exit of a step without drafts decides what the whole way would."""
    quick = AdaServe(Settings(trials=False)).plan(state)
    state.candidates = {s.id: empty_tree("draft") for s in state.running}
    assert same(quick, AdaServe(Settings(trials=False)).plan(state))


@settings(max_examples=150, deadline=None)
@given(states())
def test_the_depth_that_keeps_all_needs_no_comparison(state: View) -> None:
    """Where the depth that yields most keeps everybody's pace, comparing all depths comes to the same."""

    class Comparing(Forecast):
        def keeps_all(self, *_: object) -> bool:
            return False

    def depths() -> dict[int, int]:
        return {o.sequence: o.depth for o in AdaServe(Settings(trials=False)).draft(state).orders}

    quick = depths()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("headrace.speculation.policies.step.Forecast", Comparing)
        assert depths() == quick


@settings(max_examples=100, deadline=None)
@given(
    rates=st.lists(st.floats(0.05, 0.99), min_size=1, max_size=4),
    layer=st.floats(0.0, 10.0),
    row=st.floats(0.0, 5.0),
    targets=st.lists(st.sampled_from([8.0, 20.0, 60.0]), min_size=4, max_size=4),
)
def test_a_forecast_is_what_trying_every_step_finds(
    rates: list[float], layer: float, row: float, targets: list[float]
) -> None:
    """Rates by depth against every number of nodes, and ``keeps_all`` against its definition for one depth."""
    depth, count = 5, len(rates)
    chances = np.array(rates)[None, :] ** np.arange(1, depth + 1)[:, None]
    drafting, passes = layer * np.arange(depth + 1.0), 20.0 + row * np.arange(depth * count + 1.0)
    found = Forecast(chances, drafting, passes)
    for layers in range(depth + 1):
        gains = np.sort(chances[:layers].ravel())[::-1]
        tried = [(count + gains[:k].sum()) / (drafting[layers] + passes[k]) for k in range(len(gains) + 1)]
        assert found.rate[layers] == pytest.approx(max(tried))
    speed, counted = 1.0 / np.array(targets[:count]), np.ones(count, bool)
    kept = found.kept(speed, counted)
    for layers in range(depth + 1):
        if found.keeps_all(layers, speed, counted):
            assert kept[layers] == pytest.approx(count)


def test_an_array_that_forgets_the_prompts_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control of the first test."""
    prompt = Fake(9, pending=400, decoded=0, first_token=None, arrival=1.9)
    state = view([Fake(0), prompt])
    state.profile = profile = measured(corrected=False)
    right = Step(state).passes(10, 200)
    growing = MeasuredProfile.growing
    monkeypatch.setattr(
        MeasuredProfile,
        "growing",
        lambda self, shape, rows, attended: growing(self, replace(shape, prefill_tokens=0), rows, attended),
    )
    assert Step(state).passes(10, 200)[0] < 0.9 * right[0]
    assert OneByOne(profile).cost(StepShape(200, 1, 100, 2, 200)) > profile.cost(StepShape(0, 1, 100, 2, 200))


def test_rest_is_forgotten_when_the_load_falls() -> None:
    """Off for many; asked again in no time while as many run, and judged anew, soon after most have left."""
    from tests.speculation.policies.views import Machine

    machine = Machine(step_ms=20.0, row_ms=4.0, layer_ms=1.0)
    policy = AdaServe(Settings(trials=False))
    crowd = [Fake(n) for n in range(40)]
    assert policy.draft(view(crowd, machine=machine)).orders == []
    asked = Known()

    def survival(*_: object) -> None:
        raise AssertionError("judged although it was decided a moment ago")

    asked.survival = survival  # type: ignore[assignment,method-assign]
    assert policy.draft(view(crowd, now=2.01, machine=machine, known=asked)).orders == []
    assert policy.draft(view(crowd[:1], now=3.0, machine=machine)).orders != []


def test_pace_without_targets_is_not_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests without targets cost no reckoning of targets; one with a target does."""
    asked: list[int] = []
    reckoned = Pace.__init__

    def counting(self: Pace, *arguments: object, **options: object) -> None:
        asked.append(1)
        reckoned(self, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Pace, "__init__", counting)
    running = [Fake(n) for n in range(3)]
    state = view(running)
    policy = AdaServe()
    state.candidates = {
        o.sequence: DraftTree.chain(range(o.depth), [0.8] * o.depth, "draft") for o in policy.draft(state).orders
    }
    policy.plan(state)
    assert not asked
    running[0].slo = SLO(tpot_ms=20.0)
    AdaServe().plan(state)
    assert asked


def same(one: StepPlan, other: StepPlan) -> bool:
    """Whether two plans are equal."""
    nodes = {n: chosen.tolist() for n, chosen in one.nodes.items()}
    return (one.chunks, one.victims, nodes) == (
        other.chunks,
        other.victims,
        {n: chosen.tolist() for n, chosen in other.nodes.items()},
    )


def test_forecasts_leave_out_who_refuses() -> None:
    state = view([Fake(0), Fake(1, speculate=False)])
    promised = forecast(Step(state), "draft", 4)
    assert promised.reach[-1, 0] > 1.0
    assert promised.reach[-1, 1] == 1.0
