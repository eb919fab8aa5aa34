"""Policies that rank and displace, and fair sharing: invariants over random views and random workloads."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.engine.policies.test_policies import limits, sequences, view
from tests.sequences import Fake

from headrace.core.batch import StepShape
from headrace.core.clock import VirtualClock
from headrace.core.order import in_prefill
from headrace.core.policy import Limits, Policy, StepPlan, View
from headrace.core.request import Request, SamplingParams
from headrace.engine.policies import get_policy
from headrace.engine.policies.mlfq import OVERDUE, Mlfq
from headrace.engine.policies.priority import Priority
from headrace.engine.policies.vtc import Vtc
from headrace.engine.simulation.runner import SimulatedEngine


def ranks(policy: str, now: float = 0.0) -> object:
    return (lambda s: s.priority) if policy == "priority" else Mlfq()._rank(now)


ranked = pytest.mark.parametrize("policy", ["priority", "mlfq"])


@ranked
@given(running=sequences(), bounds=limits)
def test_plans_of_ranked_policies(policy: str, running: list[Fake], bounds: Limits) -> None:
    rank = ranks(policy)
    assert callable(rank)
    plan = get_policy(policy).plan(view(running, [], bounds))
    by_id = {s.id: s for s in running}
    chosen = [by_id[i] for i, _ in plan.chunks]
    assert len({s.id for s in chosen}) == len(chosen)
    assert sum(n for _, n in plan.chunks) <= bounds.max_step_tokens
    assert sum(s.width for s in chosen) <= bounds.max_sequences
    assert all(1 <= n <= by_id[i].pending for i, n in plan.chunks)
    order = [(rank(s), in_prefill(s), s.arrival, s.id) for s in chosen]
    assert order == sorted(order), "best rank first, decodes before prompts within a rank"
    if any(s.width <= bounds.max_sequences for s in running):
        assert plan.chunks, "something runs whenever something can"
    assert sorted(plan.victims) == sorted(by_id)
    worth = [rank(by_id[i]) for i in plan.victims]
    assert worth == sorted(worth, reverse=True), "the worst go first"
    if all(s.width == 1 for s in running) and sum(n for _, n in plan.chunks) < bounds.max_step_tokens:
        paused = [(rank(s), in_prefill(s), s.arrival, s.id) for s in running if s not in chosen]
        assert not paused or min(paused) > max(order), "who pauses is outranked by all who run"


@ranked
@given(running=sequences(), waiting=sequences(), bounds=limits, free=st.integers(0, 2000))
def test_admission_of_ranked_policies(
    policy: str, running: list[Fake], waiting: list[Fake], bounds: Limits, free: int
) -> None:
    waiting = [replace(s, id=s.id + 100) for s in waiting]
    rank = ranks(policy)
    assert callable(rank)
    seen = view(running, waiting, bounds, free)
    admitted = get_policy(policy).admit(seen)
    line = sorted(waiting, key=lambda s: (rank(s), s.arrival, s.id))
    assert admitted == [s.id for s in line[: len(admitted)]], "by rank, no overtaking"
    for place, sequence in enumerate(line[: len(admitted)]):
        beside = [s for s in running if rank(s) <= rank(sequence)] + line[: place + 1]
        assert sum(s.width for s in beside) <= bounds.max_sequences
        displaced = sum(s.context for s in running if rank(s) > rank(sequence))
        need = sum(s.pending + s.width for s in beside)
        assert need <= free + displaced or (not running and place == 0)
    if not running and line and line[0].width <= bounds.max_sequences:
        assert admitted, "never below one running request"


def test_equals_do_not_displace_each_other() -> None:
    bounds = Limits(max_sequences=1, max_step_tokens=16)
    running, newcomer = Fake(0, priority=1, context=50), Fake(1, pending=9, decoded=0, priority=1)
    assert Priority().admit(view([running], [newcomer], bounds)) == []
    urgent = replace(newcomer, priority=0)
    assert Priority().admit(view([running], [urgent], bounds)) == [1]
    assert Priority().admit(view([running], [urgent], bounds, free=0)) == [1], "the slots of the other will do"
    both = Priority().plan(view([running, urgent], [], bounds))
    assert both == StepPlan(chunks=[(1, 9)], victims=[0, 1]), "the displaced one pauses"


@given(st.integers(1, 100_000), st.integers(0, 5000))
def test_queues_follow_the_walk_of_the_paper(prompt: int, decoded: int) -> None:
    """Against a token-by-token simulation of joining and sinking."""
    policy = Mlfq(quantum=128, levels=6, decode_weight=8.0)
    quanta = [128 << i for i in range(6)]
    level = next((i for i, q in enumerate(quanta) if q >= prompt), 5)
    left = quanta[level] - prompt
    for _ in range(decoded):
        left -= 8
        while left < 0 and level < 5:
            level += 1
            left += quanta[level]
    assert policy.level(prompt, decoded) == level


def test_skipping_and_sinking() -> None:
    policy = Mlfq(quantum=100, levels=4, decode_weight=10.0)
    assert [policy.level(p, 0) for p in (1, 100, 101, 200, 201, 10_000)] == [0, 0, 1, 1, 2, 3]
    assert [policy.level(50, d) for d in (0, 5, 6, 25, 26, 10_000)] == [0, 0, 1, 1, 2, 3]


def test_who_waits_too_long_is_overdue() -> None:
    policy = Mlfq(patience_s=10.0)
    waiting = Fake(0, pending=5000, decoded=0, arrival=0.0)
    assert policy._rank(10.0)(waiting) > OVERDUE
    assert policy._rank(10.1)(waiting) == OVERDUE
    served = Fake(0, pending=1, decoded=3, context=5002, arrival=0.0)
    assert policy._rank(39.0)(served) > OVERDUE


class Spy:
    """A policy that keeps each owner's service: prompt tokens at admission, generated tokens as they show."""

    steady = "never"

    def __init__(self, inner: Policy, prompt_weight: float = 1.0, decode_weight: float = 2.0) -> None:
        self.inner, self.weights = inner, (prompt_weight, decode_weight)
        self.served: dict[str, float] = {}
        self.history: list[tuple[dict[str, float], set[str]]] = []
        self.seen: dict[int, int] = {}

    def admit(self, view: View) -> list[int]:
        return self.inner.admit(view)

    def plan(self, view: View) -> StepPlan:
        for s in view.running:
            if s.id not in self.seen:
                self.served[s.owner] = self.served.get(s.owner, 0) + self.weights[0] * s.pending
                self.seen[s.id] = 0
            self.served[s.owner] += self.weights[1] * (s.decoded - self.seen[s.id])
            self.seen[s.id] = s.decoded
        self.history.append((dict(self.served), {s.owner for s in view.waiting}))
        return self.inner.plan(view)


