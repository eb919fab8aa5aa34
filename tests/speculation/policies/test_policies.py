"""Policies that speculate, as pure functions: budgets, depth, who gets nodes, and when there are none."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.speculation.policies.views import Fake, Known, Machine, drafted, view

from headrace.core.policy import DraftingPolicy, Limits, View
from headrace.core.request import SLO
from headrace.core.speculation import DraftTree
from headrace.speculation.policies import POLICIES


def answered(state: View, name: str, rate: float = 0.8) -> tuple[dict[int, int], dict[int, int], int]:
    """Depths ordered, nodes verified and prompt tokens of a step of the policy called ``name``."""
    policy = POLICIES[name]()
    ordered = {o.sequence: o.depth for o in policy.draft(state).orders}
    plan = policy.plan(drafted(state, ordered, rate))
    decoding = {s.id for s in state.running if s.pending == 1 and s.decoded}
    prefill = sum(tokens for number, tokens in plan.chunks if number not in decoding)
    return ordered, {n: len(nodes) for n, nodes in plan.nodes.items()}, prefill


@st.composite
def states(draw: st.DrawFn) -> View:
    running = []
    for number in range(draw(st.integers(0, 10))):
        decodes = draw(st.booleans())
        running.append(
            Fake(
                number,
                pending=1 if decodes else draw(st.integers(1, 400)),
                decoded=draw(st.integers(1, 60)) if decodes else 0,
                context=draw(st.integers(0, 500)),
                arrival=draw(st.floats(0.0, 2.0)),
                remaining=draw(st.integers(1, 200)),
                slo=SLO(
                    tpot_ms=draw(st.sampled_from([None, 5.0, 36.0, 150.0])),
                    ttft_ms=draw(st.sampled_from([None, 500.0])),
                ),
                first_token=draw(st.floats(0.5, 2.0)) if decodes else None,
                speculate=draw(st.sampled_from([None, None, True, False])),
            )
        )
    machine = Machine(row_ms=draw(st.sampled_from([0.0, 0.2, 20.0])), layer_ms=draw(st.sampled_from([0.0, 5.0, 500.0])))
    limits = draw(st.sampled_from([Limits(16, 16, 16), Limits(16, 64, 64), Limits(64, 512, 512)]))
    known = Known({n: draw(st.floats(0.01, 0.99)) for n in range(len(running))})
    return view(running, machine=machine, limits=limits, known=known)


@settings(max_examples=150, deadline=None)
@given(states(), st.sampled_from(sorted(POLICIES)), st.randoms(use_true_random=False))
def test_any_plan_fits_and_is_connected(state: View, name: str, random) -> None:
    """Rows within the budget, a row for everybody who decodes (but in steps of prompts alone), no draft for those who refuse."""
    policy = POLICIES[name]()
    assert isinstance(policy, DraftingPolicy)
    orders = policy.draft(state).orders
    by_id = {s.id: s for s in state.running}
    for order in orders:
        assert by_id[order.sequence].speculate is not False
        assert by_id[order.sequence].decoded > 0
        assert order.depth > 0
    state.candidates = {
        o.sequence: DraftTree.chain(range(o.depth), [random.uniform(0.1, 1.0) for _ in range(o.depth)], "draft")
        for o in orders
    }
    plan = policy.plan(state)
    rows = sum(tokens for _, tokens in plan.chunks) + sum(len(nodes) for nodes in plan.nodes.values())
    assert rows <= max(state.limits.max_step_tokens, state.limits.max_prefill_tokens)
    chunks = dict(plan.chunks)
    assert len(chunks) == len(plan.chunks)
    decoding = [s.id for s in state.running if s.pending == 1 and s.decoded]
    prompts = [s.id for s in state.running if not (s.pending == 1 and s.decoded)]
    assert all(tokens > 0 for tokens in chunks.values())
    if not set(chunks) & set(prompts):
        assert set(decoding) <= set(chunks)
    assert set(plan.nodes) <= set(chunks)
    for number, nodes in plan.nodes.items():
        state.candidates[number].part(nodes)
    assert state.running == [] or chunks
    assert policy.plan(state).chunks == plan.chunks


def test_a_fixed_chain_is_fixed() -> None:
    depths, nodes, _ = answered(view([Fake(0), Fake(1)]), "spec-6")
    assert depths == {0: 6, 1: 6}
    assert nodes == {0: 6, 1: 6}


@pytest.mark.parametrize("name", ["adaserve", "goodput", "adaptive-chain"])
def test_speculation_is_off_where_it_does_not_pay(name: str) -> None:
    few, _, _ = answered(view([Fake(0)]), name)
    assert few[0] > 2
    dear, _, _ = answered(view([Fake(0)], machine=Machine(layer_ms=100.0)), name)
    assert dear == {}
    steep, nodes, _ = answered(view([Fake(n) for n in range(8)], machine=Machine(step_ms=1.0, row_ms=30.0)), name)
    assert steep == nodes == {}
    hopeless, _, _ = answered(view([Fake(0)], known=Known(usual=0.05)), name)
    assert hopeless == {}


def test_the_published_policy_never_switches_off() -> None:
    """Negative control: it drafts at least its least depth however dear that is."""
    depths, nodes, _ = answered(view([Fake(n) for n in range(8)], machine=Machine(step_ms=1.0, row_ms=30.0)), "paper")
    assert set(depths.values()) == {8}
    assert sum(nodes.values()) > 0


def test_a_request_may_force_drafts_on_or_off() -> None:
    running = [Fake(0, speculate=True), Fake(1), Fake(2, speculate=False)]
    depths, _, _ = answered(view(running, machine=Machine(layer_ms=100.0)), "adaserve")
    assert depths == {0: 4}
    depths, _, _ = answered(view(running), "adaserve")
    assert set(depths) == {0, 1}


def test_deeper_with_fewer_requests_and_better_drafts() -> None:
    def depth(count: int, rate: float) -> int:
        made, _, _ = answered(view([Fake(n) for n in range(count)], known=Known(usual=rate)), "adaserve")
        return max(made.values(), default=0)

    assert depth(2, 0.9) > depth(2, 0.6)
    machine = Machine(step_ms=10.0, row_ms=1.0, layer_ms=0.5)
    by_load = [
        sum(answered(view([Fake(n) for n in range(count)], machine=machine), "adaserve")[1].values()) / count
        for count in (1, 4, 16, 60)
    ]
    assert by_load == sorted(by_load, reverse=True)
    assert by_load[0] > by_load[-1]


def late(number: int, tpot_ms: float, behind: float, **fields: object) -> Fake:
    """Decodes since a second; ``behind`` times as slow as its target so far."""
    decoded = 1 + round(1000.0 / (tpot_ms * behind))
    return Fake(number, decoded=decoded, slo=SLO(tpot_ms=tpot_ms), **fields)  # type: ignore[arg-type]


STEEP = Machine(step_ms=30.0, row_ms=2.0, layer_ms=1.0)


def test_who_is_behind_gets_the_nodes_where_not_all_can_have_them() -> None:
    """Everybody's nodes would make the step too slow for the one with a target: the others, who have none, go without."""
    running = [late(0, 40.0, 1.05), *(Fake(n) for n in range(1, 12))]
    _, aimed, _ = answered(view(running, machine=STEEP), "adaserve")
    _, blind, _ = answered(view(running, machine=STEEP), "goodput")
    assert set(aimed) == {0}
    assert len(set(blind.values())) == 1
    assert set(blind) == set(range(12))


