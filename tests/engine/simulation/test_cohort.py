"""Cohorts: what is written down late is the same as what is written down at once."""

from __future__ import annotations

import pytest
from tests.engine.simulation.test_runner import engine, request

from headrace.bench.simulation.replay import START, Replay
from headrace.core.clock import VirtualClock
from headrace.core.policy import StepPlan, View
from headrace.engine.policies.chunked import Chunked
from headrace.engine.simulation.cohort import PromisingPool
from headrace.models.cache.slots import OutOfSlots


def test_promised_slots_are_not_free_and_are_kept() -> None:
    pool = PromisingPool(10)
    pool.promised += 4
    assert pool.free == 6
    taken = pool.redeem(3)
    assert (pool.free, pool.promised) == (6, 1)
    pool.release(taken)
    assert pool.free == 9
    with pytest.raises(OutOfSlots):
        pool.take(11)


@pytest.mark.parametrize("stretch", [True, False])
def test_policies_read_true_sizes(stretch: bool) -> None:
    """Whatever was not written down, a policy sees every sequence as it is: tokens decoded tell the step it is in."""
    seen: list[list[tuple[int, int, int, int]]] = []

    class Watching(Chunked):
        steady = "always"

        def plan(self, view: View) -> StepPlan:
            seen.append([(s.context, s.pending, s.decoded, s.remaining) for s in view.running])
            return super().plan(view)

    clock = VirtualClock(START)
    made = engine(clock, stretch=stretch)
    made.policy = Watching()
    coming = [request("a", 10, 30), request("b", 40, 20, arrival=1.1), request("c", 50, 9, arrival=1.3)]
    for row in Replay(made, clock, clock.advance, coming).run():
        assert row["decoded"] == row["output_tokens"]
    for views in seen:
        for context, pending, decoded, remaining in views:
            assert pending >= 1
            assert remaining >= 1
            assert context + pending in (10 + decoded, 40 + decoded, 50 + decoded)
    assert max(decoded for views in seen for _, _, decoded, _ in views) >= 9


def test_a_cancelled_member_hands_out_its_tokens_first() -> None:
    clock = VirtualClock(START)
    made = engine(clock)
    for name in "ab":
        made.add(request(name, 10, 100))
    made.quiet_until = 1.4
    tokens = {"a": 0, "b": 0}
    while clock.now() < 1.4:
        for delta in made.step():
            tokens[delta.request_id] += len(delta.tokens)
    made.cancel("a")
    (rest, abort) = [d for d in made.step() if d.request_id == "a"]
    tokens["a"] += len(rest.tokens)
    assert abort.reason == "abort"
    assert abort.timing is not None
    assert tokens["a"] == abort.timing.decoded > 10
    made.quiet_until = float("inf")
    while made.busy:
        tokens["b"] += sum(len(d.tokens) for d in made.step() if d.request_id == "b")
    assert tokens["b"] == 100
    assert made.space.pool.free == made.space.pool.size


@pytest.mark.parametrize("horizon", [1.05, 1.5, 2.0, 3.0])
def test_a_cut_off_replay_says_the_same_with_and_without_stretches(horizon: float) -> None:
    outcomes = []
    for stretch in (True, False):
        clock = VirtualClock(START)
        made = engine(clock, stretch=stretch)
        coming = [request(str(i), 20 + i, 40 + 7 * i, arrival=1.0 + 0.2 * i) for i in range(8)]
        rows = Replay(made, clock, clock.advance, coming, horizon_s=horizon).run()
        outcomes.append(sorted(rows, key=lambda r: r["id"]))
        assert not all(r["finished"] for r in rows)
    assert outcomes[0] == outcomes[1]