class Machine:
    def cost(self, shape: StepShape) -> float:
        return 10.0


def drive(policy: Policy, requests: list[Request], slots: int = 2000) -> SimulatedEngine:
    limits = Limits(max_sequences=6, max_step_tokens=64)
    engine = SimulatedEngine(Machine(), policy, VirtualClock(1.0), limits=limits, slots=slots)
    for request in requests:
        engine.add(request)
    while engine.busy:
        engine.step()
    return engine


def request(number: int, owner: str, prompt: int, output: int) -> Request:
    params = SamplingParams(temperature=0.0, max_tokens=output, ignore_eos=True, seed=1)
    return Request(str(number), (1,) * prompt, params, owner=owner, arrival=1.0 + 1e-6 * number)


lengths = st.tuples(st.integers(1, 60), st.integers(1, 60))


@settings(max_examples=40, deadline=None)
@given(heavy=st.lists(lengths, min_size=30, max_size=60), light=st.lists(lengths, min_size=10, max_size=20))
def test_backlogged_owners_get_equal_service(heavy: list[tuple[int, int]], light: list[tuple[int, int]]) -> None:
    """The paper's bound: while both wait, services differ by at most twice the larger of a prompt and a full batch."""
    spy = Spy(Vtc())
    work = [("heavy", *h) for h in heavy] + [("light", *x) for x in light]
    drive(spy, [request(i, *w) for i, w in enumerate(work)])
    bound = 2 * max(1.0 * 60, 2.0 * 6 * 60)
    for served, waiting in spy.history:
        if waiting == {"heavy", "light"}:
            assert abs(served.get("heavy", 0) - served.get("light", 0)) <= bound