def test_a_hopeless_request_gets_no_more_than_its_share() -> None:
    """So far behind that no draft could help: it is treated as one without a target, and the others as if it were not there."""
    others = [late(n, 60.0, 0.9) for n in range(1, 8)]
    doomed = late(0, 5.0, 20.0, remaining=10)
    _, nodes, _ = answered(view([doomed, *others], machine=STEEP), "adaserve")
    free = Fake(0, decoded=doomed.decoded, remaining=10)
    _, plain, _ = answered(view([free, *others], machine=STEEP), "adaserve")
    assert nodes == plain


def test_the_published_order_feeds_the_hopeless_first() -> None:
    """Negative control for the test above: with rows for two nodes each, the doomed gets the most it may, and others pay."""
    others = [late(n, 60.0, 0.9) for n in range(1, 8)]
    state = view([late(0, 5.0, 20.0, remaining=10), *others], limits=Limits(64, 24, 64))
    plan = POLICIES["paper"]().plan(drafted(state, dict.fromkeys(range(8), 6)))
    sizes = {n: len(nodes) for n, nodes in plan.nodes.items()}
    assert sizes[0] == 3
    assert min(sizes.values()) < 2


def test_prompts_take_what_those_being_answered_can_spare() -> None:
    prompt = Fake(9, pending=400, decoded=0, first_token=None, arrival=1.9)
    machine = Machine(step_ms=30.0, row_ms=1.0, layer_ms=1.0)
    relaxed = [late(n, 200.0, 0.3) for n in range(4)]
    tight = [late(n, 18.0, 1.0, remaining=10) for n in range(4)]
    spare = answered(view([*relaxed, prompt], machine=machine), "adaserve")[2]
    scarce = answered(view([*tight, prompt], machine=machine), "adaserve")[2]
    assert 0 < scarce < spare


