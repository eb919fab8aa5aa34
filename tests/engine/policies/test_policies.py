"""The baseline policies as pure functions: budgets, order and admission."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.sequences import Fake

from headrace.core.errors import InvalidRequest
from headrace.core.order import in_prefill, urgency
from headrace.core.policy import Limits, View
from headrace.engine.policies import POLICIES, get_policy


@st.composite
def sequences(draw: st.DrawFn) -> list[Fake]:
    count = draw(st.integers(0, 12))
    made = []
    for i in range(count):
        decoded = draw(st.integers(0, 3))
        made.append(
            Fake(
                id=i,
                pending=draw(st.one_of(st.just(1), st.integers(1, 300))),
                decoded=decoded,
                context=draw(st.integers(0, 100)),
                priority=draw(st.integers(-1, 1)),
                arrival=float(draw(st.integers(0, 5))),
                width=draw(st.integers(1, 4)) if decoded == 0 else 1,
            )
        )
    return made


limits = st.builds(
    Limits,
    max_sequences=st.integers(1, 16),
    max_step_tokens=st.integers(16, 256),
    max_prefill_tokens=st.integers(1, 256),
)


def view(running: list[Fake], waiting: list[Fake], bounds: Limits, free: int = 10_000) -> View:
    return View(0.0, running, sorted(waiting, key=urgency), free, 10_000, bounds)


BASELINES = ["chunked", "prefill-first"]
every_policy = pytest.mark.parametrize("policy", BASELINES)


@every_policy
@given(running=sequences(), bounds=limits)
def test_plans_keep_to_budget_and_to_what_is_pending(policy: str, running: list[Fake], bounds: Limits) -> None:
    plan = get_policy(policy).plan(view(running, [], bounds))
    by_id = {s.id: s for s in running}
    assert len({i for i, _ in plan.chunks}) == len(plan.chunks)
    assert all(1 <= n <= by_id[i].pending for i, n in plan.chunks)
    assert sum(n for _, n in plan.chunks) <= max(bounds.max_step_tokens, bounds.max_prefill_tokens)
    assert bool(plan.chunks) == bool(running), "something runs whenever something can"
    assert sorted(plan.victims) == sorted(by_id)
    assert plan.victims == [s.id for s in sorted(running, key=urgency)][::-1]


@given(running=sequences(), bounds=limits)
def test_chunked_advances_every_decode(running: list[Fake], bounds: Limits) -> None:
    chunks = dict(get_policy("chunked").plan(view(running, [], bounds)).chunks)
    assert all(chunks.get(s.id) == 1 for s in running if not in_prefill(s))
    left = bounds.max_step_tokens - sum(not in_prefill(s) for s in running)
    wanted = sum(s.pending for s in running if in_prefill(s))
    assert sum(n for i, n in chunks.items() if in_prefill(running[i])) == min(left, wanted)


@given(running=sequences(), bounds=limits)
def test_prefill_first_never_mixes(running: list[Fake], bounds: Limits) -> None:
    chunks = get_policy("prefill-first").plan(view(running, [], bounds)).chunks
    kinds = {in_prefill(running[i]) for i, _ in chunks}
    assert len(kinds) <= 1
    if any(in_prefill(s) for s in running):
        assert kinds == {True}
        cut = [i for i, n in chunks if n < running[i].pending]
        assert len(cut) <= 1, "only the first prompt may be cut"
        assert not cut or chunks[0][0] == cut[0]


@every_policy
@given(running=sequences(), waiting=sequences(), bounds=limits, free=st.integers(0, 2000))
def test_admission_keeps_order_places_and_room(
    policy: str, running: list[Fake], waiting: list[Fake], bounds: Limits, free: int
) -> None:
    seen = view(running, waiting, bounds, free)
    admitted = get_policy(policy).admit(seen)
    assert admitted == [s.id for s in seen.waiting][: len(admitted)], "queue order, no overtaking"
    chosen = [s for s in seen.waiting if s.id in admitted]
    if admitted:
        assert sum(s.width for s in [*running, *chosen]) <= bounds.max_sequences
    if running:
        room = free - sum(s.pending + s.width for s in running)
        assert sum(s.pending + s.width for s in chosen) <= max(room, 0)
    elif seen.waiting and seen.waiting[0].width <= bounds.max_sequences:
        assert admitted, "never below one running request"


def test_the_registry_makes_fresh_ones() -> None:
    assert set(BASELINES) <= set(POLICIES)
    for name in POLICIES:
        assert get_policy(name) is not get_policy(name)


def test_unknown_policies_are_named_with_the_choices() -> None:
    with pytest.raises(InvalidRequest, match="chunked, mlfq, prefill-first, priority, vtc") as caught:
        get_policy("fastest")
    assert caught.value.field == "policy"