def test_without_counters_the_bound_breaks() -> None:
    spy = Spy(get_policy("chunked"))
    work = [("heavy", 50, 50)] * 60 + [("light", 50, 50)] * 20
    drive(spy, [request(i, *w) for i, w in enumerate(work)])
    gaps = [abs(s.get("heavy", 0) - s.get("light", 0)) for s, waiting in spy.history if waiting == {"heavy", "light"}]
    assert max(gaps) > 2 * 2.0 * 6 * 60


def test_counters_hold_exactly_what_was_served() -> None:
    policy = Vtc()
    work = [("a", 30, 12), ("b", 20, 1), ("a", 5, 40), ("b", 17, 9), ("c", 3, 3)]
    drive(policy, [request(i, *w) for i, w in enumerate(work)])
    policy.plan(View(9.0, [], [], 1, 1, Limits()))  # the last tokens show once their sequences are gone
    expected = {"a": 30 + 5 + 2 * 52, "b": 20 + 17 + 2 * 10, "c": 3 + 2 * 3}
    lifted = {name: policy.counters[name] - value for name, value in expected.items()}
    assert lifted == {"a": 0, "b": 0, "c": 0}, "all joined an empty or untouched queue"


def test_the_same_view_twice_changes_nothing() -> None:
    policy = Vtc()
    waiting = [Fake(i, pending=10, decoded=0, owner=o) for i, o in enumerate("aab")]
    seen = view([], waiting, Limits(max_sequences=2, max_step_tokens=64))
    assert policy.admit(seen) == policy.admit(seen) == [0, 2], "one each, not two of the first"
    running = [replace(waiting[0]), replace(waiting[2])]
    later = view(running, [waiting[1]], Limits(max_sequences=2, max_step_tokens=64))
    plans = [policy.plan(later), policy.plan(later)]
    assert plans[0] == plans[1]
    assert policy.counters == {"a": 10.0, "b": 10.0}


def test_idle_time_is_no_credit() -> None:
    policy = Vtc()
    bounds = Limits(max_sequences=1, max_step_tokens=64)
    for number in range(5):
        sequence = Fake(number, pending=100, decoded=0, owner="busy")
        policy.admit(view([], [sequence], bounds))
        policy.plan(view([sequence], [], bounds))
    newcomer, regular = Fake(10, pending=10, decoded=0, owner="new"), Fake(11, pending=10, decoded=0, owner="busy")
    policy.admit(view([], [regular, newcomer], bounds))
    assert policy.counters["new"] == policy.counters["busy"] >= 500


def test_nobody_starves_in_queues() -> None:
    """A huge job finishes although short ones keep the engine busy."""
    engine = SimulatedEngine(
        Machine(), Mlfq(quantum=64, patience_s=0.5), VirtualClock(1.0), limits=Limits(2, 32, 64), slots=500
    )
    engine.add(request(0, "", 200, 20))
    done: list[str] = []
    for number in range(1, 2000):
        if "0" in done:
            break
        engine.add(replace(request(number, "", 8, 6), arrival=engine.clock.now()))
        for _ in range(3):
            done += [d.request_id for d in engine.step() if d.reason is not None]
    assert "0" in done