def test_a_prompt_that_has_waited_long_is_not_put_off_further() -> None:
    machine = Machine(step_ms=30.0, row_ms=1.0, layer_ms=1.0)
    tight = [late(n, 18.0, 1.0, remaining=10) for n in range(4)]

    def prefill(arrival: float) -> int:
        prompt = Fake(9, pending=400, decoded=0, first_token=None, arrival=arrival)
        return answered(view([*tight, prompt], now=2.0, machine=machine), "adaserve")[2]

    assert prefill(-2.0) > prefill(1.9)


def test_who_is_due_first_enters_first() -> None:
    waiting = [
        Fake(1, pending=10, decoded=0, first_token=None, arrival=1.0),
        Fake(2, pending=10, decoded=0, first_token=None, arrival=1.5, slo=SLO(ttft_ms=600.0)),
        Fake(3, pending=10, decoded=0, first_token=None, arrival=0.2, slo=SLO(ttft_ms=900.0)),
        Fake(4, pending=10, decoded=0, first_token=None, arrival=1.9, priority=-1),
    ]
    state = view([], waiting=waiting)
    assert POLICIES["adaserve"]().admit(state) == [4, 2, 1, 3]  # 3 has missed its target and is due again at 4.7


def test_the_published_depth_and_width_follow_the_load() -> None:
    def shape(count: int) -> tuple[int, int]:
        orders = POLICIES["paper"]().draft(view([Fake(n) for n in range(count)])).orders
        return orders[0].depth, orders[0].width

    assert shape(1) == (8, 3)
    assert shape(64) == (512 // 64 - 1, 1)
    assert shape(40) == (8, 2)


def test_the_published_policy_fills_its_budget() -> None:
    _, nodes, _ = answered(view([Fake(n) for n in range(60)], machine=Machine(row_ms=9.0)), "paper")
    assert sum(nodes.values()) + 60 == 60 * 8


def test_equal_shares_are_equal() -> None:
    state = view([late(0, 10.0, 3.0), Fake(1), Fake(2)], limits=Limits(64, 15, 64))
    policy = POLICIES["equal"]()
    plan = policy.plan(drafted(state, {0: 8, 1: 8, 2: 8}))
    assert {n: len(nodes) for n, nodes in plan.nodes.items()} == {0: 4, 1: 4, 2: 4}


def test_without_drafters_they_are_plain_schedulers() -> None:
    state = view([Fake(0), Fake(1, pending=50, decoded=0, first_token=None)])
    state.outlook = None
    for name in ("adaserve", "adaptive-chain"):
        policy = POLICIES[name]()
        assert policy.draft(state).orders == []
        assert dict(policy.plan(state).chunks)[0] == 1
    state.profile = None
    assert np.isfinite(len(POLICIES["adaserve"]().plan(state).chunks))
